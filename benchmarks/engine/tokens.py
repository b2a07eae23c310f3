"""Greedy answers of several tenants in common steps beside those of the rebuilt checkpoints."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from benchmarks.engine.library import time_library
from benchmarks.engine.loop import Loop, draw_prompts, endless, rate
from benchmarks.engine.tenants import share_tenants
from deltacome_core.compress import compress_checkpoint
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint
from workers.engine.model import LoadedModel, load_backbone

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLES = Path(__file__).parents[2] / "examples" / "tiny-llama"
TASKS = ("dates", "extraction")
NEW_TOKENS = 32


def widen(source: Path, target: Path) -> Path:
    """A checkpoint with the same numbers in fp32, so that nothing is rounded on the way back."""
    if not target.exists():
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        model.save_pretrained(target)
        for file in source.glob("tokenizer*"):
            (target / file.name).write_bytes(file.read_bytes())
    return target


def make_deltas(made: Path, *, exact: bool) -> dict[str, Path]:
    """Deltas of the demo's fine-tunes by the default recipe; `exact` in fp32, else as published."""
    find: Callable[[str], Path] = (
        (lambda name: widen(EXAMPLES / name, made / f"{name}-fp32"))
        if exact
        else (lambda name: EXAMPLES / name)
    )
    deltas = {task: made / f"{task}-{'exact' if exact else 'bf16'}" for task in TASKS}
    for task, folder in deltas.items():
        if not folder.exists():
            compress_checkpoint(find("backbone"), find(task), folder, get_recipe("hub"))
    return deltas


def load_tenants(
    made: Path, device: str, *, exact: bool, precision: str = "exact"
) -> tuple[list[LoadedModel], list[LoadedModel]]:
    """Backbone and deltas in one executor, and each as a dense checkpoint of its own.

    exact says what the models are, precision how the kernels compute the deltas.
    """
    deltas = make_deltas(made, exact=exact)
    base = widen(EXAMPLES / "backbone", made / "backbone-fp32") if exact else EXAMPLES / "backbone"
    tenants = share_tenants(
        base,
        deltas,
        device=device,
        precision=precision,
        n_slots=4,
        kv_bytes=1 << 27,
        delta_bytes=1 << 28,
    )
    dense = [load_backbone(base, device=device)]
    for folder in deltas.values():
        rebuilt = made / f"{folder.name}-rebuilt"
        if not rebuilt.exists():
            reconstruct_checkpoint(base, folder, rebuilt)
        dense.append(load_backbone(rebuilt, device=device))
    return list(tenants.values()), dense


def compare_tokens(
    made: Path, device: str, *, n_items: int, exact: bool, precision: str
) -> dict[str, Any]:
    models, dense = load_tenants(made, device, exact=exact, precision=precision)
    prompts = []
    for task in TASKS:
        lines = (EXAMPLES / task / "evaluation.jsonl").read_text().splitlines()[:n_items]
        prompts += [tuple(models[0].tokenizer.encode(json.loads(line)["prompt"])) for line in lines]
    asked = [(number, prompt) for prompt in prompts for number in range(len(models))]
    with Loop() as loop, Loop() as apart:
        mixed = loop.answer([(models[n], prompt) for n, prompt in asked], NEW_TOKENS)
        steps = loop.scheduler._metrics.batch_tenants  # noqa: SLF001
        truth = apart.answer([(dense[n], prompt) for n, prompt in asked], NEW_TOKENS)
    pairs = list(zip(asked, mixed, truth, strict=True))
    names = [model.key for model in models]
    return {
        "dtype": str(models[0].module.dtype),
        "answers": {name: sum(names[n] == name for n, _ in asked) for name in names},
        "same_answers": {
            name: sum(ours.ids == theirs.ids for (n, _), ours, theirs in pairs if names[n] == name)
            for name in names
        },
        "same_tokens": sum(
            a == b for _, ours, theirs in pairs for a, b in zip(ours.ids, theirs.ids, strict=False)
        )
        / sum(max(len(ours.ids), len(theirs.ids)) for _, ours, theirs in pairs),
        "mean_tenants_in_a_step": steps.mean,
        "captured_graphs": count_graphs(models[0].executor),
    }


def count_graphs(executor: Any) -> int:
    return 0 if executor._graphs is None else len(executor._graphs._captured)  # noqa: SLF001


def compare_loops(made: Path, device: str) -> dict[str, Any]:
    """Tokens per second of one batch on the tiny model: this loop and the library's own."""
    tenants, (plain, *_) = load_tenants(made, device, exact=False)
    prompts = draw_prompts(16, 500, 32)
    found: dict[str, Any] = {}
    own: list[list[int]] = []
    with Loop() as loop:
        for name, models in (
            ("backbone", tenants[:1]),
            ("delta", tenants[1:2]),
            ("mixed", tenants),
        ):
            asked = [
                (endless(models[at % len(models)], models[at % len(models)].slot), prompt)
                for at, prompt in enumerate(prompts)
            ]
            runs = [loop.answer(asked, 64) for _ in range(4)]
            found[name] = max(rate(heard)["tokens_per_s"] for heard in runs[1:])
            if name == "backbone":
                own = [one.ids for one in runs[-1]]
    library, answers = time_library(plain.module, prompts, 64)
    found["library"] = library["tokens_per_s"]
    found["same_answers"] = sum(a == b for a, b in zip(own, answers, strict=True))
    return found
