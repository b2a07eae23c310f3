"""What a compression made and what it cost."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deltacome_core.costs import HostPeak, Stages
from deltacome_core.inspection import inspect_delta
from deltacome_core.manifest import CalibrationRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressReport:
    """What a compression made and what it cost; sizes count the whole delta.

    mode is "calibrated", "data-free" or "lossless". stages are seconds by stage: scan, calibrate,
    matrices (of which `wait` for reading), write, join; some run at once, so they do not add up.
    peak_host_bytes is anonymous memory: mapped files belong to the page cache. peak_gpu_bytes is
    what tensors took on the fullest device, peak_gpu_reserved_bytes what torch took from it for
    them; a CUDA context comes on top. n_matrices counts the quantised matrices, each slice of a
    stack as one; with_feedback of them were quantised with the Hessian of their input, the others
    by rounding alone.

    payload_bytes is that of the data files: 0 where the fine-tune equals the backbone.
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}


def make_report(
    out_dir: Path,
    *,
    seconds: float,
    stages: Stages,
    host: HostPeak,
    devices: Sequence[torch.device],
    mode: str,
    resumed_layers: int,
) -> CompressReport:
    """Look at a finished delta and at the counters of the run that made it.

    Args:
        out_dir: the delta.
        seconds: from start to end.
        stages: seconds by stage.
        host: peak of this process.
        devices: where units were made.
        mode: of the recipe.
        resumed_layers: parts of an earlier run.

    Returns:
        The report.
    """
    inspected = inspect_delta(out_dir)
    cards = [device for device in devices if device.type == "cuda"]
    calibration = inspected.manifest.calibration
    return CompressReport(
        out=out_dir,
        mode=mode,
        seconds=seconds,
        stages=stages.seconds,
        peak_host_bytes=host.bytes,
        peak_gpu_bytes=max(map(torch.cuda.max_memory_allocated, cards), default=0),
        peak_gpu_reserved_bytes=max(map(torch.cuda.max_memory_reserved, cards), default=0),
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
    )
