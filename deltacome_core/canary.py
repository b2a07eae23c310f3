"""A few logits of the reconstruction, kept with the verification, that a server can ask for again.

A server that applies a delta wrongly, or not at all, still answers fluently. Comparing its logits
with stored ones shows the mistake before the first request.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltacome_core.models import running_on_text

CANARY_VERSION = 1
MAX_CANARY_TOKENS = 32
N_CANARY_PROMPTS = 8
N_CANARY_LOGITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """The largest logits after a prompt, of the reconstruction and of the backbone.

    tokens: the prompt; ids: tokens whose logits follow; logits: of the reconstruction; backbone:
    of the backbone at the same ids. version tells readers whether they know this shape.
    """

    version: int
    tokens: tuple[int, ...]
    ids: tuple[int, ...]
    logits: tuple[float, ...]
    backbone: tuple[float, ...]

    @property
    def backbone_error(self) -> float:
        """Root mean square difference of backbone and reconstruction."""
        return _rms(self.backbone, self.logits)

    def measure_error(self, logits: Sequence[float]) -> float:
        """How far served logits at `ids` are from the reconstruction's.

        Args:
            logits: one an id.

        Returns:
            Root mean square difference.
        """
        return _rms(logits, self.logits)


def _rms(found: Sequence[float], truth: Sequence[float]) -> float:
    difference = torch.tensor(found, dtype=torch.float64) - torch.tensor(truth, dtype=torch.float64)
    return float(difference.square().mean().sqrt())


@torch.no_grad()
def read_last_logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Ask a model for its logits after the first few prompts.

    Args:
        model: transformers model; tokens beyond its vocabulary become its last one.
        prompts: token ids; only their beginnings are read.

    Returns:
        f64 [vocabulary] a prompt, on the CPU.

    Raises:
        UserError: model_not_runnable.
    """
    found = []
    known = model.config.get_text_config().vocab_size
    for prompt in prompts[:N_CANARY_PROMPTS]:
        ids = torch.tensor([prompt[:MAX_CANARY_TOKENS]], device=model.device)
        with running_on_text():
            output = model(input_ids=ids.clamp_max(known - 1), use_cache=False)
        found.append(output.logits[0, -1].double().cpu())
    return found


def make_canary(
    prompts: Sequence[Sequence[int]],
    rebuilt: Sequence[torch.Tensor],
    backbone: Sequence[torch.Tensor],
) -> Canary:
    """Keep the prompt on which reconstruction and backbone differ most.

    Args:
        prompts: token ids.
        rebuilt: the reconstruction's `read_last_logits` of them.
        backbone: the backbone's.

    Returns:
        The canary.
    """
    candidates = []
    for prompt, ours, theirs in zip(prompts, rebuilt, backbone, strict=False):
        known = min(len(ours), len(theirs))
        values, ids = ours[:known].topk(min(N_CANARY_LOGITS, known))
        candidates.append(
            Canary(
                version=CANARY_VERSION,
                tokens=tuple(prompt[:MAX_CANARY_TOKENS]),
                ids=tuple(ids.tolist()),
                logits=tuple(values.tolist()),
                backbone=tuple(theirs[ids].tolist()),
            )
        )
    return max(candidates, key=lambda canary: canary.backbone_error)


def read_canary(report: Path) -> Canary | None:
    """Find the canary of a verification report.

    Args:
        report: verification.json.

    Returns:
        The canary; None when the report has none, or one of a version that is not known here.

    Raises:
        ValueError: the report is no JSON, or its canary is not what its version says.
    """
    raw = json.loads(report.read_text(encoding="utf-8")).get("canary")
    if raw is None or raw.get("version") != CANARY_VERSION:
        return None
    try:
        canary = Canary(
            version=CANARY_VERSION,
            tokens=tuple(map(int, raw["tokens"])),
            ids=tuple(map(int, raw["ids"])),
            logits=tuple(map(float, raw["logits"])),
            backbone=tuple(map(float, raw["backbone"])),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"canary without {error}") from error
    if not canary.tokens or not len(canary.ids) == len(canary.logits) == len(canary.backbone) > 0:
        raise ValueError("canary without logits")
    return canary
