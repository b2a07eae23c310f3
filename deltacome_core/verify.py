"""Measure what a delta lost: weights, next-token distributions and answers against the original."""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deltacome_core.canary import Canary, make_canary, read_last_logits
from deltacome_core.checkpoint import Checkpoint, at_precision, open_checkpoint
from deltacome_core.comparison import (
    GREEDY_TOKENS,
    MAX_TOKENS_PER_PROMPT,
    Comparison,
    ScoredText,
    compare_answers,
    compare_models,
    read_scored_texts,
)
from deltacome_core.container import open_delta
from deltacome_core.device_memory import naming_shortage
from deltacome_core.entries import MatrixEntry, RowsEntry
from deltacome_core.models import (
    find_max_positions,
    load_model,
    load_tokenizer,
)
from deltacome_core.reconstruct import reconstruct_checkpoint
from deltacome_core.served import served_backbone
from deltacome_core.tensors import as_float32, load_tensor
from deltacome_core.texts import DEFAULT_PROMPTS
from deltacome_core.trainable import is_trained_norm

REPORT_NAME = "verification.json"
EVALUATION_NAME = "evaluation.jsonl"
# Recovery and distance of the perplexity ratio from 1 that each grade demands.
GRADES = (("A", 0.98, 0.005), ("B", 0.95, 0.01), ("C", 0.90, 0.02))
N_WORST = 10
# Below this the fine-tune does not answer differently from its backbone.
_SMALLEST_KL = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One gate: value against threshold."""

    name: str
    ok: bool
    value: float
    threshold: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixError:
    """||reconstruction - fine-tune|| / ||fine-tune - backbone|| of one tensor."""

    name: str
    relative_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """kl in nats per token, KL(fine-tune || other); failing checks come first.

    matrices holds every quantised tensor, the largest error first; worst_matrices its head.
    canary: what a server can ask itself for; reports of before it have none.
    """

    grade: str
    recovery: float
    kl: float
    kl_backbone: float
    kl_p99: float
    top1: float
    ppl_ratio: float
    greedy_match: float
    greedy_exact: float
    n_prompts: int
    n_tokens: int
    worst_matrices: tuple[MatrixError, ...]
    matrices: tuple[MatrixError, ...]
    checks: tuple[Check, ...]
    seconds: float
    canary: Canary | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class _WeightReport:
    errors: tuple[MatrixError, ...]
    n_other_layout: int
    n_not_finite: int
    n_not_exact: int


def find_prompts(tuned_dir: Path) -> tuple[Path, ...]:
    """Choose the verification texts: the fine-tune's own when it brings some, else the built-in.

    Args:
        tuned_dir: folder of the fine-tune.

    Returns:
        Paths of existing files.
    """
    own = tuned_dir / EVALUATION_NAME
    return (own,) if own.is_file() else (DEFAULT_PROMPTS,)


@naming_shortage()
def verify_delta(
    base_dir: Path,
    tuned_dir: Path,
    delta_dir: Path,
    *,
    prompts: Sequence[Path] = (),
    device: str = "cpu",
    reconstructed_dir: Path | None = None,
) -> VerifyReport:
    """Rebuild the fine-tune from the packed bytes and compare it with the original.

    Args:
        base_dir: checkpoint folder of the backbone.
        tuned_dir: checkpoint folder of the fine-tune.
        delta_dir: the delta.
        prompts: .jsonl or .txt files; by default see find_prompts.
        device: "cpu" or "cuda".
        reconstructed_dir: the rebuilt checkpoint when there is one already; else it is written
            beside the delta and removed again.

    Returns:
        The measurements; at most two models were in memory at a time.

    Raises:
        UserError: backbone_digest_mismatch, delta_invalid, texts_invalid, tokenizer_missing,
            architecture_unknown, model_not_runnable, device_memory_short.
    """
    started, tokenizer = time.monotonic(), load_tokenizer(tuned_dir, delta_dir, base_dir)
    texts = _read_prompts(prompts or find_prompts(tuned_dir), tokenizer, tuned_dir)
    with tempfile.TemporaryDirectory(dir=delta_dir.parent, prefix=".verify.") as scratch:
        rebuilt = reconstructed_dir or Path(scratch) / "checkpoint"
        if reconstructed_dir is None:
            reconstruct_checkpoint(base_dir, delta_dir, rebuilt, device=device)
        weights = compare_weights(base_dir, tuned_dir, delta_dir, rebuilt)
        original = load_model(tuned_dir, device=device)
        found = _compare_rebuilt(original, load_model(rebuilt, device=device), tokenizer, texts)
        fidelity, (match, exact), logits = found
        with served_backbone(base_dir, delta_dir) as served:
            backbone, canary = _compare_backbone(original, served, texts, logits, device=device)
    recovery = measure_recovery(fidelity.kl, backbone.kl)
    checks = _list_checks(weights, recovery, fidelity.ppl_ratio)
    return VerifyReport(
        grade=_grade(checks, recovery, fidelity.ppl_ratio),
        recovery=recovery,
        kl=fidelity.kl,
        kl_backbone=backbone.kl,
        kl_p99=fidelity.kl_p99,
        top1=fidelity.top1,
        ppl_ratio=fidelity.ppl_ratio,
        greedy_match=match,
        greedy_exact=exact,
        n_prompts=len(texts),
        n_tokens=fidelity.n_tokens,
        worst_matrices=weights.errors[:N_WORST],
        matrices=weights.errors,
        checks=checks,
        seconds=time.monotonic() - started,
        canary=canary,
    )


def _compare_rebuilt(
    original: Any, rebuilt: Any, tokenizer: Any, texts: Sequence[ScoredText]
) -> tuple[Comparison, tuple[float, float], list[torch.Tensor]]:
    """Predictions and answers of the reconstruction, and its logits for the canary."""
    fidelity = compare_models(original, rebuilt, texts)
    answers = compare_answers(original, rebuilt, tokenizer, [text.opening for text in texts])
    return fidelity, answers, read_last_logits(rebuilt, [text.tokens for text in texts])


def _compare_backbone(
    original: Any,
    base_dir: Path,
    texts: Sequence[ScoredText],
    rebuilt_logits: list[torch.Tensor],
    *,
    device: str,
) -> tuple[Comparison, Canary]:
    backbone = load_model(base_dir, device=device)
    prompts = [text.tokens for text in texts]
    canary = make_canary(prompts, rebuilt_logits, read_last_logits(backbone, prompts))
    return compare_models(original, backbone, texts), canary


def save_report(report: VerifyReport, delta_dir: Path) -> Path:
    """Write verification.json into the delta folder.

    Args:
        report: what was measured.
        delta_dir: the delta.

    Returns:
        Path of the file.
    """
    path = delta_dir / REPORT_NAME
    path.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    return path


def measure_recovery(kl: float, kl_backbone: float) -> float:
    """Return the share of the fine-tune's change that survived: 1 - KL / KL of the backbone.

    Args:
        kl: KL(fine-tune || reconstruction).
        kl_backbone: KL(fine-tune || backbone); 0 means that there was nothing to lose.

    Returns:
        1 for a perfect reconstruction; negative when it is further away than the backbone.
    """
    return 1.0 if kl <= 0 else 1.0 - kl / max(kl_backbone, _SMALLEST_KL)


def grade_delta(recovery: float, ppl_ratio: float) -> str:
    """Grade a reconstruction.

    Args:
        recovery: see measure_recovery.
        ppl_ratio: perplexity of the reconstruction over that of the fine-tune.

    Returns:
        A, B, C, or F for fail.
    """
    for grade, least_recovery, largest_drift in GRADES:
        if recovery >= least_recovery and abs(ppl_ratio - 1) <= largest_drift:
            return grade
    return "F"


def _read_prompts(paths: Sequence[Path], tokenizer: Any, tuned_dir: Path) -> list[ScoredText]:
    config = open_checkpoint(tuned_dir).config
    # A greedy answer must still fit behind its prompt.
    longest = find_max_positions(config, default=MAX_TOKENS_PER_PROMPT) - GREEDY_TOKENS
    return read_scored_texts(
        paths, tokenizer, max_tokens=max(2, min(longest, MAX_TOKENS_PER_PROMPT))
    )


def compare_weights(
    base_dir: Path, tuned_dir: Path, delta_dir: Path, rebuilt_dir: Path
) -> _WeightReport:
    """Compare a rebuilt checkpoint with the original, one tensor in memory at a time.

    Args:
        base_dir: checkpoint folder of the backbone.
        tuned_dir: checkpoint folder of the fine-tune.
        delta_dir: the delta, whose digests were checked while rebuilding.
        rebuilt_dir: checkpoint folder written from the delta.

    Returns:
        The errors of the quantised tensors, and counts of tensors that break a promise.
    """
    delta = open_delta(delta_dir, verify_digests=False)
    entries, is_trained = delta.entries, bool(delta.manifest.recipe.settings.get("distilled"))
    base, tuned, rebuilt = (open_checkpoint(d) for d in (base_dir, tuned_dir, rebuilt_dir))
    base = at_precision(base, delta.manifest.backbone.precision)
    shared = [name for name in tuned.tensors if name in rebuilt.tensors and name in entries]
    other_layout = [n for n in tuned.layout if rebuilt.layout.get(n) != tuned.layout[n]]
    errors, not_finite, not_exact = [], 0, 0
    for name in shared:
        if name in other_layout:
            continue
        ours, truth = load_tensor(rebuilt, name), load_tensor(tuned, name)
        not_finite += int(ours.is_floating_point() and not torch.isfinite(ours).all())
        if isinstance(entries[name], MatrixEntry | RowsEntry):
            error = _delta_error(base, name, ours, truth)
            errors.append(MatrixError(name=name, relative_error=error))
        else:
            may_move = is_trained and name.endswith(".weight") and truth.ndim == 1
            is_same = is_trained_norm(ours, truth) if may_move else torch.equal(ours, truth)
            not_exact += int(not is_same)
    errors.sort(key=lambda error: -error.relative_error)
    return _WeightReport(
        errors=tuple(errors),
        n_other_layout=len(other_layout) + len(rebuilt.layout.keys() - tuned.layout.keys()),
        n_not_finite=not_finite,
        n_not_exact=not_exact,
    )


def _delta_error(base: Checkpoint, name: str, ours: torch.Tensor, truth: torch.Tensor) -> float:
    before = load_tensor(base, name)
    rows = before.shape[0]
    moved = torch.linalg.vector_norm(as_float32(truth[:rows]) - as_float32(before))
    missed = torch.linalg.vector_norm(as_float32(ours[:rows]) - as_float32(truth[:rows]))
    return float(missed / moved) if float(moved) else float(missed)


def _list_checks(weights: _WeightReport, recovery: float, ppl_ratio: float) -> tuple[Check, ...]:
    _, least_recovery, largest_drift = GRADES[-1]
    drift = abs(ppl_ratio - 1)
    checks = [
        Check(
            name="recovery",
            ok=recovery >= least_recovery,
            value=recovery,
            threshold=least_recovery,
        ),
        Check(name="ppl_drift", ok=drift <= largest_drift, value=drift, threshold=largest_drift),
        *(
            Check(name=name, ok=count == 0, value=float(count), threshold=0.0)
            for name, count in (
                ("tensors_of_other_layout", weights.n_other_layout),
                ("tensors_not_finite", weights.n_not_finite),
                ("exact_tensors_that_differ", weights.n_not_exact),
            )
        ),
    ]
    return tuple(sorted(checks, key=lambda check: check.ok))


def _grade(checks: Sequence[Check], recovery: float, ppl_ratio: float) -> str:
    return grade_delta(recovery, ppl_ratio) if all(check.ok for check in checks) else "F"
