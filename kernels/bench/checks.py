"""What else a device must get right: embedding rows, prompts and merging, against float64."""

from typing import Any, Final

import torch
from torch.nn import functional

from deltacome_core.packed import PackedRows
from kernels.arena import ArenaSpec, DeltaArena
from kernels.bench.correctness import ROUNDED, exact_delta
from kernels.bench.models import HUB, Pool
from kernels.dense import Unfolder, merge_site, multiply_prompt
from kernels.image import Site, build_image
from kernels.vocabulary import EmbeddingTable

_EXACT: Final = 2e-6
_WIDTH: Final = 4096
_ROWS: Final = 1000
# rank of the basis (0: rows are values), bits, codes that share a scale (0: all of a row)
_KINDS: Final = ((0, 4, 128), (0, 8, 0), (256, 8, 0), (131, 3, 0))


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def _draw_rows(rank: int, bits: int, group: int) -> PackedRows:
    generator = torch.Generator().manual_seed(rank + bits)
    changed = torch.rand(_ROWS, generator=generator) < 0.7  # noqa: PLR2004 most rows
    basis = torch.randn(rank, _WIDTH, generator=generator).bfloat16() if rank else None
    return PackedRows(
        name="embed",
        rows=_ROWS,
        cols=_WIDTH,
        changed=changed,
        factor=Pool(bits).factor(
            int(changed.sum()), rank or _WIDTH, bits=bits, group=(1, group), symmetric=not group
        ),
        new_rows=None,
        basis=basis,
    )


def check_vocabulary(device: torch.device | str) -> list[dict[str, Any]]:
    """Embedding rows of every kind, and inputs of a head read through a basis.

    Args:
        device: where the kernels run.

    Returns:
        One row a kind, with its relative error and whether it passed.
    """
    found = []
    for rank, bits, group in _KINDS:
        rows = _draw_rows(rank, bits, group)
        table = EmbeddingTable(n_slots=2, like=rows, device=device)
        table.put(1, rows)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(_ROWS, (33,), generator=generator, dtype=torch.int32)
        slots = torch.ones(33, dtype=torch.int32)
        slots[::5] = -1
        wanted = rows.dequantise().double()[ids.long()] * (slots >= 0)[:, None]
        y = table.add_rows(torch.zeros(33, _WIDTH, device=device), ids.to(device), slots.to(device))
        error = _relative(y.cpu(), wanted)
        if rows.basis is not None:
            x = torch.randn(33, _WIDTH, generator=generator)
            hidden = table.project(x.to(device), slots.to(device))
            through = (x.double() @ rows.basis.double().T) * (slots >= 0)[:, None]
            error = max(error, _relative(hidden.cpu(), through))
        name = f"embedding, {bits} bits, rank {rank}, group {group}"
        found.append({"case": name, "error": error, "limit": _EXACT, "passed": error <= _EXACT})
    return found


def check_dense(device: torch.device | str) -> list[dict[str, Any]]:
    """Prompts and merging: six sites one after the other in the two rooms of an unfolder, twice.

    Args:
        device: where the kernels run.

    Returns:
        One row for prompts and one for merging, the largest relative error over the sites.
    """
    outs = (_WIDTH, _WIDTH // 4)
    sites = tuple(
        Site(name=f"s{n}", parts=(f"a{n}", f"b{n}"), out_features=outs, in_features=_WIDTH)
        for n in range(6)
    )
    delta = Pool(3).delta(sites, HUB)
    image = build_image(sites, delta)
    arena = DeltaArena(ArenaSpec.covering(sites, [image]), n_slots=1, device=device)
    slot = arena.load(image)
    unfolder = Unfolder(arena, dtype=torch.bfloat16)
    x = torch.randn(256, _WIDTH, device=device).bfloat16()
    weights = [torch.randn(s.total_out, _WIDTH, device=device).bfloat16() for s in sites]
    prompts, merged = [], []
    for _ in range(2):
        # Nothing waits in between: a room that is filled too early would be seen.
        prompts = [
            multiply_prompt(functional.linear(x, weight), x, unfolder, slot, number)
            for number, weight in enumerate(weights)
        ]
        merged = [
            merge_site(weight, unfolder, slot, number, out=torch.empty_like(weight))
            for number, weight in enumerate(weights)
        ]
    errors = {"prompt": 0.0, "merge": 0.0}
    for number, site in enumerate(sites):
        exact = torch.cat([exact_delta(delta[part].to(device)) for part in site.parts])
        whole = weights[number].double() + exact
        errors["prompt"] = max(errors["prompt"], _relative(prompts[number], x.double() @ whole.T))
        errors["merge"] = max(errors["merge"], _relative(merged[number], whole))
    return [
        {"case": name, "error": error, "limit": ROUNDED, "passed": error <= ROUNDED}
        for name, error in errors.items()
    ]
