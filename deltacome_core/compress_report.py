"""What a compression made and what it cost."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deltacome_core.costs import HostPeak, Stages
from deltacome_core.distil import DistilReport
from deltacome_core.inspection import inspect_delta
from deltacome_core.manifest import CalibrationRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressReport:
    """What a compression made and what it cost; sizes count the whole delta.

    mode is "calibrated", "data-free" or "lossless". stages are seconds by stage: scan, calibrate,
    matrices (of which `wait` for reading), write, distil, join; some run at once, so they do not
    add up. peak_host_bytes is anonymous memory: mapped files belong to the page cache.
    peak_gpu_bytes is what tensors took on the fullest device, peak_gpu_reserved_bytes what torch
    took from it for them; a CUDA context comes on top. n_matrices counts the quantised matrices,
    each slice of a stack as one; with_feedback of them were quantised with the Hessian of their
    input, the others by rounding alone.

    payload_bytes is that of the data files: 0 where the fine-tune equals the backbone. distilled
    says what training gave, None for recipes that do not train.
    """

    out: Path
    mode: str
    seconds: float
    stages: dict[str, float]
    peak_host_bytes: int
    peak_gpu_bytes: int
    peak_gpu_reserved_bytes: int
    total_bytes: int
    payload_bytes: int
    ratio: float
    bits_per_param: float
    n_params: int
    entries: dict[str, int]
    n_matrices: int
    with_feedback: int
    calibration: CalibrationRecord | None
    resumed_layers: int
    distilled: DistilReport | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}


class Meter:
    """Counts what a run costs, from its making on."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._host = HostPeak()
        self._cards: list[torch.device] = []
        self.stages = Stages()

    @contextmanager
    def measuring(self, devices: Sequence[torch.device]) -> Iterator[None]:
        """Watch the memory of this process and of its cards until the block ends."""
        self._cards = [device for device in devices if device.type == "cuda"]
        for card in self._cards:
            torch.cuda.reset_peak_memory_stats(card)
        with self._host:
            yield

    def read(self) -> dict[str, Any]:
        """Give seconds, seconds by stage and peaks of memory, as CompressReport names them."""
        return {
            "seconds": time.monotonic() - self._started,
            "stages": self.stages.seconds,
            "peak_host_bytes": self._host.bytes,
            "peak_gpu_bytes": max(map(torch.cuda.max_memory_allocated, self._cards), default=0),
            "peak_gpu_reserved_bytes": max(
                map(torch.cuda.max_memory_reserved, self._cards), default=0
            ),
        }


def make_report(
    out_dir: Path,
    meter: Meter,
    *,
    mode: str,
    resumed_layers: int,
    distilled: DistilReport | None = None,
) -> CompressReport:
    """Look at a finished delta and at the counters of the run that made it.

    Args:
        out_dir: the delta.
        meter: counters of the run.
        mode: of the recipe.
        resumed_layers: parts of an earlier run.
        distilled: what training gave.

    Returns:
        The report.
    """
    inspected = inspect_delta(out_dir)
    calibration = inspected.manifest.calibration
    return CompressReport(
        out=out_dir,
        mode=mode,
        total_bytes=inspected.total_bytes,
        payload_bytes=inspected.payload_bytes,
        ratio=inspected.ratio,
        bits_per_param=inspected.bits_per_param,
        n_params=inspected.n_params,
        entries=inspected.entries_by_kind,
        n_matrices=inspected.n_matrices,
        with_feedback=0 if calibration is None else calibration.n_matrices,
        calibration=calibration,
        resumed_layers=resumed_layers,
        distilled=distilled,
        **meter.read(),
    )
