"""Base and fine-tune in, delta folder out. Layers that are on disk already are not done again."""

import shutil
from itertools import count
from typing import Any

from deltacome_core.budget import Budget
from deltacome_core.compress import compress_checkpoint
from deltacome_core.errors import UserError
from deltacome_core.inspection import inspect_delta
from deltacome_core.recipe import get_recipe
from deltacome_core.units import LayerDone
from workers.devices import pick_device
from workers.report import Report
from workers.spec import StepSpec


def run(spec: StepSpec, report: Report) -> dict[str, Any]:
    """Write the delta of `spec.tuned` over `spec.backbone` into `spec.delta`."""
    finished = count(1)

    def on_layer(layer: LayerDone) -> None:
        # Of a layer that was on disk already neither error nor time is known.
        detail: dict[str, str | float] = {"from": "an earlier attempt"}
        if not layer.resumed:
            detail = {"relative_error": layer.relative_error, "seconds": layer.seconds}
        report.progress(done=next(finished), total=layer.n_layers, layer=layer.group, **detail)

    def on_step(done: int, total: int) -> None:
        report.progress(done=done, total=total, stage="training")

    if not _is_whole(spec):
        shutil.rmtree(spec.delta, ignore_errors=True)
        made = compress_checkpoint(
            spec.backbone,
            spec.tuned,
            spec.delta,
            get_recipe(spec.recipe),
            budget=Budget.of_bits(spec.bits_per_param),
            device=pick_device(spec.device),
            on_layer=on_layer,
            on_step=on_step,
        )
        if made.distilled is not None:
            report.log(made.distilled.describe())
    return {"size": inspect_delta(spec.delta).to_json()}


def _is_whole(spec: StepSpec) -> bool:
    """An earlier attempt may have been ended after its last layer, before anyone was told."""
    try:
        inspect_delta(spec.delta, verify_digests=True)
    except (UserError, OSError):
        return False
    return True
