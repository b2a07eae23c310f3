"""Rows of tokens side by side, no more than a device has room for."""

from collections.abc import Iterator, Sequence
from typing import Protocol


class HasTokens(Protocol):
    """Whatever is padded to the length of its neighbours."""

    @property
    def tokens(self) -> Sequence[int]: ...


def cut_batches(
    rows: Sequence[HasTokens], chosen: Sequence[int], *, max_rows: int, max_tokens: int
) -> Iterator[list[int]]:
    """Cut rows into batches by their padded size, each of one row at least.

    Args:
        rows: all rows.
        chosen: some of them, in the order they are wanted in.
        max_rows: of a batch.
        max_tokens: of a batch, padding included.

    Yields:
        The rows of each batch.
    """
    batch: list[int] = []
    longest = 0
    for at in chosen:
        size = len(rows[at].tokens)
        longest = max(longest, size)
        if batch and (len(batch) == max_rows or longest * (len(batch) + 1) > max_tokens):
            yield batch
            batch, longest = [], size
        batch.append(at)
    if batch:
        yield batch
