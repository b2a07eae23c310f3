"""What the engine does with deltas of other classes than Llama: right answers or a named refusal."""

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GPT2Config,
    GptOssConfig,
    HrmTextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
)

from deltacome_core.compress import compress_checkpoint
from deltacome_core.errors import UserError
from deltacome_core.inspection import inspect_delta
from deltacome_core.models import load_model
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint
from workers.engine.model import load_backbone, load_delta, measure_delta
from workers.engine.own_module import DeltaLinear

PROMPT = torch.tensor([[40, 41, 42, 200, 7, 8, 9]])
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": tiny.VOCABULARY,
    "max_position_embeddings": 256,
    "eos_token_id": tiny.VOCABULARY - 1,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def make_gpt2():
    config = GPT2Config(
        n_embd=64, n_layer=1, n_head=4, n_positions=256, vocab_size=tiny.VOCABULARY,
        eos_token_id=tiny.VOCABULARY - 1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def make_gpt_oss():
    return AutoModelForCausalLM.from_config(GptOssConfig(**TEXT, **EXPERTS, head_dim=32))


def make_mixtral():
    return AutoModelForCausalLM.from_config(MixtralConfig(**TEXT, **EXPERTS))


def make_llava():
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        image_size=32, patch_size=8,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT), vision_config=vision, image_token_index=255
    )
    return LlavaForConditionalGeneration(config)


def make_hrm():
    return AutoModelForCausalLM.from_config(HrmTextConfig(**TEXT, head_dim=16))


MAKERS = [make_gpt2, make_gpt_oss, make_mixtral, make_llava]


def make_delta(folder, make, recipe):
    torch.manual_seed(0)
    model = make().eval()
    tiny.save(model, folder / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape), alpha=0.005)
    tiny.save(model, folder / "tuned")
    tiny.write_calibration(folder / "tuned")
    chosen = get_recipe(recipe, matrix_bits=4.0)
    compress_checkpoint(folder / "base", folder / "tuned", folder / "delta", chosen)
    return folder


@pytest.mark.parametrize("recipe", ["come", "datafree"])
@pytest.mark.parametrize("make", MAKERS)
def test_every_class_is_served_as_it_is_rebuilt(tmp_path, make, recipe):
    folder = make_delta(tmp_path, make, recipe)
    backbone = load_backbone(folder / "base", device="cpu")
    served = load_delta(backbone, folder / "base", folder / "delta", factor_bytes=0)
    reconstruct_checkpoint(folder / "base", folder / "delta", folder / "rebuilt")
    with torch.inference_mode():
        ours = served.module(PROMPT).logits
        theirs = load_model(folder / "rebuilt")(PROMPT).logits
        backbones = backbone.module(PROMPT).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (backbones - theirs).norm() > 0.01 * theirs.norm()
    packed = inspect_delta(folder / "delta").total_bytes
    assert packed < served.size_bytes <= measure_delta(folder / "delta", backbone)


def test_linear_layers_beside_stacks_stay_packed(tmp_path):
    folder = make_delta(tmp_path, make_gpt_oss, "come")
    backbone = load_backbone(folder / "base", device="cpu")
    served = load_delta(backbone, folder / "base", folder / "delta", factor_bytes=0)
    packed = [n for n, m in served.module.named_modules() if isinstance(m, DeltaLinear)]
    assert len(packed) == 4


def test_a_tensor_the_model_does_not_have_is_refused_by_name(tmp_path):
    """HRM keeps q, k and v as one tensor in its files, which the engine cannot cut."""
    folder = make_delta(tmp_path, make_hrm, "datafree")
    backbone = load_backbone(folder / "base", device="cpu")
    with pytest.raises(UserError) as caught:
        load_delta(backbone, folder / "base", folder / "delta", factor_bytes=0)
    assert caught.value.code == "architecture_unknown"
    assert "gqkv_proj.weight" in caught.value.params["reason"]
