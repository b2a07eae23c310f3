"""Backbones and deltas of tiny models that share one executor, and what they must answer."""

from dataclasses import replace

import tiny
import torch

from deltacome_core.compress import compress_checkpoint
from deltacome_core.models import load_model
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint
from kernels.fragments import PLANES
from workers.engine.arena_slots import KernelOptions
from workers.engine.model import load_backbone, load_shared
from workers.engine.shared import SharedExecutor

PROMPTS = ((40, 41, 42, 200, 7, 8, 9), tuple(range(50, 83)), (99,))


def make_deltas(folder, tuned, *recipes):
    """Deltas d0, d1, … of the models in `tuned` on the backbone in folder/base."""
    for number, model in enumerate(tuned):
        recipe = recipes[number % len(recipes)]
        tiny.save(model, folder / f"t{number}")
        compress_checkpoint(folder / "base", folder / f"t{number}", folder / f"d{number}", recipe)
        reconstruct_checkpoint(folder / "base", folder / f"d{number}", folder / f"r{number}")


def load_all(folder, n, *, factor_bytes=1 << 30, n_slots=4, arena=False, planes=PLANES):
    """The backbone and its deltas; with `arena` in slots of a GPU, run by the kernels' reference."""
    backbone = load_backbone(folder / "base", device="cpu")
    room = {"device": "cpu", "kv_bytes": 1 << 23, "n_slots": n_slots}
    executor = SharedExecutor(
        backbone.module, folder / "base", arena=arena, kernels=KernelOptions(planes=planes), **room
    )
    shared = replace(backbone, executor=executor)
    deltas = [
        load_shared(shared, folder / "base", folder / f"d{number}", factor_bytes=factor_bytes)
        for number in range(n)
    ]
    return [shared, *deltas]


def greedy(folder, prompt, length=20):
    model = load_model(folder)
    with torch.inference_mode():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False)
    return ids[0, len(prompt) :].tolist()


SHAPES = {
    "plain": {},
    "tied": {"tied": True},
    "bias": {"bias": True},
    "basis": {},
    "tied basis": {"tied": True},
    "decayed basis": {},
    "tied decayed basis": {"tied": True},
}
ROWS = get_recipe("datafree", matrix_bits=3.0)
# Of 8 ranks, and of 16.
BASIS = replace(ROWS, vocabulary_bits=2.5, vocabulary_rank=8)
LARGER = replace(BASIS, vocabulary_rank=16)


def make_models(root, name):
    """Save a backbone, three fine-tunes' deltas, and what they stand for as checkpoints."""
    shape = SHAPES[name]
    tiny.save(tiny.make_model(**shape), root / "base")
    tuned = [
        tiny.tune(tiny.make_model(**shape), seed=seed, size=0.05, new_rows=new_rows)
        for seed, new_rows in ((1, 0), (2, 3), (3, 0))
    ]
    if "decayed" in name:
        for number, model in enumerate(tuned):
            decay(model, 1 - 0.1 * (number + 1))
    make_deltas(root, tuned, *((BASIS, BASIS, LARGER) if "basis" in name else (ROWS,)))
    return root


def decay(model, share):
    with torch.no_grad():
        for table in {model.get_input_embeddings(), model.get_output_embeddings()}:
            table.weight.mul_(share)
