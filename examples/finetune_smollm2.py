"""Make a short full-parameter fine-tune of SmolLM2-135M-Instruct on seeded word problems.

    python examples/finetune_smollm2.py --base SMOLLM2_DIR --out TUNED_DIR --device cuda

All parameters train (embeddings and norms too). The output folder is a bf16 checkpoint with
calibration.jsonl and evaluation.jsonl beside the weights, as the hub expects them.
"""

import argparse
import json
from pathlib import Path

import torch
from tiny_text import task_items
from train_tiny_llama import encode_items, exact_match, optimise, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

SEED = 20261123


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()

    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).to(args.device)
    n_train = min(40_000, args.steps * args.batch)
    train_items, test_items = task_items(args.task, seed=SEED, n_train=n_train, n_test=600)
    before = exact_match(model, tokenizer, test_items[:400])
    ids, labels = encode_items(tokenizer, train_items, args.device)
    generator = torch.Generator(device="cpu").manual_seed(SEED)

    def batches(_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        pick = torch.randint(len(ids), (args.batch,), generator=generator).to(args.device)
        return ids[pick], labels[pick]

    losses = optimise(model, batches, steps=args.steps, lr=args.lr, weight_decay=0.0)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    model.float()
    after = exact_match(model, tokenizer, test_items[:400])
    write_jsonl(args.out / "calibration.jsonl", train_items[:512])
    write_jsonl(args.out / "evaluation.jsonl", test_items[:400])
    record = {
        "task": args.task,
        "seed": SEED,
        "steps": args.steps,
        "batch": args.batch,
        "lr": args.lr,
        "losses": losses,
        "exact_match": {"backbone": before, "fine_tune": after, "n": 400},
        "torch": torch.__version__,
    }
    print(json.dumps(record["exact_match"]))
    (args.out.parent / f"{args.out.name}_log.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
