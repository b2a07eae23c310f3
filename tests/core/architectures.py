"""One tiny model of each supported class, its fine-tune, and what its checkpoint should become."""

from dataclasses import dataclass

import finetunes
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

HIDDEN, INNER, LAYERS, EXPERTS = 64, 96, 2, 4
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": finetunes.VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": finetunes.VOCABULARY - 1,
    "pad_token_id": None,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 8,
}
HEADS = {"head_dim": 32}
MIXED = {"num_experts_per_tok": 2}
GPT2 = {
    "n_embd": 64,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 256,
    "vocab_size": finetunes.VOCABULARY,
    "bos_token_id": None,
    "eos_token_id": finetunes.VOCABULARY - 1,
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """n_matrices: low-rank ones of the language model's layers; others: those beside them."""

    config: str
    settings: dict
    n_matrices: int
    others: int = 0
    fused: bool = False


def text(config, n_matrices, *, fused=False, **settings):
    return Architecture(config=config, settings=TEXT | settings, n_matrices=n_matrices, fused=fused)


def seen(config, text_config, vision_config, others, **settings):
    nested = {
        "text_config": text_config.to_dict(),
        "vision_config": vision_config.to_dict(),
    }
    return Architecture(config=config, settings=nested | settings, n_matrices=14, others=others)


ARCHITECTURES = {
    "llama": text("LlamaConfig", 14),
    "mistral": text("MistralConfig", 14, sliding_window=64),
    "qwen2": text("Qwen2Config", 14),
    "qwen3": text("Qwen3Config", 14, **HEADS),
    "gemma": text("GemmaConfig", 14, **HEADS),
    "gemma2": text("Gemma2Config", 14, **HEADS, sliding_window=64),
    "gemma3_text": text("Gemma3TextConfig", 14, **HEADS, sliding_window=64),
    "phi": text("PhiConfig", 12),
    "phi3": text("Phi3Config", 8),
    "gpt2": Architecture(config="GPT2Config", settings=GPT2, n_matrices=8, others=1),
    "mixtral": text("MixtralConfig", 2 * (4 + 3 * EXPERTS), num_local_experts=EXPERTS, **MIXED),
    "mixtral_fused": text(
        "MixtralConfig", 2 * (4 + 2 * EXPERTS), fused=True, num_local_experts=EXPERTS, **MIXED
    ),
    "qwen2_moe": text(
        "Qwen2MoeConfig", 2 * (4 + 3 + 3 * EXPERTS), num_experts=EXPERTS, **MIXED,
        moe_intermediate_size=64, shared_expert_intermediate_size=64,
    ),
    "qwen3_moe": text(
        "Qwen3MoeConfig", 2 * (4 + 3 * EXPERTS), num_experts=EXPERTS, **MIXED, **HEADS,
        moe_intermediate_size=64,
    ),
    "gpt_oss": text(
        "GptOssConfig", 2 * (4 + 2 * EXPERTS), num_local_experts=EXPERTS, **MIXED, **HEADS,
        sliding_window=64,
    ),
    "llama4": text(
        "Llama4TextConfig", 2 * (4 + 3 + 2 * EXPERTS), num_local_experts=EXPERTS, **HEADS,
        intermediate_size_mlp=96,
    ),
    "qwen3_vl_moe": Architecture(
        config="Qwen3VLMoeConfig",
        settings={
            "text_config": TEXT | MIXED | HEADS | {
                "num_experts": EXPERTS,
                "moe_intermediate_size": INNER,
                "rope_parameters": {
                    "rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5],
                },
            },
            "vision_config": {
                "depth": 1, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4,
                "out_hidden_size": 64, "patch_size": 8, "spatial_merge_size": 2,
                "temporal_patch_size": 1, "num_position_embeddings": 36,
                "deepstack_visual_indexes": [0],
            },
        },
        n_matrices=2 * (4 + 2 * EXPERTS),
        others=4 + 2 + 2 + 1,
    ),
    "llava": seen(
        "LlavaConfig",
        transformers.LlamaConfig(**TEXT),
        transformers.CLIPVisionConfig(**VISION),
        2 * 6 + 1 + 2,
        image_token_index=255,
    ),
    "gemma3": seen(
        "Gemma3Config",
        transformers.Gemma3TextConfig(**TEXT, **HEADS),
        transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        2 * 6 + 1 + 1,
        mm_tokens_per_image=4,
    ),
}  # fmt: skip


# Classes beyond the table: what is kept in a form of its own, and what cannot answer to text.
RECURRENT = text("HrmTextConfig", 4, head_dim=16)
BIDIRECTIONAL = text("BertConfig", 12, is_decoder=True)
WITH_PICTURES_ONLY = Architecture(
    config="Blip2Config",
    settings={
        "text_config": transformers.OPTConfig(
            **TEXT, ffn_dim=96, word_embed_proj_dim=64
        ).to_dict(),
        "vision_config": transformers.Blip2VisionConfig(**VISION).to_dict(),
        "qformer_config": transformers.Blip2QFormerConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
            encoder_hidden_size=64,
        ).to_dict(),
        "num_query_tokens": 4,
        "image_token_index": 255,
    },
    n_matrices=12,
)  # fmt: skip


def make_model(chosen, *, seed=0):
    config = getattr(transformers, chosen.config)(**chosen.settings)
    seeing = type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto_class = AutoModelForImageTextToText if seeing else AutoModelForCausalLM
    torch.manual_seed(seed)
    return auto_class.from_config(config).eval()


def fine_tune(model, *, seed=1, size=0.005, same=()):
    """Move every weight: low-rank steps and noise in matrices and experts, noise in the rest."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in same):
                continue
            if weight.ndim in {2, 3}:
                *stack, rows, cols = weight.shape
                weight.add_(torch.randn(*stack, rows, 4) @ torch.randn(*stack, 4, cols), alpha=size)
            weight.add_(torch.randn(weight.shape), alpha=size / 4)
    return model


def save_pair(folder, chosen, *, dtype=torch.bfloat16, same=()):
    """Write base and fine-tune as transformers does; the fine-tune brings its own texts."""
    options = {"save_original_format": not chosen.fused}
    model = make_model(chosen)
    base = finetunes.save(model, folder / "base", dtype=dtype, **options)
    tuned = finetunes.save(
        fine_tune(model.float(), same=same), folder / "tuned", dtype=dtype, **options
    )
    (tuned / "calibration.txt").write_text(finetunes.CALIBRATION)
    finetunes.write_items(tuned / "evaluation.jsonl", finetunes.ITEMS[:2])
    return base, tuned
