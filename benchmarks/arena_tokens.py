"""Compare greedy tokens of a demo delta in an arena with those of its merged dense model.

    python benchmarks/arena_tokens.py --device cuda --out OUT.json

Every linear layer of the dense fine-tune becomes the backbone's weight and a site of an arena;
embeddings and norms stay the fine-tune's. Prompts take many tokens at once, answers one at a time.
Fast mode keeps two bytes of activations and hidden values: its tokens are counted, and may differ.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltacome_core.compress import compress_checkpoint
from deltacome_core.container import open_delta
from deltacome_core.packed import PackedDirect, PackedMatrix
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint
from kernels import serving
from kernels.arena import ArenaSpec, DeltaArena
from kernels.fragments import FAST_PLANES, PLANES
from kernels.image import Site, build_image
from kernels.plan import StepPlan

EXAMPLES = Path(__file__).parents[1] / "examples" / "tiny-llama"
TASKS = ("dates", "extraction")
N_NEW = 24


class ArenaLinear(torch.nn.Module):
    """A linear layer of the backbone whose tokens all use one slot."""

    def __init__(self, weight: torch.Tensor, arena: DeltaArena, site: int, planes: int) -> None:
        super().__init__()
        self.weight, self.arena, self.site, self.planes = weight, arena, site, planes
        self.plans: dict[int, StepPlan] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        plan = self.plans.get(len(rows))
        if plan is None:
            plan = StepPlan(self.arena, n_tokens=len(rows), planes=self.planes)
            plan.assign([0] * len(rows))
            self.plans[len(rows)] = plan
        y = serving.delta_linear(rows, self.weight, self.arena, self.site, plan)
        return y.view(*x.shape[:-1], -1)


def put_in_arena(
    model: torch.nn.Module, base: torch.nn.Module, folder: Path, *, planes: int
) -> int:
    """Replace the linear layers that the delta changes; returns how many."""
    device = next(model.parameters()).device
    delta = open_delta(folder)
    loaded = {entry.name: delta.load(entry.name) for entry in delta.manifest.entries}
    matrices = {
        name: matrix
        for name, matrix in loaded.items()
        if isinstance(matrix, PackedMatrix | PackedDirect)
    }
    layers = {name.removesuffix(".weight"): matrix for name, matrix in matrices.items()}
    sites = tuple(
        Site(
            name=name,
            parts=(f"{name}.weight",),
            out_features=(matrix.out_features,),
            in_features=matrix.in_features,
        )
        for name, matrix in layers.items()
    )
    image = build_image(sites, matrices)
    arena = DeltaArena(ArenaSpec.covering(sites, [image]), n_slots=1, device=device)
    arena.load(image)
    for number, name in enumerate(layers):
        weight = base.get_submodule(name).weight.detach()
        model.set_submodule(name, ArenaLinear(weight, arena, number, planes))
    return len(sites)


def answer(model: torch.nn.Module, tokens: torch.Tensor) -> list[int]:
    """Greedy tokens after a prompt."""
    with torch.no_grad():
        found = model.generate(tokens, do_sample=False, max_new_tokens=N_NEW, pad_token_id=0)
    return found[0, tokens.shape[1] :].tolist()


def compare(task: str, *, device: str, n: int) -> dict[str, object]:
    tuned = EXAMPLES / task
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lines = (tuned / "evaluation.jsonl").read_text().splitlines()[:n]
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "backbone")
    with tempfile.TemporaryDirectory() as scratch:
        delta_dir, rebuilt_dir = Path(scratch) / "delta", Path(scratch) / "rebuilt"
        recipe = get_recipe("hub")
        compress_checkpoint(EXAMPLES / "backbone", tuned, delta_dir, recipe, device=device)
        reconstruct_checkpoint(EXAMPLES / "backbone", delta_dir, rebuilt_dir)
        base, dense, exact, fast = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
            for folder in (EXAMPLES / "backbone", rebuilt_dir, rebuilt_dir, rebuilt_dir)
        )
        n_sites = put_in_arena(exact, base, delta_dir, planes=PLANES)
        put_in_arena(fast, base, delta_dir, planes=FAST_PLANES)
    same = same_fast = same_backbone = 0
    for line in lines:
        prompt = tokenizer.encode(json.loads(line)["prompt"])
        tokens = torch.tensor([prompt], device=device)
        wanted = answer(dense, tokens)
        same += answer(exact, tokens) == wanted
        same_fast += answer(fast, tokens) == wanted
        same_backbone += answer(base, tokens) == wanted
    return {
        "task": task,
        "sites": n_sites,
        "prompts": len(lines),
        "same_tokens": same,
        "same_tokens_fast": same_fast,
        "same_tokens_of_the_backbone": same_backbone,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [compare(task, device=arguments.device, n=arguments.items) for task in TASKS]
    text = json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n"
    sys.stdout.write(text)
    if arguments.out is not None:
        arguments.out.write_text(text)
    return 0 if all(row["same_tokens"] == row["prompts"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
