"""Resident deltas as plain matrices: prompts of hundreds of tokens, and whole fine-tunes."""

from dataclasses import dataclass
from functools import partial

import torch

from deltacome_core.errors import UserError
from kernels.arena import DeltaArena
from kernels.fragments import WORD_COLUMNS, words_of
from kernels.image import Image
from kernels.streams import side_stream


@dataclass(frozen=True, slots=True, kw_only=True)
class DensePart:
    """One matrix of a site: .25 left @ right, or .5 left, at outputs first_row and on.

    Values are doubled so that odd multiples of a half become whole numbers, exact in 16 bits.
    `hidden` says which rows of the site's right factors are this part's; None for a direct matrix.
    """

    first_row: int
    left: torch.Tensor
    hidden: slice | None

    @property
    def rows(self) -> slice:
        """Its outputs among those of the site."""
        return slice(self.first_row, self.first_row + len(self.left))


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSite:
    """A site's matrices that differ from the backbone's; right [hidden of all parts, in]."""

    parts: tuple[DensePart, ...]
    right: torch.Tensor


def _padded(size: int) -> int:
    return words_of(size) * WORD_COLUMNS


class Unfolder:
    """Room for the factors of two sites: one is filled while the other's are multiplied."""

    def __init__(self, arena: DeltaArena, *, dtype: torch.dtype) -> None:
        self.arena = arena
        self.dtype = dtype
        self._rooms: tuple[dict[str, torch.Tensor], ...] = ({}, {})
        # When each room was last read, and whether that was within the capture of a graph.
        self._read: list[tuple[torch.cuda.Event, bool] | None] = [None, None]
        self._turn = 0
        # The stream of the last `unfold`: asking torch for it costs as much as a launch.
        self._main: torch.cuda.Stream | None = None

    def _take(self, key: str, rows: int, columns: int) -> torch.Tensor:
        size = rows * columns
        rooms = self._rooms[self._turn]
        room = rooms.get(key)
        if room is None or room.numel() < size:
            room = torch.empty(size, dtype=self.dtype, device=self.arena.device)
            rooms[key] = room
            # Memory that the current stream may still be using for what it had there before.
            self._read[self._turn] = None
        return room[:size].view(rows, columns)

    def unfold(self, slot: int, site: int) -> DenseSite:
        """Unfold the factors of a site in one launch, over those of the site before the last.

        On a CUDA device this runs beside what the current stream still has to do, but after the
        delta was loaded; the current stream waits for it. In a graph it runs after what was queued.

        Args:
            slot: whose delta.
            site: number of the site.

        Returns:
            The matrices that differ from the backbone's, in the dtype of this unfolder; to be given
            back with `release`.

        Raises:
            UserError: arena_slot_unknown.
        """
        image = None if slot == -1 else self.arena.images[slot]
        if image is None:
            raise UserError("arena_slot_unknown", slot=slot, n_slots=self.arena.n_slots)
        device = self.arena.device
        self._main = torch.cuda.current_stream(device) if device.type == "cuda" else None
        where = self.arena.spec.sites[site]
        cuts = image.cuts[site]
        hidden = sum(0 if cut.is_direct else cut.columns for cut in cuts)
        widest = max((cut.columns for cut in cuts), default=0)
        left = self._take("left", where.total_out, _padded(widest))
        right = self._take("right", hidden, where.in_features)
        if cuts:
            self._launch(slot, site, image, left, right)
        parts = (
            DensePart(
                first_row=cut.first_row,
                left=left[cut.first_row : cut.first_row + cut.rows, : cut.columns],
                hidden=None if cut.is_direct else slice(cut.first, cut.first + cut.columns),
            )
            for cut in cuts
        )
        return DenseSite(parts=tuple(parts), right=right)

    def _launch(
        self, slot: int, site: int, image: Image, left: torch.Tensor, right: torch.Tensor
    ) -> None:
        from kernels.triton_ops.unfold import unfold

        spec = self.arena.spec
        launch = partial(
            unfold,
            self.arena.directory[slot, site],
            self.arena.table[slot:],
            left,
            right,
            n_shrink=len(image.needs[site].shrink_rows),
            n_parts=len(spec.sites[site].parts),
            widths=spec.widths(site),
            has_groups=spec.has_groups(site),
        )
        if self._main is None:
            launch()
            return
        side = side_stream(self.arena.device)
        self._wait_for_room(slot, side, self._main)
        with torch.cuda.stream(side):
            launch()
        self._main.wait_stream(side)

    def _wait_for_room(self, slot: int, side: torch.cuda.Stream, main: torch.cuda.Stream) -> None:
        capturing = torch.cuda.is_current_stream_capturing()
        read = self._read[self._turn]
        if read is None or read[1] or capturing:
            # Made just now, or events that are of one graph and not of another.
            side.wait_stream(main)
            return
        side.wait_event(read[0])
        loaded = self.arena.loaded[slot]
        if loaded is not None:
            side.wait_event(loaded)

    def release(self) -> None:
        """Say that what the last `unfold` gave has been read by all queued so far on its stream."""
        if self._main is not None:
            event = self._main.record_event()
            self._read[self._turn] = (event, torch.cuda.is_current_stream_capturing())
        self._turn = 1 - self._turn


def multiply_prompt(
    y: torch.Tensor, x: torch.Tensor, unfolder: Unfolder, slot: int, site: int
) -> torch.Tensor:
    """Add the delta of one tenant to the outputs of many of its tokens, in place.

    The factors are unfolded once and multiplied by the device's library: above a handful of tokens
    that beats reading codes once a group.

    Args:
        y: [tokens, out of all parts] in the unfolder's dtype.
        x: [tokens, in] in the same dtype.
        unfolder: of the arena.
        slot: the tokens' delta.
        site: number of the site.

    Returns:
        y; the delta term within 4e-3 of the exact one (relative L2) in bf16.

    Raises:
        UserError: arena_slot_unknown.
    """
    dense = unfolder.unfold(slot, site)
    hidden = x @ dense.right.T
    for part in dense.parts:
        own = y[:, part.rows]
        if part.hidden is None:
            torch.addmm(own, x, part.left.T, alpha=0.5, out=own)
        else:
            torch.addmm(own, hidden[:, part.hidden], part.left.T, alpha=0.25, out=own)
    unfolder.release()
    return y


def merge_site(
    weight: torch.Tensor, unfolder: Unfolder, slot: int, site: int, *, out: torch.Tensor
) -> torch.Tensor:
    """The fine-tune's weight at a site, W + U V or W + D.

    Args:
        weight: [out of all parts, in] of the backbone in the unfolder's dtype.
        unfolder: of the arena.
        slot: whose delta.
        site: number of the site.
        out: of the weight's shape, overwritten; not the weight, which stays the backbone's.

    Returns:
        out, within 4e-3 of the exact weight (relative L2) in bf16.

    Raises:
        UserError: arena_slot_unknown.
    """
    from kernels.triton_ops.launch_batch import current_arch
    from kernels.triton_ops.product import add_product

    dense = unfolder.unfold(slot, site)
    changed = set()
    for part in dense.parts:
        rows = part.rows
        changed.add(part.first_row)
        if part.hidden is None:
            torch.add(weight[rows], part.left, alpha=0.5, out=out[rows])
        else:
            add_product(
                weight[rows],
                part.left,
                dense.right[part.hidden],
                scale=0.25,
                arch=current_arch(),
                out=out[rows],
            )
    unfolder.release()
    first = 0
    for size in unfolder.arena.spec.sites[site].out_features:
        if first not in changed:
            out[first : first + size].copy_(weight[first : first + size])
        first += size
    return out
