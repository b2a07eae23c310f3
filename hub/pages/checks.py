"""A verification report in the order and words that a person reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    label: str
    ok: bool
    value: Any
    threshold: Any
    is_share: bool

    @property
    def sign(self) -> str:
        """Which side of the threshold passes: a share needs at least so much, a fault at most."""
        return "≥" if self.is_share else "≤"


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixError:
    name: str
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """What a grade demands; a delta below the last one is rejected."""

    name: str
    recovery: float
    ppl: float


GRADES = (
    Grade(name="A", recovery=0.98, ppl=0.005),
    Grade(name="B", recovery=0.95, ppl=0.01),
    Grade(name="C", recovery=0.90, ppl=0.02),
)

# Checks of a share, which is printed as one; all others measure or count a fault.
_SHARES = frozenset({"recovery"})
# Names that are too short to be read without knowing the code.
_LABELS = {"ppl_drift": "distance of the perplexity ratio from 1"}


def list_checks(report: Mapping[str, Any]) -> list[Check]:
    """Failing checks first, otherwise in the order of the report."""
    checks = [
        _check(found, name=found["name"], ok=found["ok"]) for found in report.get("checks", ())
    ]
    return sorted(checks, key=lambda check: check.ok)


def failed_check(params: Mapping[str, Any]) -> list[Check]:
    """The check that a rejection names, if it names one."""
    return [_check(params, name=params["check"], ok=False)] if "check" in params else []


def _check(found: Mapping[str, Any], *, name: str, ok: bool) -> Check:
    return Check(
        label=_LABELS.get(name, name.replace("_", " ")),
        ok=ok,
        value=found.get("value"),
        threshold=found.get("threshold"),
        is_share=name in _SHARES,
    )


def list_errors(report: Mapping[str, Any]) -> list[MatrixError]:
    """The relative error of each matrix that the report names, the largest first."""
    found = report.get("matrices") or report.get("worst_matrices") or ()
    errors = [MatrixError(name=item["name"], error=item["relative_error"]) for item in found]
    return sorted(errors, key=lambda item: -item.error)
