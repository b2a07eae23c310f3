"""Attention over a paged cache, as transformers calls it: one function for all its models."""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltacome_core.errors import UserError
from workers.engine.paging import PAGE_TOKENS, PagedCache

ATTENTION_NAME = "deltacome_paged"
# What some models hand to attention beyond a scale and a window; their results would be wrong here.
_UNKNOWN = ("s_aux", "softcap", "position_bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Rows first .. last of a step, which see `places` of the cache: all up to the last of them."""

    first: int
    last: int
    places: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRows:
    """The first rows of a step, each of which sees the tokens of its sequence up to itself.

    pages int32 [rows, pages of the longest], lengths int32 [rows].
    """

    pages: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """Rows that see about as many tokens each, for one call of torch's own attention.

    rows int64 [n]; places int64 [n, longest] of the cache; seen bool [n, longest], what is not
    seen fills up.
    """

    rows: torch.Tensor
    places: torch.Tensor
    seen: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionStep:
    """Rows that stand alone go by the kernel on CUDA, `decode`, and `together` elsewhere."""

    cache: PagedCache
    chunks: tuple[Chunk, ...]
    decode: DecodeRows | None = None
    together: tuple[Together, ...] = ()


def put_together(decode: DecodeRows) -> tuple[Together, ...]:
    """Group rows so that none is filled up to more than twice its length.

    Args:
        decode: rows of a step, on the CPU; pages that fill up hold numbers, whichever.

    Returns:
        All rows, once each.
    """
    groups: dict[int, list[int]] = {}
    lengths = decode.lengths.tolist()
    for row, length in enumerate(lengths):
        groups.setdefault(length.bit_length(), []).append(row)
    found = []
    for members in groups.values():
        rows = torch.tensor(members)
        longest = max(lengths[row] for row in members)
        pages = decode.pages[rows, : -(-longest // PAGE_TOKENS)].long()
        places = pages[..., None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)
        seen = torch.arange(longest) < decode.lengths[rows, None]
        found.append(Together(rows=rows, places=places.flatten(1)[:, :longest], seen=seen))
    return tuple(found)


_RUNNING = threading.local()


class running:  # noqa: N801  reads as a verb: `with running(step):`
    """Let the attention of this thread work on a step."""

    def __init__(self, step: AttentionStep) -> None:
        self._step = step

    def __enter__(self) -> None:
        _RUNNING.step = self._step

    def __exit__(self, *_: object) -> None:
        _RUNNING.step = None


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a step's rows; keys and values come from the cache, written just before.

    Args:
        module: the attention layer; its `layer_idx` names the layer of the cache.
        query: [1, heads, rows, width].
        key: not read.
        value: not read.
        attention_mask: None, what may be seen follows from the step.
        scaling: of the scores; 1 / sqrt(width) where it is None.
        dropout: 0.
        sliding_window: most positions a row looks back, itself included.
        kwargs: refused where they would change the result.

    Returns:
        [1, rows, heads, width] and no weights.

    Raises:
        UserError: architecture_unknown.
    """
    del key, value, attention_mask, dropout
    asked = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if asked:
        raise UserError("architecture_unknown", reason=f"its attention needs {asked[0]}")
    step: AttentionStep = _RUNNING.step
    keys, values = (part[module.layer_idx] for part in (step.cache.keys, step.cache.values))
    if keys.shape[2] != values.shape[2]:
        raise UserError("architecture_unknown", reason="its keys and values differ in width")
    output = query.new_empty((query.shape[2], query.shape[1], values.shape[2]))
    options: dict[str, Any] = {"scaling": scaling, "window": sliding_window}
    for group in step.together:
        singles = query[0, :, group.rows].transpose(0, 1)
        output[group.rows] = _attend_together(singles, keys, values, group, **options)
    if step.decode is not None:
        from workers.engine.paged_kernel import attend_decode

        n_decode = len(step.decode.lengths)
        singles = query[0, :, :n_decode].transpose(0, 1)
        attend_decode(singles, keys, values, step.decode, out=output[:n_decode], **options)
    for chunk in step.chunks:
        rows = slice(chunk.first, chunk.last)
        near, far = keys[chunk.places], values[chunk.places]
        output[rows] = _attend_chunk(query[:, :, rows], near, far, **options)
    return output[None], None


def _attend_together(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: Together,
    *,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attention of query [n, heads, width], one row a sequence; [n, heads, width of values]."""
    mask = group.seen
    if window is not None and window < mask.shape[1]:
        lengths = mask.sum(dim=1, keepdim=True)
        mask = mask & (torch.arange(mask.shape[1]) >= lengths - window)
    found = functional.scaled_dot_product_attention(
        query[:, :, None],
        keys[group.places].transpose(1, 2),
        values[group.places].transpose(1, 2),
        attn_mask=mask[:, None, None],
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return found[:, :, 0]


def _attend_chunk(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    n_rows, n_seen = query.shape[2], len(keys)
    mask: Any = None
    # A whole prompt needs no mask that is read from memory.
    is_whole = n_rows == n_seen and n_rows > 1
    if window is not None and window < n_seen:
        at = torch.arange(n_seen - n_rows, n_seen, device=query.device)[:, None]
        seen = torch.arange(n_seen, device=query.device)[None]
        mask = (seen <= at) & (seen > at - window)
    elif n_rows > 1 and not is_whole:
        mask = torch.ones((n_rows, n_seen), dtype=torch.bool, device=query.device)
        mask = mask.tril(n_seen - n_rows)
    found = functional.scaled_dot_product_attention(
        query,
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=is_whole and mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return found[0].transpose(0, 1)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged_attention)
