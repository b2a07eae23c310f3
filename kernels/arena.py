"""Resident deltas: slabs of one size on the device, their table, and what each site may ask."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from deltacome_core.errors import UserError
from deltacome_core.packed import PackedMatrix
from kernels.directory import ENTRY_INTS
from kernels.fragments import (
    STEP_WORDS,
    UNIT_BYTES,
    WORD_COLUMNS,
    count_pairs,
    words_of,
)
from kernels.image import Image, Site, SiteNeeds

# Rows a program may take: 16 for each of 1, 2 or 4 blocks of a warp, 1 to 8 warps, 1 to 8 turns.
PROGRAM_ROWS: Final = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Programs that share one job of the repacking; enough for the largest to fill a device.
_REPACK_PROGRAMS: Final = 64
REPACK_BLOCK: Final = 256
_N_STAGED: Final = 2
# Copies between a page-locked buffer and the device start at multiples of this.
SLAB_ALIGNMENT_BYTES: Final = 512


def count_matrix_words(matrix: PackedMatrix) -> int:
    """Words that the codes of one output take over all rank bands.

    Args:
        matrix: with a scale a vector.
    """
    return sum(band.u.bits * words_of(band.rank) for band in matrix.bands)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaSpec:
    """What an arena is built for: kernels are compiled, and graphs captured, for just this."""

    sites: tuple[Site, ...]
    slab_bytes: int
    needs: tuple[tuple[SiteNeeds, ...], ...]

    @classmethod
    def covering(cls, sites: Sequence[Site], images: Iterable[Image]) -> "ArenaSpec":
        """The least spec that takes each of the images.

        Args:
            sites: of the backbone, the same the images were built for.
            images: examples of what is to be resident, one a recipe.

        Returns:
            The spec.
        """
        images = list(images)
        slab_bytes = max(image.slab_bytes for image in images)
        return cls(
            sites=tuple(sites),
            slab_bytes=-(-slab_bytes // SLAB_ALIGNMENT_BYTES) * SLAB_ALIGNMENT_BYTES,
            needs=tuple(zip(*(image.needs for image in images), strict=True)),
        )

    @classmethod
    def allowing(
        cls,
        sites: Sequence[Site],
        *,
        slab_bytes: int,
        max_rank: int,
        max_words: int,
        widths: frozenset[int],
    ) -> "ArenaSpec":
        """A spec for any symmetric delta with a scale a vector, whatever its rank bands are.

        Recipes that fit bands to a spectrum choose others for each matrix of each fine-tune.

        Args:
            sites: of the backbone.
            slab_bytes: most bytes of a delta in operand order.
            max_rank: most ranks of a matrix over all its bands.
            max_words: most words that one output's codes take, of `count_matrix_words`.
            widths: bits that may occur.

        Returns:
            The spec; a few programs of a launch find nothing to do for it.
        """
        needs = []
        for site in sites:
            n_parts = len(site.parts)
            # However ranks are split, rounding up costs each band less than a word or a program.
            rounded = words_of(max_rank) + len(widths)
            rows = (rounded * WORD_COLUMNS, *[WORD_COLUMNS] * (len(widths) - 1))
            allowed = SiteNeeds(
                shrink_rows=rows * n_parts,
                hidden_pairs=count_pairs(-(-max_words // STEP_WORDS)) * n_parts,
                widths=widths,
                has_groups=False,
                has_several=False,
                has_direct=False,
                has_factors=False,
            )
            needs.append((allowed,))
        aligned = -(-slab_bytes // SLAB_ALIGNMENT_BYTES) * SLAB_ALIGNMENT_BYTES
        return cls(sites=tuple(sites), slab_bytes=aligned, needs=tuple(needs))

    def shrink_blocks(self, site: int, rows: int) -> int:
        """Programs a shrink at the site needs for any delta, at `rows` rows a program."""
        return max(needs.blocks(rows) for needs in self.needs[site])

    def hidden_pairs(self, site: int) -> int:
        """Pairs of steps of hidden values any delta has at the site."""
        return max(needs.hidden_pairs for needs in self.needs[site])

    def widths(self, site: int) -> frozenset[int]:
        """Bits of the codes any delta has at the site."""
        return frozenset().union(*(needs.widths for needs in self.needs[site]))

    def has_groups(self, site: int) -> bool:
        """Whether any delta has scales for tiles at the site."""
        return any(needs.has_groups for needs in self.needs[site])

    def is_plain(self, site: int) -> bool:
        """Whether every matrix of any delta at the site is one record without scales for tiles."""
        return not any(needs.has_groups or needs.has_several for needs in self.needs[site])

    def has_direct(self, site: int) -> bool:
        """Whether any delta has a direct matrix at the site."""
        return any(needs.has_direct for needs in self.needs[site])

    def has_factors(self, site: int) -> bool:
        """Whether any delta has scales for single outputs at the site."""
        return any(needs.has_factors for needs in self.needs[site])

    @property
    def all_widths(self) -> frozenset[int]:
        """Bits of the codes any delta has anywhere."""
        return frozenset().union(*(self.widths(site) for site in range(len(self.sites))))

    def _reason_against(self, site: int, needs: SiteNeeds) -> str | None:
        unknown = sorted(needs.widths - self.widths(site))
        if unknown:
            return f"codes of {unknown[0]} bits"
        if self.is_plain(site) and needs.has_groups:
            return "scales for tiles"
        if self.is_plain(site) and needs.has_several:
            return "rank bands with scales of their own"
        if needs.has_direct and not self.has_direct(site):
            return "direct matrices"
        if needs.has_factors and not self.has_factors(site):
            return "scales for single outputs"
        fits = needs.hidden_pairs <= self.hidden_pairs(site) and all(
            needs.blocks(rows) <= self.shrink_blocks(site, rows) for rows in PROGRAM_ROWS
        )
        return None if fits else "more rank bands or ranks"

    def check(self, image: Image) -> None:
        """Refuse an image the kernels were not compiled for.

        Args:
            image: the image.

        Raises:
            UserError: arena_recipe_unknown, arena_slab_unaligned.
        """
        reasons = []
        if image.slab_bytes > self.slab_bytes:
            reasons.append(f"{image.slab_bytes} bytes for slabs of {self.slab_bytes}")
        for number, needs in enumerate(image.needs):
            reason = self._reason_against(number, needs)
            if reason is not None:
                reasons.append(f"{reason} at {self.sites[number].name}")
                break
        if reasons:
            raise UserError("arena_recipe_unknown", name="the delta", reason=", ".join(reasons))


class DeltaArena:
    """Slabs of one size; slot numbers name them, -1 is the backbone.

    The table and the directory stay where they are, and so does every slab: a graph that was
    captured once serves whatever is loaded later.
    """

    def __init__(
        self,
        spec: ArenaSpec,
        *,
        n_slots: int,
        device: torch.device | str,
        slabs: Sequence[torch.Tensor] | None = None,
        operand_order: bool | None = None,
    ) -> None:
        self.spec = spec
        self.device = torch.device(device)
        if slabs is None:
            # Slabs of their own: one allocation of 64 GB need not be there in one piece.
            rows = [self._empty(spec.slab_bytes) for _ in range(n_slots)]
        else:
            rows = list(slabs)
        self._slabs = rows
        for number, slab in enumerate(rows):
            if slab.data_ptr() % UNIT_BYTES or len(slab) < spec.slab_bytes:
                raise UserError("arena_slab_unaligned", slot=number, boundary=UNIT_BYTES)
        addresses = torch.tensor([slab.data_ptr() for slab in rows], dtype=torch.int64)
        self.table = addresses.to(self.device)
        self.directory = torch.zeros(
            (n_slots, len(spec.sites), ENTRY_INTS), dtype=torch.int32, device=self.device
        )
        self.images: list[Image | None] = [None] * n_slots
        # When the bytes of each slot were there: for streams other than the one that loaded them.
        self.loaded: list[torch.cuda.Event | None] = [None] * n_slots
        self._staged: list[torch.Tensor] = []
        self._copies: Any = None
        # Without kernels nothing reads a slab: `kernels.reference` reads the images.
        is_cuda = self.device.type == "cuda"
        self.operand_order = is_cuda if operand_order is None else operand_order

    def _empty(self, size: int) -> torch.Tensor:
        # The allocator of a CPU aligns to 64 bytes only.
        room = torch.empty(size + UNIT_BYTES, dtype=torch.uint8, device=self.device)
        first = -room.data_ptr() % UNIT_BYTES
        return room[first : first + size]

    @property
    def n_slots(self) -> int:
        return len(self.images)

    @property
    def resident_slots(self) -> list[int]:
        return [slot for slot, image in enumerate(self.images) if image is not None]

    def check_slots(self, slots: Iterable[int]) -> None:
        """Refuse a slot that holds no delta.

        Args:
            slots: of the tokens, -1 for the backbone.

        Raises:
            UserError: arena_slot_unknown.
        """
        for slot in set(slots):
            if slot != -1 and not (0 <= slot < self.n_slots and self.images[slot] is not None):
                raise UserError("arena_slot_unknown", slot=slot, n_slots=self.n_slots)

    def load(self, image: Image) -> int:
        """Make a delta resident: copy its bytes once, put them in operand order on the device.

        Work is queued on the current stream of a CUDA device and not waited for.

        Args:
            image: of `build_image`, from page-locked memory to be fast.

        Returns:
            Its slot.

        Raises:
            UserError: arena_full, arena_recipe_unknown.
        """
        self.spec.check(image)
        if None not in self.images:
            raise UserError("arena_full", n_slots=self.n_slots)
        slot = self.images.index(None)
        self.images[slot] = image
        if self.operand_order:
            self._fill(slot, image)
        return slot

    def _fill(self, slot: int, image: Image) -> None:
        from kernels.triton_ops.launch_batch import launch_repack

        on_cuda = self.device.type == "cuda"
        self._stage(image)
        main = torch.cuda.current_stream(self.device) if on_cuda else None
        if main is not None and self._copies is None:
            self._copies = torch.cuda.Stream(self.device)
        read: list[Any] = [None] * _N_STAGED
        all_jobs = image.jobs.to(self.device, non_blocking=True)
        if main is not None:
            self._copies.wait_stream(main)
        for number, chunk in enumerate(image.chunks):
            staged = self._staged[number % _N_STAGED]
            if main is None:
                staged[: chunk.size].copy_(chunk.source)
            else:
                if read[number % _N_STAGED] is not None:
                    self._copies.wait_event(read[number % _N_STAGED])
                with torch.cuda.stream(self._copies):
                    staged[: chunk.size].copy_(chunk.source, non_blocking=True)
                main.wait_stream(self._copies)
            launch_repack(
                all_jobs[chunk.first_job : chunk.first_job + chunk.n_jobs],
                staged,
                self._slabs[slot],
                widths=self.spec.all_widths,
                programs=min(_REPACK_PROGRAMS, -(-chunk.n_elements // REPACK_BLOCK)),
                block=REPACK_BLOCK,
            )
            if main is not None:
                read[number % _N_STAGED] = main.record_event()
        self.directory[slot].copy_(image.directory, non_blocking=True)
        if main is not None:
            self.loaded[slot] = main.record_event()

    def _stage(self, image: Image) -> None:
        size = max((chunk.size for chunk in image.chunks), default=0)
        if not self._staged or len(self._staged[0]) < size:
            self._staged = [self._empty(size) for _ in range(_N_STAGED)]

    def copy_slot(self, source: int, target: int) -> None:
        """Make a second resident copy of a delta on the device.

        Args:
            source: slot of a resident delta.
            target: a free slot.

        Raises:
            UserError: arena_slot_unknown.
        """
        self.check_slots([source])
        self._slabs[target].copy_(self._slabs[source])
        self.directory[target].copy_(self.directory[source])
        self.images[target] = self.images[source]
        if self.device.type == "cuda":
            self.loaded[target] = torch.cuda.current_stream(self.device).record_event()

    def evict(self, slot: int) -> None:
        """Free a slot; its slab keeps its place and waits for the next delta.

        Args:
            slot: of `load`.

        Raises:
            UserError: arena_slot_unknown.
        """
        self.check_slots([slot])
        if slot == -1:
            raise UserError("arena_slot_unknown", slot=slot, n_slots=self.n_slots)
        self.images[slot] = None
        # A step that still names the slot finds no bands there and leaves the backbone's result.
        self.directory[slot].zero_()
