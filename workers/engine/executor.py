"""What runs the tokens of a step, whatever model they belong to."""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from workers.engine.paging import PAGE_TOKENS, PagePool


class TokenSource(Protocol):
    """What an executor knows of a sequence: its model, its tokens, and its part of the cache."""

    model: Any
    tokens: list[int]
    pages: list[int]
    cache: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Tokens start .. start + count of a sequence, of which the last `rows` want logits."""

    sequence: TokenSource
    start: int
    count: int
    rows: int

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens[self.start : self.start + self.count]


class Executor(Protocol):
    """`forward` gives f32 logits [sum of rows, vocabulary], in the order of the work.

    Where vocabularies differ the smaller ones are filled up with minus infinity. `is_async` says
    that the result is still being computed when `forward` returns; then `tokens`, int64 [work] on
    the device, may be given instead of those of the sequences, one for each item. `reads_pages`
    says that keys and values lie on the pages, where other sequences can read them. `prepare_step`
    makes one kind of step ready before it is asked for, in less than a second, and says whether it
    did: otherwise there is none left, or now is not the time.
    """

    pages: PagePool
    is_async: bool
    reads_pages: bool

    def forward(self, work: Many[Work], tokens: torch.Tensor | None = None) -> torch.Tensor: ...

    def evict(self, slot: int) -> None: ...

    def prepare_step(self) -> bool: ...


class PlainExecutor:
    """Runs a model of any architecture by its own code, one sequence after the other."""

    is_async = False
    reads_pages = False

    def __init__(self, module: Any, *, device: str, kv_bytes: int) -> None:
        self._module = module
        self._device = device
        self.pages = PagePool(max(1, kv_bytes // (PAGE_TOKENS * _token_bytes(module))))

    def evict(self, slot: int) -> None:
        """It has no slots: its one model goes with it."""

    def prepare_step(self) -> bool:
        return False

    @torch.inference_mode()
    def forward(self, work: Many[Work], tokens: torch.Tensor | None = None) -> torch.Tensor:
        del tokens
        return torch.cat([self._run(item) for item in work])

    def _run(self, item: Work) -> torch.Tensor:
        sequence = item.sequence
        if sequence.cache is None:
            sequence.cache = DynamicCache(config=self._module.config)
        output = self._module(
            input_ids=torch.tensor([item.tokens], device=self._device),
            past_key_values=sequence.cache,
            use_cache=True,
            logits_to_keep=max(1, item.rows),
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits[len(logits) - item.rows :]


def _token_bytes(module: Any) -> int:
    """Bytes of keys and values a token takes, by the model's configuration."""
    config = module.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * int(config.num_hidden_layers) * int(heads) * int(width)
    return max(1, numbers * int(module.dtype.itemsize))
