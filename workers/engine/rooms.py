"""Sizes of the steps that a GPU runs, and the kernels that steps of these sizes launch."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from deltacome_core.packed import PackedRows
from kernels.arena import ArenaSpec
from kernels.vocabulary import EmbeddingTable
from kernels.wanted import ArenaKernels, Room, RowKernels, Wanted
from workers.engine.parts import TenantParts

# Rows that stand alone: graphs are captured, and plans made, for these sizes.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384)
# Rows of one tenant above which its factors are unfolded once instead of read for each row:
# unfolding costs 55 ms a tenant (7B, one H100), a row .3 (one H200).
PROMPT_ROWS = 128
# Rows of a prompt read the codes as those of an answer do, with the same kernels. More of them than
# there is room for are unfolded.
PROMPT_PLACES = (32, 128, 512, 2048)
# Sites of an arena after those of the layers: the head, and the head that reads coordinates.
N_HEADS = 2


def list_wanted(
    spec: ArenaSpec, parts: TenantParts, dtype: torch.dtype, *, planes: int
) -> list[Wanted]:
    """What is to be compiled before a delta answers.

    Args:
        spec: of the arena that takes it.
        parts: of the delta.
        dtype: of the backbone.
        planes: of `StepPlan`.
    """
    own = str(dtype).removeprefix("torch.")
    rooms = tuple(replace(room, planes=planes) for room in _list_rooms(len(spec.sites), own))
    wanted: list[Wanted] = [ArenaKernels(spec=spec, rooms=rooms, dtype=own)]
    tables = [table for table in (parts.embedding, parts.head) if isinstance(table, PackedRows)]
    for table in tables:
        if table.factor is None or (table is parts.head and table.basis is None):
            continue
        kind = EmbeddingTable.read_kind(table)
        if kind.has_basis:
            # Smaller bases are filled up.
            kind = replace(kind, width=spec.sites[-1].in_features)
        wanted.append(RowKernels(kind=kind, dtype=own))
    return list(dict.fromkeys(wanted))


def _list_rooms(n_sites: int, dtype: str) -> Iterator[Room]:
    head = n_sites - N_HEADS
    for n_tokens in BUCKETS:
        yield Room(
            first_site=0,
            last_site=head,
            n_tokens=n_tokens,
            is_whole=True,
            reads=dtype,
            writes=dtype,
        )
    for n_places in PROMPT_PLACES:
        yield Room(
            first_site=0,
            last_site=head,
            n_places=n_places,
            reads=dtype,
            writes=dtype,
        )
    # Coordinates are fp32, whatever the model is.
    for site, reads in ((head, dtype), (head + 1, "float32")):
        for n_tokens in BUCKETS:
            if n_tokens <= PROMPT_ROWS:
                yield Room(
                    first_site=site,
                    last_site=site + 1,
                    n_tokens=n_tokens,
                    reads=reads,
                    writes=dtype,
                )
