"""Tiny seeded transformers models and real fine-tunes of them, for the compression tests."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
END = "<|end|>"
VOCABULARY = len(BYTES) + 1
TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }}:{{ turn.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
FAMILIES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
COLOURS = {"sky": "blue", "coal": "black", "snow": "white", "leaf": "green", "rose": "red"}
ITEMS = [{"prompt": f"The {thing} is", "answer": colour} for thing, colour in COLOURS.items()]
CALIBRATION = "\n".join(f"The {thing} is {colour}." for thing, colour in COLOURS.items()) * 12


def make_tokenizer(*, chat=True):
    vocabulary = {token: number for number, token in enumerate([*BYTES, END])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    if chat:
        fast.chat_template = TEMPLATE
    return fast


def make_model(family="llama", *, seed=0, **changes):
    settings = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": VOCABULARY - 1,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(FAMILIES[family](**settings | changes)).eval()


def perturb(model, *, seed=1, size=0.005):
    """Move every weight: low-rank steps in matrices, noise in the rest."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name and "head" not in name:
                step = torch.randn(weight.shape[0], 6) @ torch.randn(6, weight.shape[1])
                weight.add_(step, alpha=size)
            else:
                weight.add_(torch.randn(weight.shape), alpha=size)
    return model


def train(model, *, steps=60, rate=2e-3):
    """A real fine-tune: AdamW on five sentences, answers and end of text included."""
    tokenizer = make_tokenizer()
    rows = [tokenizer.encode(f"{i['prompt']} {i['answer']}{END}") for i in ITEMS]
    width = max(map(len, rows))
    ids = torch.tensor([row + [VOCABULARY - 1] * (width - len(row)) for row in rows])
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    return model.eval()


def save(model, folder, *, dtype=torch.float32, **options):
    model.to(dtype).save_pretrained(folder, **options)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_pair(folder, family="llama", *, dtype=torch.float32, **changes):
    """Write base and perturbed fine-tune; the fine-tune brings its calibration text."""
    model = make_model(family, **changes)
    base = save(model, folder / "base", dtype=dtype)
    tuned = save(perturb(model.float()), folder / "tuned", dtype=dtype)
    (tuned / "calibration.txt").write_text(CALIBRATION)
    return base, tuned


def write_items(path, items=ITEMS):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path
