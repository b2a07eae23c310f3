"""Tiny real checkpoints: a seeded Llama with a byte tokenizer, and fine-tunes of it."""

import json
import shutil

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = len(BYTES) + len(SPECIALS)


def make_tokenizer(*, chat=True):
    vocabulary = {token: number for number, token in enumerate([*BYTES, *SPECIALS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIALS[0],
        additional_special_tokens=list(SPECIALS[1:]),
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(*, seed=0, layers=2, tied=False, vocabulary=VOCABULARY, bias=False):
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        attention_bias=bias,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=len(BYTES),
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def tune(model, *, seed=1, rank=4, size=0.02, new_rows=0, everywhere=True):
    """Change a model as training does: low-rank steps in matrices, small ones everywhere else."""
    torch.manual_seed(seed)
    if new_rows:
        model.resize_token_embeddings(model.config.vocab_size + new_rows, mean_resizing=False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name and "head" not in name:
                step = torch.randn(weight.shape[0], rank) @ torch.randn(rank, weight.shape[1])
                weight.add_(step, alpha=size)
            elif everywhere:
                weight.add_(torch.randn(weight.shape), alpha=size)
    return model


def save(model, folder, *, dtype=torch.float32, chat=True, **kwargs):
    model.to(dtype).save_pretrained(folder, **kwargs)
    make_tokenizer(chat=chat).save_pretrained(folder)
    return folder


def write_calibration(folder, *, lines=40):
    texts = [{"text": f"line {n} says that {n} and {n} make {2 * n}. " * 8} for n in range(lines)]
    (folder / "calibration.jsonl").write_text("\n".join(map(json.dumps, texts)))


def write_evaluation(folder, *, items=4):
    rows = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(items)]
    (folder / "evaluation.jsonl").write_text("\n".join(map(json.dumps, rows)))


def copy(source, target):
    shutil.copytree(source, target)
    return target
