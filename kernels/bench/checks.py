"""What else a device must get right: embedding rows, prompts and merging, against float64."""

from typing import Any, Final

import torch
from torch.nn import functional

from deltacome_core.packed import PackedRows
from kernels.arena import ArenaSpec, DeltaArena
from kernels.bench.correctness import ROUNDED, exact_delta, measure_error
from kernels.bench.models import HUB, Pool
from kernels.dense import Unfolder, merge_site, multiply_prompt
from kernels.image import Site, build_image
from kernels.vocabulary import EmbeddingTable

_EXACT: Final = 2e-6
_WIDTH: Final = 4096
_ROWS: Final = 1000
_TOKENS: Final = 256
_N_SITES: Final = 6
# rank of the basis (0: rows are values), bits, codes that share a scale (0: all of a row)
_KINDS: Final = ((0, 4, 128), (0, 8, 0), (256, 8, 0), (131, 3, 0))


def _sum_up(name: str, errors: list[float], limit: float) -> dict[str, Any]:
    # The maximum of torch keeps a NaN, which then fails; Python's may lose it.
    error = float(torch.tensor(errors, dtype=torch.float64).max())
    return {"case": name, "error": error, "limit": limit, "passed": error <= limit}


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
        errors = [measure_error(y.cpu(), wanted)]
        if rows.basis is not None:
            x = torch.randn(33, _WIDTH, generator=generator)
            hidden = table.project(x.to(device), slots.to(device))
            through = (x.double() @ rows.basis.double().T) * (slots >= 0)[:, None]
            errors.append(measure_error(hidden.cpu(), through))
        name = f"embedding, {bits} bits, rank {rank}, group {group}"
        found.append(_sum_up(name, errors, _EXACT))
    return found


def check_dense(
    device: torch.device | str, *, dtype: torch.dtype = torch.bfloat16
) -> list[dict[str, Any]]:
    """Prompts and merging: sites one after the other in the two rooms of an unfolder, twice.

    Args:
        device: where the kernels run.
        dtype: of weights and inputs.

    Returns:
        One row for prompts and one for merging, the largest relative error over the sites.
    """
    outs = (_WIDTH, _WIDTH // 4)
    sites = tuple(
        Site(name=f"s{n}", parts=(f"a{n}", f"b{n}"), out_features=outs, in_features=_WIDTH)
        for n in range(_N_SITES)
    )
    delta = Pool(3).delta(sites, HUB)
    image = build_image(sites, delta)
    arena = DeltaArena(
        ArenaSpec.covering(sites, [image]), n_slots=1, device=device, operand_order=True
    )
    slot = arena.load(image)
    unfolder = Unfolder(arena, dtype=dtype)
    x = torch.randn(_TOKENS, _WIDTH, device=device).to(dtype)
    weights = [torch.randn(s.total_out, _WIDTH, device=device).to(dtype) for s in sites]
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
    errors: dict[str, list[float]] = {"prompt": [], "merge": []}
    for number, site in enumerate(sites):
        exact = torch.cat([exact_delta(delta[part].to(device)) for part in site.parts])
        whole = weights[number].double() + exact
        errors["prompt"].append(measure_error(prompts[number], x.double() @ whole.T))
        errors["merge"].append(measure_error(merged[number], whole))
    return [_sum_up(name, found, ROUNDED) for name, found in errors.items()]
