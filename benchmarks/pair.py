"""Compress, rebuild, verify and score one pair with the command line, and write the figures.

    python benchmarks/pair.py --base BASE --tuned TUNED --out OUT.json --device cuda

Every figure comes from the `--json` output of `deltacome`, run as a user would run it.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

RUNS = (("hub", 1.0), ("hub", 0.5), ("come", 1.0), ("come", 0.5), ("datafree", 1.0))


def deltacome(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "deltacome_core.cli", *arguments, "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def run_recipe(args: argparse.Namespace, work: Path, recipe: str, bits: float) -> dict[str, Any]:
    delta = work / f"{recipe}-{bits}"
    base, tuned, device = str(args.base), str(args.tuned), ("--device", args.device)
    pair = ("--base", base, "--tuned", tuned)
    print(f"{recipe} at {bits} bits per parameter", flush=True)
    budget = ("--recipe", recipe, "--bits-per-param", str(bits))
    compressed = deltacome("compress", *pair, "--out", str(delta), *budget, *device)
    rebuilt = work / f"{recipe}-{bits}-rebuilt"
    deltacome("reconstruct", "--base", base, "--delta", str(delta), "--out", str(rebuilt))
    items = ("--items", str(args.tuned / "evaluation.jsonl"))
    scores = deltacome("evaluate", *pair, "--delta", str(delta), *items, *device)
    for score in scores.values():
        score.pop("hits", None)
    return {
        "recipe": recipe,
        "bits_per_param_asked": bits,
        "compress": {k: v for k, v in compressed.items() if k != "out"},
        "inspect": deltacome("inspect", str(delta)),
        "verify": deltacome("verify", *pair, "--delta", str(delta), *device),
        "evaluate": scores,
        "rebuilt_weight_bytes": sum(f.stat().st_size for f in rebuilt.glob("*.safetensors")),
    }


def describe(device: str) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu"
    packages = ("torch", "transformers", "safetensors")
    return {"device": name, "versions": {package: version(package) for package in packages}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tuned", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows = [run_recipe(args, Path(work), recipe, bits) for recipe, bits in RUNS]
    record = describe(args.device) | {"commit": args.commit, "rows": rows}
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
