"""Pages of the key-value cache: who holds which, and where the numbers lie."""

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import Cache

from deltacome_core.errors import InternalError

PAGE_TOKENS = 16


def pages_for(n_tokens: int) -> int:
    return -(-n_tokens // PAGE_TOKENS)


def extend_keys(keys: list[bytes], owner: str, tokens: Sequence[int], n_pages: int) -> None:
    """Append the names of the first full pages of a text that are not there yet.

    A name is a digest of the owner and of all tokens up to the page's end, since keys and values
    depend on every token before them.

    Args:
        keys: names so far, one a page.
        owner: whose weights read the text.
        tokens: of the text; 16 * n_pages of them at least.
        n_pages: how many names there shall be.
    """
    for number in range(len(keys), n_pages):
        own = tokens[number * PAGE_TOKENS : (number + 1) * PAGE_TOKENS]
        before = keys[-1] if keys else owner.encode()
        words = array("q", own).tobytes()
        keys.append(hashlib.blake2b(before + b"\0" + words, digest_size=16).digest())


class PagePool:
    """Hands out pages by number. Page 0 is never given: padded rows write there.

    A page whose tokens are known by name keeps its numbers when nobody holds it any more, until
    the room is needed: texts that begin alike are read once.
    """

    def __init__(self, n_pages: int) -> None:
        self.capacity = n_pages
        self._free = list(range(n_pages, 0, -1))
        self._holders = [0] * (n_pages + 1)
        self._pages: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        # Pages with a name and no holder, the ones to be taken first in front.
        self._idle: OrderedDict[int, None] = OrderedDict()
        # Canaries are read by the threads that load.
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        return self.capacity - self.free

    def take(self, count: int) -> list[int] | None:
        """Give `count` pages, or none at all when there are fewer."""
        with self._lock:
            if count > self.free:
                return None
            pages = [self._free.pop() if self._free else self._take_idle() for _ in range(count)]
            for page in pages:
                self._holders[page] = 1
            return pages

    def _take_idle(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._pages[self._names.pop(page)]
        return page

    def name(self, page: int, key: bytes) -> None:
        """Say what a held page holds; the first page of a name is the one that is found."""
        with self._lock:
            if key not in self._pages and page not in self._names:
                self._pages[key] = page
                self._names[page] = key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Hold the pages of as many of these names, from the first on, as are there."""
        with self._lock:
            pages: list[int] = []
            for key in keys:
                page = self._pages.get(key)
                if page is None:
                    break
                self._holders[page] += 1
                self._idle.pop(page, None)
                pages.append(page)
            return pages

    def give_back(self, pages: list[int]) -> None:
        """Hold these pages no more.

        Raises:
            InternalError: one of them is not held.
        """
        with self._lock:
            # The end of a text goes before its beginning: that is of use to more.
            for page in reversed(pages):
                if not self._holders[page]:
                    raise InternalError("a page was given back twice")
                self._holders[page] -= 1
                if self._holders[page]:
                    continue
                if page in self._names:
                    self._idle[page] = None
                else:
                    self._free.append(page)


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
