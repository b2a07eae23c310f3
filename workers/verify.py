"""Rebuild the fine-tune from the packed bytes and hold it against the original."""

from typing import Any

from deltacome_core.verify import save_report, verify_delta
from workers.devices import pick_device
from workers.report import Report
from workers.spec import StepSpec


def run(spec: StepSpec, report: Report) -> dict[str, Any]:
    """Write the report; `failed` describes the first check that does not hold, or is None."""
    report.log("rebuilding the fine-tune from the packed bytes")
    found = verify_delta(spec.backbone, spec.tuned, spec.made, device=pick_device(spec.device))
    save_report(found, spec.reports)
    failing = next((check for check in found.checks if not check.ok), None)
    return {
        "verification": found.to_json(),
        "failed": None
        if failing is None
        else {"check": failing.name, "value": failing.value, "threshold": failing.threshold},
    }
