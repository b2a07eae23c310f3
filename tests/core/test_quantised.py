"""Checkpoints that a quantiser packed are refused with what to do instead."""

import pytest
import torch
from factories_core import llama_tensors, write_checkpoint

from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.compress import compress_checkpoint
from deltacome_core.errors import UserError
from deltacome_core.recipe import get_recipe

SITE = "model.layers.0.self_attn.q_proj"
INT = torch.zeros(6, 48, dtype=torch.int32)
SCALE = torch.ones(1, 48, dtype=torch.float16)
PACKED = {
    "GPTQ or AWQ": {f"{SITE}.qweight": INT, f"{SITE}.qzeros": INT, f"{SITE}.scales": SCALE},
    "compressed-tensors": {f"{SITE}.weight_packed": INT, f"{SITE}.weight_scale": SCALE},
    "fp8": {f"{SITE}.weight": INT, f"{SITE}.weight_scale_inv": SCALE},
    "bitsandbytes": {f"{SITE}.weight": INT, f"{SITE}.weight.absmax": SCALE},
    "mxfp4": {"model.layers.0.mlp.experts.down_proj_blocks": INT},
}


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("packer", sorted(PACKED))
def test_packed_weights_are_named_on_either_side(tmp_path, packer, side):
    plain = llama_tensors()
    packed = {name: values for name, values in plain.items() if not name.startswith(SITE)}
    pair = {"base": plain, "tuned": plain} | {side: packed | PACKED[packer]}
    folders = [write_checkpoint(tmp_path / name, tensors) for name, tensors in pair.items()]
    with pytest.raises(UserError) as caught:
        compress_checkpoint(*folders, tmp_path / "delta", get_recipe("datafree"))
    assert caught.value.code == "checkpoint_quantised"
    assert caught.value.params["packer"] == packer
    assert set(caught.value.params["tensors"]) <= set(PACKED[packer])
    assert "dequantised" in str(caught.value)
    assert open_checkpoint(folders[0]).tensors
