"""What is asked of the engine, judged from the rows."""

from collections.abc import Callable, Mapping
from typing import Any

Rows = Mapping[str, Any]


def _kernels_factor(rows: Rows) -> float:
    """Throughput at 32 tenants over that of one tenant, less what the kernels themselves cost."""
    many, one = rows["decode_32"], rows["decode_1"]
    return float(many["tokens_per_s"] / one["tokens_per_s"] * many["layers_ms"] / one["layers_ms"])


def _forecast_error(rows: Rows) -> float:
    memory = rows["all_tenants"]["memory"]
    return abs(float(memory["forecast"]["total_bytes"]) / float(memory["device_used_bytes"]) - 1)


def _first_token(rows: Rows) -> float:
    return max(float(run["first_token_s"]) for run in rows["cold"]["disk"])


def _same_answers(rows: Rows) -> float:
    found = rows["tokens_fp32"]
    return float(sum(found["same_answers"].values()) / sum(found["answers"].values()))


# Name, target, whether more is better, and how it is read from the rows.
BARS: tuple[tuple[str, float, bool, Callable[[Rows], float]], ...] = (
    ("greedy answers equal to dense checkpoints, fp32", 1.0, True, _same_answers),
    (
        "tenants resident within 80 GB and answering in one process",
        64,
        True,
        lambda rows: (
            rows["all_tenants"]["tenants"]
            if rows["all_tenants"]["memory"]["device_used_bytes"] <= 80e9  # noqa: PLR2004
            else 0
        ),
    ),
    ("memory against the forecast, relative error", 0.03, False, _forecast_error),
    ("32 tenants over one tenant x kernels' own factor", 0.9, True, _kernels_factor),
    ("64 registered over 8, same batch", 0.98, True, lambda rows: rows["flatness"]["ratio"]),
    ("cold delta from local disk to first token, s", 1.0, False, _first_token),
    (
        "own loop over the library's, backbone alone",
        0.8,
        True,
        lambda rows: rows["decode_0"]["whole_tokens_per_s"] / rows["library"]["whole_tokens_per_s"],
    ),
)


def judge(rows: Rows) -> list[dict[str, Any]]:
    """Every bar whose rows are there."""
    found = []
    for name, target, more_is_better, read in BARS:
        try:
            measured = float(read(rows))
        except (LookupError, ValueError, ZeroDivisionError):
            continue
        met = measured >= target if more_is_better else measured <= target
        found.append({"name": name, "target": target, "measured": measured, "met": met})
    return found
