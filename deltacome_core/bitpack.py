"""Codes to words and back; the layout is specified in docs/format.md and lives in layout.py."""

from collections.abc import Callable

import torch

from deltacome_core.errors import InternalError
from deltacome_core.layout import PLANES, TILE_CODES, WORD_BITS, words_per_row

__all__ = ["PLANES", "pack_codes", "unpack_codes", "used_bits", "words_per_row"]

# Rows are handled in blocks of about this many codes, so that the int32 intermediates of a whole
# vocabulary do not need four bytes per code at once.
_BLOCK_CODES = 1 << 24


def _pack_tiles(codes: torch.Tensor, bits: int) -> torch.Tensor:
    rows, tiles, n = codes.shape
    planes = []
    shift = 0
    for width in PLANES[bits]:
        n_words = -(-n * width // WORD_BITS)
        fields = WORD_BITS // width
        padded = codes.new_zeros((rows, tiles, fields * n_words))
        padded[:, :, :n] = (codes >> shift) & ((1 << width) - 1)
        lanes = padded.view(rows, tiles, fields, n_words)
        shifts = torch.arange(0, WORD_BITS, width, dtype=torch.int32, device=codes.device)
        # Fields do not overlap, so that their sum is their union.
        planes.append((lanes << shifts[:, None]).sum(dim=2, dtype=torch.int32))
        shift += width
    return torch.cat(planes, dim=2).flatten(1)


def _unpack_tiles(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    rows, tiles, _ = words.shape
    codes = words.new_zeros((rows, tiles, n))
    shift = 0
    first = 0
    for width in PLANES[bits]:
        n_words = -(-n * width // WORD_BITS)
        fields = torch.arange(0, WORD_BITS, width, dtype=torch.int32, device=words.device)
        plane = words[:, :, first : first + n_words].unsqueeze(2)
        lanes = (plane >> fields[:, None]) & ((1 << width) - 1)
        codes |= lanes.flatten(2)[:, :, :n] << shift
        first += n_words
        shift += width
    return codes.flatten(1).to(torch.uint8)


def _by_row_blocks(
    source: torch.Tensor, n: int, convert: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    block_rows = max(1, _BLOCK_CODES // max(n, 1))
    return torch.cat([convert(block) for block in torch.split(source, block_rows)])


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes into words, tile by tile and plane by plane.

    Args:
        codes: integer [rows, n], each in 0 .. 2^bits - 1.
        bits: 1, 2, 3, 4 or 8.

    Returns:
        int32 [rows, words_per_row(n, bits)]; the bits of a uint32, unused fields 0.

    Raises:
        InternalError: a code does not fit.
    """
    rows, n = codes.shape
    if rows == 0 or n == 0:
        return torch.empty((rows, 0 if n == 0 else words_per_row(n, bits)), dtype=torch.int32)
    if int(codes.min()) < 0 or int(codes.max()) >= 1 << bits:
        raise InternalError(f"a code does not fit into {bits} bits")
    whole = n - n % TILE_CODES

    def convert(block: torch.Tensor) -> torch.Tensor:
        block = block.to(torch.int32)
        tiles = block[:, :whole].reshape(len(block), -1, TILE_CODES)
        parts = [_pack_tiles(tiles, bits)] if whole else []
        if whole < n:
            parts.append(_pack_tiles(block[:, whole:].unsqueeze(1), bits))
        return torch.cat(parts, dim=1)

    return _by_row_blocks(codes, n, convert)


def unpack_codes(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Undo `pack_codes`.

    Args:
        words: int32 [rows, words_per_row(n, bits)].
        bits: 1, 2, 3, 4 or 8.
        n: codes in a row.

    Returns:
        uint8 [rows, n] on the device of `words`.

    Raises:
        InternalError: the words do not have the width that n and bits demand.
    """
    rows, width = words.shape
    if width != words_per_row(n, bits):
        raise InternalError(f"{n} codes of {bits} bits do not lie in {width} words")
    if rows == 0 or n == 0:
        return torch.empty((rows, n), dtype=torch.uint8, device=words.device)
    whole = n - n % TILE_CODES
    whole_words = whole * bits // WORD_BITS

    def convert(block: torch.Tensor) -> torch.Tensor:
        tiles = block[:, :whole_words].reshape(len(block), -1, TILE_CODES * bits // WORD_BITS)
        parts = [_unpack_tiles(tiles, bits, TILE_CODES)] if whole else []
        if whole < n:
            parts.append(_unpack_tiles(block[:, whole_words:].unsqueeze(1), bits, n - whole))
        return torch.cat(parts, dim=1)

    return _by_row_blocks(words, n, convert)


def used_bits(n: int, bits: int) -> torch.Tensor:
    """Mark the bits of a packed row that belong to a code.

    Args:
        n: codes in the row.
        bits: 1, 2, 3, 4 or 8.

    Returns:
        int32 [words_per_row(n, bits)]; every other bit must be 0 in a valid file.
    """
    full = torch.full((1, n), (1 << bits) - 1, dtype=torch.uint8)
    return pack_codes(full, bits)[0]
