"""What a child is told. It crosses a process border as JSON, so it holds names and numbers only."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A backbone the fine-tune may have come from; `folder` holds its files."""

    revision: str
    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpec:
    """One attempt of one step, as its child sees it.

    Folders are inside `workspace`. `limits` of 0 bytes mean none.
    """

    step: str
    kind: str
    workspace: Path
    parent_pid: int
    device: str
    recipe: str = ""
    bits_per_param: float | None = None
    candidates: tuple[Candidate, ...] = ()
    address_bytes: int = 0
    file_bytes: int = 0

    @property
    def tuned(self) -> Path:
        """The uploaded checkpoint: a fine-tune, or a backbone to be."""
        return self.workspace / "tuned"

    @property
    def backbone(self) -> Path:
        return self.workspace / "backbone"

    @property
    def delta(self) -> Path:
        """Where the compress step writes."""
        return self.workspace / "delta"

    @property
    def made(self) -> Path:
        """The delta as it was stored: what later steps judge and publish."""
        return self.workspace / "made"

    @property
    def reports(self) -> Path:
        return self.workspace / "reports"


def write_spec(spec: StepSpec, path: Path) -> None:
    path.write_text(json.dumps(dataclasses.asdict(spec), default=str))


def read_spec(path: Path) -> StepSpec:
    raw = json.loads(path.read_text())
    raw["workspace"] = Path(raw["workspace"])
    raw["candidates"] = tuple(Candidate(**item) for item in raw["candidates"])
    return StepSpec(**raw)
