"""Pages of the key-value cache: who holds which, and where the numbers lie."""

import threading
from typing import Any

import torch
from transformers import Cache

from deltacome_core.errors import InternalError

PAGE_TOKENS = 16


def pages_for(n_tokens: int) -> int:
    return -(-n_tokens // PAGE_TOKENS)


class PagePool:
    """Hands out pages by number. Page 0 is never given: padded rows write there."""

    def __init__(self, n_pages: int) -> None:
        self.capacity = n_pages
        self._free = list(range(n_pages, 0, -1))
        # Canaries are read by the threads that load.
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.capacity - self.free

    def take(self, count: int) -> list[int] | None:
        """Give `count` pages, or none at all when there are fewer."""
        with self._lock:
            if count > len(self._free):
                return None
            return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        with self._lock:
            self._free.extend(pages)
            if len(self._free) > self.capacity:
                raise InternalError("a page was given back twice")


class PagedCache(Cache):
    """Keys and values of every layer, [places, heads, width]; a place is page * 16 + offset.

    Layers are made when they are first written, since only the model knows their shapes. `places`
    says where the tokens of the running step go.
    """

    def __init__(self, n_pages: int) -> None:
        super().__init__(layers=[])
        self.n_places = (n_pages + 1) * PAGE_TOKENS
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.places = torch.zeros(0, dtype=torch.long)

    @property
    def token_bytes(self) -> int:
        """Bytes one token takes over the layers seen so far."""
        layers = [*self.keys.values(), *self.values.values()]
        return sum(layer[0].numel() * layer.element_size() for layer in layers)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's keys and values [1, heads, tokens, width] and give them back."""
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            rows = new[0].transpose(0, 1)
            if layer_idx not in kept:
                # Zeros and not what was in memory: padded rows read page 0.
                kept[layer_idx] = rows.new_zeros((self.n_places, *rows.shape[1:]))
            kept[layer_idx].index_copy_(0, self.places, rows)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0, **_kwargs: Any) -> int:
        """Positions are always given, so no model counts from here."""
        del layer_idx
        return 0
