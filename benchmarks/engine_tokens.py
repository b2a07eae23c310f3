"""Compare the engine's greedy tokens through the kernels with the rebuilt dense checkpoint.

    python benchmarks/engine_tokens.py --device cuda --out OUT.json

On CUDA every linear of a delta runs through the Triton kernels (no factors are kept dequantised).
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from deltacome_core.compress import compress_checkpoint
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint
from workers.engine.generate import Event, Failure, Piece, Sampling, Sequence
from workers.engine.model import LoadedModel, load_backbone, load_delta

EXAMPLES = Path(__file__).parents[1] / "examples" / "tiny-llama"
TASKS = ("dates", "extraction")


def answer(model: LoadedModel, prompt: str) -> tuple[list[int], str]:
    events: list[Event] = []
    sequence = Sequence(
        model,
        tuple(model.tokenizer.encode(prompt)),
        sampling=Sampling(temperature=0.0),
        max_tokens=48,
        score_prompt=False,
        prefill_chunk=512,
        emit=events.append,
    )
    while not sequence.finished:
        sequence.step()
    for event in events:
        if isinstance(event, Failure):
            raise event.error
    pieces = [event for event in events if isinstance(event, Piece)]
    text = "".join(piece.text for piece in pieces)
    return [piece.token_id for piece in pieces], text.split("\n")[0].strip()


def compare(task: str, backbone: LoadedModel, n: int) -> dict[str, Any]:
    base, tuned = EXAMPLES / "backbone", EXAMPLES / task
    lines = (tuned / "evaluation.jsonl").read_text().splitlines()[:n]
    items = [json.loads(line) for line in lines]
    with tempfile.TemporaryDirectory() as scratch:
        delta_dir, rebuilt_dir = Path(scratch) / "delta", Path(scratch) / "rebuilt"
        compress_checkpoint(base, tuned, delta_dir, get_recipe("come"), device=backbone.device)
        reconstruct_checkpoint(base, delta_dir, rebuilt_dir)
        delta = load_delta(backbone, base, delta_dir, factor_bytes=0)
        dense = load_backbone(rebuilt_dir, device=backbone.device)
        answers = {
            name: [answer(model, item["prompt"]) for item in items]
            for name, model in (("backbone", backbone), ("delta", delta), ("dense", dense))
        }
    pairs = zip(answers["delta"], answers["dense"], strict=True)
    return {
        "task": task,
        "n": len(items),
        "same_tokens": sum(ours[0] == theirs[0] for ours, theirs in pairs),
        "exact_match": {
            name: sum(a[1] == item["answer"] for a, item in zip(found, items, strict=True))
            for name, found in answers.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    backbone = load_backbone(EXAMPLES / "backbone", device=args.device)
    record = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "dtype": str(backbone.module.dtype),
        "rows": [compare(task, backbone, args.items) for task in TASKS],
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["rows"]))


if __name__ == "__main__":
    main()
