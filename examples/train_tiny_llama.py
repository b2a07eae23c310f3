"""Train the demo backbone from scratch and two full fine-tunes of it.

    python examples/train_tiny_llama.py --out examples/tiny-llama --device cuda

Writes three checkpoint folders (bf16 safetensors, own tokenizer) and train_log.json. The tasks are
chosen so that the backbone fails them and the fine-tune does not: what the delta must carry is
visible in one number.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tiny_text import document, task_items
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SEED = 20261123
VOCAB_SIZE = 1024
CONTEXT = 512
BLOCK = 256
END_OF_TEXT = "<|endoftext|>"
Item = tuple[str, str]
Batches = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + '\n' }}"
    "{% else %}{{ 'Question: ' + m['content'] + '\nAnswer:' }}{% endif %}"
    "{% endfor %}"
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # One token a digit: a carry can then be learned.
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def cosine(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - warmup) / (steps - warmup)))).item()


def optimise(
    model: nn.Module, batches: Batches, *, steps: int, lr: float, weight_decay: float
) -> list[float]:
    """Run AdamW with a cosine schedule; `batches(step)` gives (input ids, labels)."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, steps, min(100, steps // 10))
    )
    losses = []
    model.train()
    for step in range(steps):
        ids, labels = batches(step)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids).logits
        loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            losses.append(round(loss.item(), 4))
            print(f"  step {step:5d} loss {losses[-1]:.4f}", flush=True)
    return losses


def pretrain(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], *, steps: int, batch: int, device: str
) -> tuple[LlamaForCausalLM, dict]:
    eos = tokenizer.eos_token_id
    stream = [
        token
        for encoding in tokenizer.backend_tokenizer.encode_batch(texts)
        for token in (*encoding.ids, eos)
    ]
    data = torch.tensor(stream, dtype=torch.long, device=device)
    print(f"backbone: {len(stream)} tokens")
    torch.manual_seed(SEED)
    model = new_model().to(device)
    generator = torch.Generator(device="cpu").manual_seed(SEED)
    offsets = torch.arange(BLOCK, device=device)

    def batches(_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(stream) - BLOCK, (batch, 1), generator=generator).to(device)
        ids = data[starts + offsets]
        return ids, ids

    losses = optimise(model, batches, steps=steps, lr=2e-3, weight_decay=0.1)
    return model, {"tokens": len(stream), "steps": steps, "losses": losses}


def encode_items(
    tokenizer: PreTrainedTokenizerFast, items: list[Item], device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Left to right: prompt, answer, newline, end; only the answer part is learned."""
    eos = tokenizer.eos_token_id
    rows = []
    for prompt, answer in items:
        head = tokenizer(prompt)["input_ids"]
        tail = [*tokenizer(f" {answer}\n")["input_ids"], eos]
        rows.append((head + tail, [-100] * len(head) + tail))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), eos)
    labels = torch.full((len(rows), width), -100)
    for i, (row, label) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, : len(row)] = torch.tensor(label)
    return ids.to(device), labels.to(device)


@torch.no_grad()
def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    items: list[Item],
    *,
    max_new_tokens: int = 64,
) -> float:
    model.eval()
    groups: dict[int, list] = {}
    for prompt, answer in items:
        ids = tokenizer(prompt)["input_ids"]
        groups.setdefault(len(ids), []).append((ids, answer))
    hits = 0
    for rows in groups.values():
        ids = torch.tensor([row for row, _ in rows], device=model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
        )
        for generated, (_, answer) in zip(out[:, ids.shape[1] :], rows, strict=True):
            text = tokenizer.decode(generated, skip_special_tokens=True)
            hits += text.split("\n")[0].strip() == answer
    return hits / len(items)


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    train_items: list[Item],
    *,
    steps: int,
    lr: float,
    batch: int,
    device: str,
) -> list[float]:
    ids, labels = encode_items(tokenizer, train_items, device)
    generator = torch.Generator(device="cpu").manual_seed(SEED + 1)

    def batches(_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        pick = torch.randint(len(ids), (batch,), generator=generator).to(device)
        return ids[pick], labels[pick]

    return optimise(model, batches, steps=steps, lr=lr, weight_decay=0.0)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict({k: v.to("cpu", torch.bfloat16) for k, v in model.state_dict().items()})
    half.generation_config.eos_token_id = tokenizer.eos_token_id
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_jsonl(path: Path, items: Iterable[Item]) -> None:
    lines = (json.dumps({"prompt": p, "answer": a}, ensure_ascii=False) for p, a in items)
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tasks", nargs="+", default=["dates", "extraction"])
    parser.add_argument("--docs", type=int, default=400_000)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--tune-steps", type=int, default=1500)
    parser.add_argument("--tune-lr", type=float, default=5e-4)
    args = parser.parse_args()

    started = time.monotonic()
    rng = random.Random(SEED)
    texts = [document(rng) for _ in range(args.docs)]
    tokenizer = train_tokenizer(texts[:40_000])
    model, log = pretrain(tokenizer, texts, steps=args.steps, batch=256, device=args.device)
    save(model, tokenizer, args.out / "backbone")
    record = {
        "seed": SEED,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "n_params": sum(p.numel() for p in model.parameters()),
        "backbone": log,
        "fine_tunes": {},
    }
    for task in args.tasks:
        train_items, test_items = task_items(task, seed=SEED, n_train=40_000, n_test=600)
        # The saved half-precision backbone is what the delta will be taken against.
        tuned = LlamaForCausalLM.from_pretrained(args.out / "backbone", dtype=torch.float32)
        tuned = tuned.to(args.device)
        before = exact_match(tuned, tokenizer, test_items[:500])
        losses = fine_tune(
            tuned,
            tokenizer,
            train_items,
            steps=args.tune_steps,
            lr=args.tune_lr,
            batch=256,
            device=args.device,
        )
        folder = args.out / task
        save(tuned, tokenizer, folder)
        half = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device)
        after = exact_match(half, tokenizer, test_items[:500])
        write_jsonl(folder / "calibration.jsonl", train_items[:512])
        write_jsonl(folder / "evaluation.jsonl", test_items[:200])
        record["fine_tunes"][task] = {
            "steps": args.tune_steps,
            "lr": args.tune_lr,
            "losses": losses,
            "exact_match": {"backbone": before, "fine_tune": after, "n": 500},
        }
        print(f"{task}: backbone {before:.3f} fine-tune {after:.3f}", flush=True)
    record["seconds"] = round(time.monotonic() - started, 1)
    (args.out / "train_log.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
