"""Task scores by exact match, with one harness for backbone, fine-tune and delta."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltacome_core.device_memory import naming_shortage
from deltacome_core.errors import UserError
from deltacome_core.generate import decode_greedily, end_tokens
from deltacome_core.memory import kv_bytes_per_token
from deltacome_core.models import load_model, load_tokenizer
from deltacome_core.reconstruct import reconstruct_checkpoint
from deltacome_core.served import served_backbone
from deltacome_core.texts import TextItem, read_texts, refuse_text

MAX_NEW_TOKENS = 64
# Rows that are decoded side by side: a small model takes as long for 64 as for 16.
_LEAST_ROWS, _MOST_ROWS = 16, 64
_CACHE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """hits holds one entry per item, in file order, so that subjects can be paired."""

    hits: tuple[bool, ...]

    @property
    def n(self) -> int:
        return len(self.hits)

    @property
    def accuracy(self) -> float:
        return sum(self.hits) / len(self.hits)

    @property
    def se(self) -> float:
        """Standard error of the accuracy, binomial."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.hits))

    def to_json(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "n": self.n,
            "se": self.se,
            "hits": [int(hit) for hit in self.hits],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """How the items of two subjects differ: gained and lost count changes from first to second."""

    gained: int
    lost: int
    difference: float
    se: float


def read_evaluation(path: Path) -> tuple[TextItem, ...]:
    """Read evaluation items.

    Args:
        path: .jsonl file of {"prompt", "answer"} lines.

    Returns:
        The items, at least one, each with a prompt and an answer.

    Raises:
        UserError: texts_invalid.
    """
    items = read_texts(path)
    for number, item in enumerate(items, start=1):
        if not item.prompt or not item.answer.strip():
            reason = "an evaluation item needs a prompt and an answer"
            raise refuse_text(path.name, reason, line=number)
    return items


def is_hit(text: str, answer: str) -> bool:
    """Whether the first line of a text is the answer, both stripped."""
    return text.partition("\n")[0].strip() == answer.strip()


def evaluate_exact_match(
    model: Any,
    tokenizer: Any,
    items: Sequence[TextItem],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> EvalReport:
    """Answer each prompt greedily; a hit is the first line equal to the answer, stripped.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        items: prompt and answer each.
        max_new_tokens: length of the longest answer.

    Returns:
        One hit or miss per item.
    """
    prompts = [tokenizer.encode(item.prompt) for item in items]
    answers = decode_greedily(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_tokens=end_tokens(model, tokenizer),
        batch_size=_choose_batch(model, max(map(len, prompts)) + max_new_tokens),
        is_finished=lambda tokens: "\n" in tokenizer.decode(tokens),
    )
    hits = []
    for item, tokens in zip(items, answers, strict=True):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        hits.append(is_hit(text, item.answer))
    return EvalReport(hits=tuple(hits))


def _choose_batch(model: Any, n_tokens: int) -> int:
    """Decode as many rows of so many tokens at once as have room for their keys and values."""
    try:
        row_bytes = n_tokens * kv_bytes_per_token(model.config.to_dict())
    except UserError:
        # A configuration that names its heads in another way.
        return _LEAST_ROWS
    return max(_LEAST_ROWS, min(_MOST_ROWS, _CACHE_BYTES // row_bytes))


def compare_hits(first: EvalReport, second: EvalReport) -> PairedDifference:
    """Compare two subjects item by item.

    Args:
        first: report of one subject.
        second: report of the other, on the same items.

    Returns:
        Items gained and lost from first to second, and the accuracy difference with the standard
        error of a paired comparison.
    """
    gained = sum(b and not a for a, b in zip(first.hits, second.hits, strict=True))
    lost = sum(a and not b for a, b in zip(first.hits, second.hits, strict=True))
    difference = (gained - lost) / first.n
    variance = (gained + lost) / first.n - difference**2
    return PairedDifference(
        gained=gained,
        lost=lost,
        difference=difference,
        se=math.sqrt(max(variance, 0.0) / first.n),
    )


def summarise_subjects(reports: Mapping[str, EvalReport]) -> dict[str, Any]:
    """Lay the reports of several subjects side by side.

    Args:
        reports: by subject; "finetune" and "delta" are also compared item by item.

    Returns:
        A JSON-ready object.
    """
    summary: dict[str, Any] = {name: report.to_json() for name, report in reports.items()}
    if "finetune" in reports and "delta" in reports:
        summary["paired"] = asdict(compare_hits(reports["finetune"], reports["delta"]))
    return summary


@naming_shortage()
def evaluate_subjects(
    items_path: Path,
    *,
    base_dir: Path,
    tuned_dir: Path | None = None,
    delta_dir: Path | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    device: str = "cpu",
) -> dict[str, Any]:
    """Score backbone, fine-tune and delta with one harness, one model in memory at a time.

    Args:
        items_path: .jsonl file of prompt + answer lines.
        base_dir: checkpoint folder of the backbone, scored at the precision the delta names.
        tuned_dir: checkpoint folder of the fine-tune, if it is to be scored.
        delta_dir: the delta, if it is to be scored; rebuilt in a folder beside it.
        max_new_tokens: length of the longest answer.
        device: "cpu" or "cuda".

    Returns:
        The object of summarise_subjects.

    Raises:
        UserError: texts_invalid, tokenizer_missing, device_memory_short, and what opening the
            folders raises.
    """
    items = read_evaluation(items_path)
    folders = [folder for folder in (tuned_dir, delta_dir, base_dir) if folder is not None]
    tokenizer = load_tokenizer(*folders)

    def score(folder: Path) -> EvalReport:
        model = load_model(folder, device=device)
        return evaluate_exact_match(model, tokenizer, items, max_new_tokens=max_new_tokens)

    with served_backbone(base_dir, delta_dir) as served:
        reports = {"backbone": score(served)}
    if tuned_dir is not None:
        reports["finetune"] = score(tuned_dir)
    if delta_dir is not None:
        with tempfile.TemporaryDirectory(dir=delta_dir.parent, prefix=".evaluate.") as scratch:
            rebuilt = Path(scratch) / "checkpoint"
            reconstruct_checkpoint(base_dir, delta_dir, rebuilt, device=device)
            reports["delta"] = score(rebuilt)
    return summarise_subjects(reports)
