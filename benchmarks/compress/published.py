"""One decoder layer compressed the way the published code schedules it, to be timed.

Written from the description of the method's code (thunlp/Delta-CoMe, llama.py and run.sh): for each
of three rank bands, for each of four lists of matrices, one pass of the layer over all samples that
gathers the Hessians of V, GPTQ on V, one pass that gathers those of U, GPTQ on U; then a pass that
gives the states for the next band. That is 27 passes a layer. Every matrix keeps a Hessian of its
own, sums are fp32, and GPTQ works matrix by matrix and column by column with activation order.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.svd import truncated_svd
from deltacome_core.tensors import load_tensor

_LISTS = (
    ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"),
    ("self_attn.o_proj",),
    ("mlp.up_proj", "mlp.gate_proj"),
    ("mlp.down_proj",),
)
_BITS = (8, 3, 2)
_RANKS = {"self_attn": (2, 32, 968), "mlp": (2, 32, 1428)}
_GROUP = 128
_DAMPING = 0.01


@dataclass(slots=True)
class _Times:
    """Seconds by kind of work, the device waited for."""

    seconds: dict[str, float] = field(default_factory=dict)

    def measure(self, name: str, started: float) -> None:
        torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


class _Watched(nn.Module):
    """y = W x + U S V x of one band, keeping the sum of x x^T before V or before U."""

    def __init__(self, weight: torch.Tensor, factors: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.weight = weight
        self.left, self.sigma, self.right = (factor.to(weight.dtype) for factor in factors)
        self.watch = ""
        self.total: torch.Tensor | None = None

    def select(self, start: int, stop: int) -> "_Watched":
        band = self.left[:, start:stop], self.sigma[start:stop], self.right[start:stop]
        return _Watched(self.weight, band)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.watch == "v":
            self._add(x)
        inner = nn.functional.linear(x, self.right) * self.sigma
        if self.watch == "u":
            self._add(inner)
        return nn.functional.linear(x, self.weight) + nn.functional.linear(inner, self.left)

    def _add(self, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        if self.total is None:
            self.total = rows.new_zeros((rows.shape[1], rows.shape[1]))
        self.total += rows.T @ rows

    def take(self) -> torch.Tensor:
        total, self.total, self.watch = self.total, None, ""
        if total is None:
            raise RuntimeError("the layer did not run")
        return total


def gptq(values: torch.Tensor, hessian: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantise the rows of a matrix one column after another, as GPTQ's public code does.

    Args:
        values: float [rows, cols].
        hessian: float32 [cols, cols].
        bits: of the asymmetric grid; groups of 128 columns share one.

    Returns:
        The decoded values, float32.
    """
    work, hessian = values.float().clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    work[:, dead] = 0
    order = torch.argsort(hessian.diagonal(), descending=True)
    work, hessian = work[:, order], hessian[order][:, order]
    hessian.diagonal().add_(_DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    inverse = torch.linalg.cholesky(inverse, upper=True)
    result, top = torch.zeros_like(work), 2**bits - 1
    scale = zero = work.new_zeros(())
    for start in range(0, work.shape[1], _GROUP):
        stop = min(start + _GROUP, work.shape[1])
        block = work[:, start:stop].clone()
        errors = torch.zeros_like(block)
        for at in range(stop - start):
            if at == 0:
                low = block.amin(dim=1).clamp_max(0)
                high = block.amax(dim=1).clamp_min(0)
                scale = ((high - low) / top).clamp_min(1e-12)
                zero = torch.round(-low / scale)
            column, pivot = block[:, at], inverse[start + at, start + at]
            code = torch.clamp(torch.round(column / scale) + zero, 0, top)
            decoded = scale * (code - zero)
            result[:, start + at] = decoded
            error = (column - decoded) / pivot
            spread = inverse[start + at, start + at : stop]
            block[:, at:] -= error[:, None] @ spread[None]
            errors[:, at] = error
        work[:, stop:] -= errors @ inverse[start:stop, stop:]
    return result[:, torch.argsort(order)]


def _run(layer: Any, states: torch.Tensor, positions: Any) -> torch.Tensor:
    results = []
    for sample in states:
        output = layer(sample[None], position_embeddings=positions)
        results.append(output[0] if isinstance(output, tuple) else output[None])
    return torch.cat([result.reshape(1, *states.shape[1:]) for result in results])


@torch.no_grad()
def time_published_layer(folder: Path, *, n_samples: int, length: int) -> dict[str, Any]:
    """Run the published schedule on the first layer of a pair.

    Args:
        folder: holds `base` and `tuned`, written by write_pair.
        n_samples: calibration sequences.
        length: their tokens.

    Returns:
        Seconds by kind of work and in all for one layer, the decomposition in fp32 by `svd` as
        published included, and the number of passes.
    """
    device, times = torch.device("cuda"), _Times()
    base, tuned = open_checkpoint(folder / "base"), open_checkpoint(folder / "tuned")
    config = AutoConfig.from_pretrained(folder / "tuned", attn_implementation="sdpa")
    layer = LlamaDecoderLayer(config, 0).to(device=device, dtype=torch.bfloat16).eval()
    prefix, whole = "model.layers.0", {}
    for name in (name for names in _LISTS for name in names):
        old, new = (load_tensor(c, f"{prefix}.{name}.weight").to(device) for c in (base, tuned))
        delta = (new - old).float()
        started = time.perf_counter()
        torch.linalg.svd(delta, full_matrices=False)
        times.measure("decompose", started)
        rank = min(sum(_RANKS[name.partition(".")[0]]), *delta.shape)
        whole[name] = _Watched(old, truncated_svd(delta, rank))
    rotary = LlamaRotaryEmbedding(config).to(device)
    embed = load_tensor(tuned, "model.embed_tokens.weight").to(device)
    ids = torch.randint(len(embed), (n_samples, length), device=device)
    states = embed[ids]
    positions = rotary(states[:1], torch.arange(length, device=device)[None])
    passes = 0
    start = dict.fromkeys(whole, 0)
    for band, bits in enumerate(_BITS):
        parts = {}
        for name, module in whole.items():
            first = start[name]
            start[name] = first + _RANKS[name.partition(".")[0]][band]
            parts[name] = module.select(first, start[name])
            owner, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(owner), leaf, parts[name])
        for names in _LISTS:
            for side in ("v", "u"):
                for name in names:
                    parts[name].watch = side
                begun = time.perf_counter()
                _run(layer, states, positions)
                passes += 1
                times.measure("passes", begun)
                begun = time.perf_counter()
                for name in names:
                    _quantise_side(parts[name], side, bits)
                times.measure("gptq", begun)
        begun = time.perf_counter()
        _run(layer, states, positions)
        passes += 1
        times.measure("passes", begun)
        for name, part in parts.items():
            whole[name].weight = part.weight + (part.left * part.sigma) @ part.right
    return {
        "seconds_of_layer": sum(times.seconds.values()),
        "stages": times.seconds,
        "passes": passes,
    }


def _quantise_side(part: _Watched, side: str, bits: int) -> None:
    hessian = part.take()
    if side == "v":
        part.right = gptq(part.right, hessian, bits).to(part.right.dtype)
    else:
        part.left = gptq(part.left, hessian, bits).to(part.left.dtype)
