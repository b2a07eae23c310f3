"""A few logits that verification stored prove that a delta is really applied once it is loaded."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryResult:
    """What was proven; errors in logits, root mean square over the stored ones.

    state: "applied" (the served model gives the stored logits), "absent" (the delta brings none, or
    the model is a backbone), "indistinct" (the stored logits are as near to the backbone's as
    rounding is, so they prove nothing).
    """

    state: str
    error: float | None = None
    backbone_error: float | None = None

    @property
    def header(self) -> str:
        if self.error is None or self.backbone_error is None:
            return self.state
        return f"{self.state}; error={self.error:.2e}; backbone={self.backbone_error:.2e}"


UNTESTED = CanaryResult(state="absent")
