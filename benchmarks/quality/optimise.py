"""One training loop for full fine-tunes and adapters."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.quality.batches import Batch

WARMUP_SHARE = 0.1
LOSSES_KEPT = 20
MAX_GRADIENT_NORM = 1.0
Groups = list[dict[str, Any]]


def cosine(step: int, steps: int) -> float:
    warmup = max(1, int(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def answer_loss(model: Any, batch: Batch) -> Tensor:
    """Cross entropy of the answer tokens; other places never reach the head."""
    states = model.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(states.flatten(0, 1)[batch.places])
    return cross_entropy(logits.float(), batch.targets)


def optimise(model: Any, groups: Groups, batches: Iterable[Batch], *, steps: int) -> list[float]:
    """Run AdamW with a cosine schedule over parameter groups that set their own rate and decay.

    Returns:
        Some twenty losses, the first and the last among them.
    """
    device = groups[0]["params"][0].device
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
    parameters = [parameter for group in groups for parameter in group["params"]]
    every = max(1, steps // LOSSES_KEPT)
    kept: list[Tensor] = []
    model.train()
    for step, batch in enumerate(batches):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = answer_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == steps - 1:
            kept.append(loss.detach())
    model.eval()
    return [round(value, 4) for value in torch.stack(kept).tolist()]
