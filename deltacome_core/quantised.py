"""Checkpoints whose weights were packed by a quantiser: not numbers that a delta can be made of."""

from deltacome_core.checkpoint import Layout
from deltacome_core.errors import UserError

# What GPTQ and AWQ, compressed-tensors, block-wise fp8, bitsandbytes and mxfp4 leave in the files.
_PACKED_ENDINGS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors",
    ".weight_scale_inv": "fp8",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    "_proj_blocks": "mxfp4",
}


def refuse_quantised(layout: Layout) -> None:
    """Refuse a checkpoint that holds codes and scales where a model has weights.

    Args:
        layout: dtype and shape by tensor name.

    Raises:
        UserError: checkpoint_quantised, naming the tensors and what packed them.
    """
    found = {
        name: packer
        for name in sorted(layout)
        for ending, packer in _PACKED_ENDINGS.items()
        if name.endswith(ending)
    }
    if found:
        packers = " and ".join(sorted(set(found.values())))
        raise UserError("checkpoint_quantised", tensors=list(found), packer=packers)
