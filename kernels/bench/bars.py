"""The bars of the kernels' issue against what one run measured."""

from typing import Any, Final

from kernels.bench.models import HUB, LLAMA_7B
from kernels.fragments import PLANES

# name: (target, whether more is better)
TARGETS: Final[dict[str, tuple[float, bool]]] = {
    "delta term, 1 tenant, over PyTorch eager": (60, True),
    "delta term, 1 tenant, over torch.compile + CUDA graph": (6, True),
    "delta term, 32 tenants, over a BitDelta-style one-bit kernel": (12, True),
    "delta term, 32 tenants, over bf16 low-rank bmm": (4.5, True),
    "decode over base-only, 1 tenant, fast": (1.12, False),
    "decode over base-only, 8 tenants, fast": (1.75, False),
    "decode over base-only, 32 tenants, fast": (3.5, False),
    "decode over base-only, 1 tenant, exact": (1.15, False),
    "decode over base-only, 8 tenants, exact": (1.9, False),
    "decode over base-only, 32 tenants, exact": (4.2, False),
    "share of measured bandwidth, 8 tenants": (0.60, True),
    "share of measured bandwidth, 32 tenants": (0.75, True),
    "prefill of 2,048 tokens over base-only": (1.25, False),
    "Zipf mix over (base + distinct x per-tenant time), fast": (1.05, False),
    "Zipf mix over (base + distinct x per-tenant time), exact": (1.05, False),
    "host to GPU of one 7B delta, ms": (20, False),
    "merge of a whole 7B, ms": (40, False),
    "7B deltas in 80 GB": (64, True),
    "7B deltas in 80 GB beside 16 GB of KV": (50, True),
}
_MODES: Final = ("exact", "fast")


def _mode_of(row: dict[str, Any]) -> str:
    # Reports of earlier kernels have other numbers of bytes in fast mode.
    return "exact" if row["planes"] == PLANES else "fast"


def _find(rows: list[dict[str, Any]], *, n_tenants: int, mode: str) -> dict[str, Any]:
    return next(row for row in rows if (row["n_tenants"], _mode_of(row)) == (n_tenants, mode))


def _decode_bars(decode: list[dict[str, Any]], read_gbps: float) -> dict[str, float]:
    measured = {}
    for n_tenants in (1, 8, 32):
        noun = "tenant" if n_tenants == 1 else "tenants"
        for mode in _MODES:
            row = _find(decode, n_tenants=n_tenants, mode=mode)
            name = f"decode over base-only, {n_tenants} {noun}, {mode}"
            measured[name] = row["factor"]
            if n_tenants > 1 and mode == "exact":
                share = row["gbps"] / read_gbps
                measured[f"share of measured bandwidth, {n_tenants} tenants"] = share
    return measured


def measure_bars(results: dict[str, Any]) -> dict[str, float]:
    """What the sections of a run say about each bar.

    Args:
        results: sections by name; a section that failed is absent.

    Returns:
        Measured values by the names of TARGETS.
    """
    measured: dict[str, float] = {}
    decode = results.get("decode", [])
    if decode:
        measured |= _decode_bars(decode, results["ceilings"]["read_gbps"])
        one, many = (_find(decode, n_tenants=n, mode="exact")["term_us"] for n in (1, 32))
        base = results.get("baselines", {}) | results.get("compiled", {})
        for name, key, own in (
            ("delta term, 1 tenant, over PyTorch eager", "eager_us", one),
            ("delta term, 1 tenant, over torch.compile + CUDA graph", "compiled_graph_us", one),
            ("delta term, 32 tenants, over a BitDelta-style one-bit kernel", "binary_us", many),
            ("delta term, 32 tenants, over bf16 low-rank bmm", "bmm_us", many),
        ):
            if key in base:
                measured[name] = base[key] / own
    for row in results.get("zipf", []) if decode else ():
        at_32 = _find(decode, n_tenants=32, mode=_mode_of(row))
        per_tenant = (at_32["step_us"] - at_32["base_us"]) / 32
        modelled = row["base_us"] + row["n_tenants"] * per_tenant
        name = f"Zipf mix over (base + distinct x per-tenant time), {_mode_of(row)}"
        measured[name] = row["step_us"] / modelled
    for name, section, key, scale in (
        ("prefill of 2,048 tokens over base-only", "prefill", "factor", 1.0),
        ("host to GPU of one 7B delta, ms", "loading", "load_us", 1e-3),
        ("merge of a whole 7B, ms", "merge", "merge_us", 1e-3),
        ("7B deltas in 80 GB", "memory", "fits", 1.0),
        ("7B deltas in 80 GB beside 16 GB of KV", "memory", "fits_beside_kv", 1.0),
    ):
        if section in results:
            measured[name] = results[section][key] * scale
    return measured


def prefill_floor(rate: float) -> float:
    """Least time of a prompt over the backbone's alone, by operations, whatever the kernel.

    Products of the factors, or of merging them where a prompt has as many tokens as ranks, are of
    one order; bytes and unpacking are not counted.

    Args:
        rate: of the factors' products over the backbone's, 2 for one plane of int8.

    Returns:
        The factor.
    """
    base = factors = 0
    for site in LLAMA_7B.sites()[:4]:
        for out in site.out_features:
            rank = sum(band.rank for band in HUB.bands(out, site.in_features))
            base += out * site.in_features
            factors += rank * (out + site.in_features)
    return 1 + factors / base / rate


# name: what no kernel for the default recipe's bands can go below.
FLOORS: Final[dict[str, float]] = {"prefill of 2,048 tokens over base-only": prefill_floor(1)}


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a bar: name, target, measured, met, and the floor where one is known.

    Args:
        results: of `measure_bars`.

    Returns:
        The rows; a bar that was not measured is not met.
    """
    measured = measure_bars(results)
    rows = []
    for name, (target, more_is_better) in TARGETS.items():
        value = measured.get(name)
        met = value is not None and (value >= target if more_is_better else value <= target)
        floor = {"floor": FLOORS[name]} if name in FLOORS else {}
        rows.append({"name": name, "target": target, "measured": value, "met": met, **floor})
    return rows
