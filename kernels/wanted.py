"""What is to be compiled before a delta answers, in a form that another process can read."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kernels.arena import ArenaSpec
from kernels.fragments import PLANES
from kernels.image import Site, SiteNeeds
from kernels.vocabulary import RowKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Step plans of one size, the sites where they run, and dtypes of inputs and outputs there.

    n_tokens and n_places are those of a `StepPlan`, which has one of them. is_whole: the plan's
    tokens may be all of a step, so that the backbone's product runs beside the first stage.
    """

    first_site: int
    last_site: int
    n_tokens: int = 0
    n_places: int = 0
    planes: int = PLANES
    is_whole: bool = False
    reads: str
    writes: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaKernels:
    """Kernels of an arena: of loading, of its rooms, and of unfolding in a dtype."""

    spec: ArenaSpec
    rooms: tuple[Room, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RowKernels:
    """Kernels of packed vocabulary rows: adding them, and reading through a basis."""

    kind: RowKind
    dtype: str


Wanted = ArenaKernels | RowKernels


def dump_wanted(wanted: Wanted) -> str:
    """Write as JSON.

    Args:
        wanted: what to compile.

    Returns:
        The text; equal for equal arguments.
    """
    text = {"type": type(wanted).__name__} | asdict(wanted)
    return json.dumps(text, default=sorted, sort_keys=True)


def dump_request(wanted: Iterable[Wanted], *, arch: int) -> str:
    """Write what `python -m kernels.precompile` reads.

    Args:
        wanted: what to compile.
        arch: compute capability, 90 for Hopper.

    Returns:
        The JSON.
    """
    return json.dumps({"arch": arch, "wanted": [dump_wanted(one) for one in wanted]})


def parse_wanted(text: str) -> Wanted:
    """Read what `dump_wanted` wrote.

    Args:
        text: the JSON.

    Returns:
        What to compile.
    """
    found = json.loads(text)
    if found["type"] == RowKernels.__name__:
        return RowKernels(kind=RowKind(**found["kind"]), dtype=found["dtype"])
    spec = found["spec"]
    return ArenaKernels(
        spec=ArenaSpec(
            sites=tuple(_parse_site(site) for site in spec["sites"]),
            slab_bytes=spec["slab_bytes"],
            needs=tuple(tuple(_parse_needs(one) for one in needs) for needs in spec["needs"]),
        ),
        rooms=tuple(Room(**room) for room in found["rooms"]),
        dtype=found["dtype"],
    )


def _parse_site(found: dict[str, Any]) -> Site:
    lists = {name: tuple(found[name]) for name in ("parts", "out_features")}
    return Site(**found | lists)


def _parse_needs(found: dict[str, Any]) -> SiteNeeds:
    return SiteNeeds(
        **found | {"shrink_rows": tuple(found["shrink_rows"]), "widths": frozenset(found["widths"])}
    )


def name_wanted(wanted: Wanted, *, arch: int, compiler: str) -> str:
    """Name what the compiler would make of it.

    Args:
        wanted: what to compile.
        arch: compute capability, 90 for Hopper.
        compiler: its version.

    Returns:
        64 hexadecimal digits; others for other code in this package.
    """
    parts = (dump_wanted(wanted), str(arch), compiler, _digest_sources())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@cache
def _digest_sources() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*")):
        # Tables of shapes say what is compiled as much as code does.
        if file.suffix in {".py", ".json"}:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def distinct_sites(spec: ArenaSpec, sites: Iterable[int]) -> Sequence[int]:
    """One site of each kind: layers of one shape and one set of needs launch the same kernels.

    Args:
        spec: of an arena.
        sites: numbers of sites.

    Returns:
        Those of the numbers whose kernels differ, and perhaps some more.
    """
    found: dict[Any, int] = {}
    for site in sites:
        where = spec.sites[site]
        found.setdefault((where.out_features, where.in_features, spec.needs[site]), site)
    return list(found.values())
