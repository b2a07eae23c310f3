"""Run every correctness case on the CUDA device: `python -m kernels.gpu_check [--json OUT]`.

Prints one object, or writes it to OUT; exits with 1 if a case failed or no device is there.
"""

import argparse
import json
import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

import kernels
from kernels.case_list import CASES, LARGE_CASES
from kernels.cases import Case, measure

DEVICE: Final = "cuda"


def check_case(
    case: Case, backend: kernels.Backend, *, device: torch.device | str
) -> dict[str, Any]:
    """Run one case and say how it went, whatever it does.

    Args:
        case: The case.
        backend: The implementation under test.
        device: Where it runs.

    Returns:
        The case's name, its error, and whether it passed; the exception if it raised one.
    """
    row: dict[str, Any] = {"case": str(case), "op": case.op, "passed": False}
    try:
        outcome = measure(case, backend, device=device)
    except Exception as error:  # noqa: BLE001 one broken case must not hide the others
        return row | {"exception": f"{type(error).__name__}: {error}"}
    return row | {
        "error": outcome.error,
        "error_limit": outcome.error_limit,
        "is_repeatable": outcome.is_repeatable,
        "stays_inside": outcome.stays_inside,
        "passed": outcome.is_correct,
    }


def check_cases(
    cases: Iterable[Case], backend: kernels.Backend, *, device: torch.device | str
) -> dict[str, Any]:
    """Run cases and sum them up.

    Args:
        cases: What to run.
        backend: The implementation under test.
        device: Where it runs.

    Returns:
        The rows of all cases, the largest error of each op, and whether all passed.
    """
    rows = [check_case(case, backend, device=device) for case in cases]
    max_errors: dict[str, float] = {}
    for row in rows:
        if "error" in row:
            max_errors[row["op"]] = max(row["error"], max_errors.get(row["op"], 0.0))
    n_failed = sum(not row["passed"] for row in rows)
    return {
        "max_errors": max_errors,
        "n_cases": len(rows),
        "n_failed": n_failed,
        "passed": bool(rows) and n_failed == 0,
        "cases": rows,
    }


def describe_device() -> dict[str, Any]:
    """The CUDA device and the versions that ran on it."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": metadata.version("triton"),
        },
    }


def main() -> int:
    """Run all cases on the CUDA device; 0 if all passed."""
    parser = argparse.ArgumentParser(prog="python -m kernels.gpu_check")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the object to this file")
    out: Path | None = parser.parse_args().json
    if not torch.cuda.is_available():
        sys.stderr.write("No CUDA device is available: nothing was checked.\n")
        return 1
    # cuBLAS may otherwise add parts of the backbone's term in 16 bits.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    report = describe_device() | check_cases((*CASES, *LARGE_CASES), kernels, device=DEVICE)
    text = json.dumps(report, indent=1) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text)
        failed = [row for row in report["cases"] if not row["passed"]]
        summary = {key: value for key, value in report.items() if key != "cases"}
        sys.stdout.write(json.dumps(summary | {"failed": failed}, indent=1) + "\n")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
