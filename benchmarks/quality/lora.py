"""LoRA on a task's own data with as many bytes as a delta has: the rival that trains less.

    python -m benchmarks.quality.lora --base BASE_DIR --task german --out DIR --budget 16816284

peft is a dependency of this module alone and is imported where it is used. Every linear layer of
the decoder gets an adapter of one rank. Of the embedding only rows of new tokens train, in full,
since no adapter can make up a row; their bytes count.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.batches import draw_batches, encode_items
from benchmarks.quality.models import (
    grow_embedding,
    half_state,
    load_causal_model,
    load_in_place,
    save_checkpoint,
)
from benchmarks.quality.optimise import Groups, optimise
from benchmarks.quality.tasks import load_task_tokenizer
from benchmarks.quality.train import (
    TrainOptions,
    add_training_arguments,
    draw_split,
    read_options,
)

BYTES_PER_VALUE = 2
"""A and B are kept in bf16."""
SCALE = 2.0
"""alpha / rank, as most published runs have it."""
DEFAULT_LR = 1e-3
"""Ten times the rate of the full fine-tune; B starts at zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraResult:
    """A merged bf16 state by checkpoint name, and the bytes of the adapter it came from."""

    state: dict[str, Tensor]
    n_bytes: int
    rank: int
    losses: list[float]


def adapted_layers(model: Any) -> dict[str, nn.Linear]:
    """Every linear layer of the decoder; the head is not one of them."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }


def choose_rank(model: Any, *, budget_bytes: int, n_new_rows: int) -> tuple[int, int]:
    """Return the largest rank within the budget and the bytes it takes.

    Raises:
        ValueError: rank 1 is over the budget.
    """
    layers = adapted_layers(model).values()
    per_rank = BYTES_PER_VALUE * sum(m.in_features + m.out_features for m in layers)
    fixed = BYTES_PER_VALUE * n_new_rows * int(model.config.hidden_size)
    rank = (budget_bytes - fixed) // per_rank
    if rank < 1:
        raise ValueError(f"rank 1 takes {fixed + per_rank} bytes, the budget is {budget_bytes}")
    return rank, fixed + rank * per_rank


def keep_rows(first_new: int) -> Callable[[Tensor], Tensor]:
    """A gradient hook that lets only rows from first_new on train."""

    def drop_old(gradient: Tensor) -> Tensor:
        kept = gradient.clone()
        kept[:first_new] = 0
        return kept

    return drop_old


def add_adapters(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=SCALE * rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted({name.rpartition(".")[2] for name in adapted_layers(model)}),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


@torch.no_grad()
def merge_adapters(adapted: Any) -> Any:
    """Round A and B to bf16, as their file holds them, and add them to the weights."""
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))
    return adapted.merge_and_unload()


def trained_groups(adapted: Any, *, lr: float, n_old_rows: int, n_new_rows: int) -> Groups:
    groups: Groups = [
        {
            "params": [p for name, p in adapted.named_parameters() if ".lora_" in name],
            "lr": lr,
            "weight_decay": 0.0,
        }
    ]
    if n_new_rows:
        embedding = adapted.get_input_embeddings().weight
        embedding.requires_grad_(requires_grad=True)
        embedding.register_hook(keep_rows(n_old_rows))
        groups.append({"params": [embedding], "lr": lr, "weight_decay": 0.0})
    return groups


def train_lora(base: Path, options: TrainOptions, *, budget_bytes: int) -> LoraResult:
    """Train an adapter on the items that the full fine-tune of these options saw.

    Args:
        base: checkpoint folder of the backbone.
        options: task, steps, batch, learning rate, seed and device.
        budget_bytes: most that A, B and new embedding rows may take in bf16.

    Returns:
        The merged weights and what they cost.

    Raises:
        ValueError: the budget is below rank 1.
    """
    torch.manual_seed(options.seed)
    tokenizer = load_task_tokenizer(base, options.task)
    model = load_causal_model(base, dtype=torch.float32, device=options.device)
    n_old = model.get_input_embeddings().weight.shape[0]
    grow_embedding(model, len(tokenizer))
    n_new = model.get_input_embeddings().weight.shape[0] - n_old
    rank, n_bytes = choose_rank(model, budget_bytes=budget_bytes, n_new_rows=n_new)
    split = draw_split(tokenizer, options, n_evaluation=0)
    adapted = add_adapters(model, rank)
    batches = draw_batches(
        encode_items(tokenizer, split.train),
        steps=options.steps,
        size=options.batch,
        seed=options.seed,
        pad_token=tokenizer.eos_token_id,
        device=options.device,
    )
    groups = trained_groups(adapted, lr=options.lr, n_old_rows=n_old, n_new_rows=n_new)
    # The adapted model passes calls on, so the inner one is optimised.
    losses = optimise(adapted.get_base_model(), groups, batches, steps=options.steps)
    merged = merge_adapters(adapted)
    return LoraResult(state=half_state(merged), n_bytes=n_bytes, rank=rank, losses=losses)


def write_result(base: Path, out: Path, result: LoraResult, options: TrainOptions) -> None:
    tokenizer = load_task_tokenizer(base, options.task)
    model = load_causal_model(base, dtype=torch.bfloat16, device="cpu")
    grow_embedding(model, len(tokenizer))
    load_in_place(model, result.state)
    save_checkpoint(model, tokenizer, out)
    record = {**asdict(options), "rank": result.rank, "n_bytes": result.n_bytes}
    log = json.dumps(record | {"losses": result.losses}, indent=1)
    (out / "lora_log.json").write_text(log + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    add_training_arguments(parser)
    parser.add_argument("--budget", type=int, required=True, help="bytes of A and B in bf16")
    args = parser.parse_args()
    started = time.monotonic()
    options = read_options(args, lr=DEFAULT_LR)
    result = train_lora(args.base, options, budget_bytes=args.budget)
    write_result(args.base, args.out, result, options)
    if not math.isfinite(result.losses[-1]):
        raise SystemExit("the training did not converge")
    seconds = round(time.monotonic() - started, 1)
    shown = {"rank": result.rank, "n_bytes": result.n_bytes, "loss": result.losses[-1]}
    print(json.dumps({"task": options.task, **shown, "seconds": seconds}))


if __name__ == "__main__":
    main()
