"""Token ids to text, one token at a time, and the strings that end an answer."""

from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Releases text as soon as it is certain: whole characters, and no beginning of a stop string.

    A token may be half a character and the spaces a token stands for may depend on its neighbours,
    so a small window is decoded again with each token and the growth is released.
    """

    def __init__(self, tokenizer: Any, stops: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._ids: list[int] = []
        self._window = 0
        self._read = 0
        self._held = ""
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        return self.stopped_by is not None

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        before = self._decode(self._ids[self._window : self._read])
        after = self._decode(self._ids[self._window :])
        if after.endswith(_UNFINISHED):
            return ""
        self._window, self._read = self._read, len(self._ids)
        return self._release(after[len(before) :])

    def flush(self) -> str:
        """Release what was held back: the answer ended without completing a stop string."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._window : self._read])
        rest = self._decode(self._ids[self._window :])[len(before) :]
        self._window = self._read = len(self._ids)
        text = self._release(rest)
        # Empty when the last token completed a stop string after all.
        rest, self._held = self._held, ""
        return text + rest

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _release(self, text: str) -> str:
        text = self._held + text
        ends = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            at, self.stopped_by = min(ends)
            self._held = ""
            return text[:at]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
