"""Time compression from files to file, and write the figures.

    python -m benchmarks.compress --work DIR --out docs/benchmarks/compress.json --device cuda
    python -m benchmarks.compress --work DIR --out docs/benchmarks/compress.json --device cpu \
        --runs smollm2-135m:hub

Every run but the published schedule is `deltacome compress --json` in a process of its own, so that
its seconds and its memory are those a user sees. Rows of other runs stay in the file.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.compress.pair import write_pair
from benchmarks.compress.published import time_published_layer
from benchmarks.compress.shapes import SHAPES
from deltacome_core.calibrate import MAX_SEQUENCES, SEQUENCE_TOKENS

RUNS = (
    "llama-2-7b:datafree",
    "llama-2-7b:hub",
    "llama-2-7b:published",
    "llama-2-70b:hub",
)
_TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny-llama" / "backbone"
_KEPT = (
    "mode", "seconds", "stages", "peak_gpu_bytes", "peak_gpu_reserved_bytes", "peak_host_bytes",
    "ratio", "total_bytes", "bits_per_param", "n_params", "n_matrices", "with_feedback",
    "distilled",
)  # fmt: skip


def describe_machine(device: str) -> dict[str, Any]:
    on_cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_cuda else platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }


def time_command(folder: Path, recipe: str, options: list[str], out: Path) -> dict[str, Any]:
    """Compress a pair with the command line; also says which bytes came out."""
    command = [sys.executable, "-m", "deltacome_core.cli", "compress"]
    command += ["--base", str(folder / "base"), "--tuned", str(folder / "tuned")]
    command += ["--recipe", recipe, "--out", str(out), *options, "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    report = json.loads(done.stdout)
    digest = hashlib.sha256()
    for file in sorted(out.glob("delta*.safetensors")):
        digest.update(file.read_bytes())
    shutil.rmtree(out)
    return {
        **{key: report[key] for key in _KEPT},
        "n_tokens": report["calibration"]["n_tokens"] if report["calibration"] else 0,
        "seconds_with_start": seconds,
        "sha256": digest.hexdigest(),
    }


def time_published(folder: Path, n_layers: int) -> dict[str, Any]:
    made = time_published_layer(folder, n_samples=MAX_SEQUENCES, length=SEQUENCE_TOKENS)
    return {
        "mode": "calibrated",
        "scaled": f"one layer measured, times {n_layers}; without reading and writing files",
        "n_tokens": MAX_SEQUENCES * SEQUENCE_TOKENS,
        "seconds": made["seconds_of_layer"] * n_layers,
        **made,
    }


def run(args: argparse.Namespace, item: str) -> dict[str, Any]:
    name, _, recipe = item.partition(":")
    shape = SHAPES[name]
    if args.layers:
        shape = replace(shape, layers=args.layers)
    folder = args.work / f"{name}-{shape.layers}"
    if not folder.exists():
        started = time.perf_counter()
        write_pair(folder, shape, _TOKENIZER, torch.device(args.device))
        print(f"{name} written in {time.perf_counter() - started:.0f} s", flush=True)
        torch.cuda.empty_cache()
    row = {
        "model": name,
        "layers": shape.layers,
        "layers_of_model": shape.layers_of_model,
        "recipe": recipe,
        "devices": args.devices or args.device,
    } | describe_machine(args.device)
    if recipe == "published":
        return row | time_published(folder, shape.layers_of_model)
    options = ["--devices", args.devices] if args.devices else ["--device", args.device]
    return row | time_command(folder, recipe, options, args.work / "delta")


def save(out: Path, rows: list[dict[str, Any]], commit: str) -> None:
    """Put rows into the file in the place of those of the same run."""
    document = json.loads(out.read_text()) if out.exists() else {"rows": []}

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return row["model"], str(row["layers"]), row["recipe"], row["devices"]

    fresh = {key(row): row | {"commit": commit} for row in rows}
    kept = [row for row in document["rows"] if key(row) not in fresh]
    document["rows"] = kept + list(fresh.values())
    out.write_text(json.dumps(document, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the pairs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--devices", default="", help="as of deltacome compress, for example 0,1")
    parser.add_argument("--runs", nargs="+", default=RUNS, metavar="MODEL:RECIPE")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    parser.add_argument("--commit", default="unknown", help="which code ran")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for item in args.runs:
        rows.append(run(args, item))
        print(json.dumps(rows[-1]), flush=True)
        save(args.out, rows, args.commit)


if __name__ == "__main__":
    main()
