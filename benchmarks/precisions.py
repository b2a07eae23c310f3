"""Compare deltas against backbones of several precisions, each with and without correction.

    python -m benchmarks.precisions --out docs/benchmarks/precisions.json --items 60 --text-rows 16
    python -m benchmarks.precisions --base BASE --tuned TUNED --out OUT.json --device cuda

The fine-tune brings evaluation.jsonl and, for `hub`, calibration.jsonl. Every subject is rebuilt in
fp32 and held against the fine-tune by the judge of benchmarks/quality: `kl_task` is
KL(fine-tune || subject) in nats a token on the answers of held-out items, `kl_text` the same on
general text, `score` exact match. Both recoveries are 1 - kl / KL(fine-tune || stored backbone) in
every row, and `weight_error` ||subject - fine-tune|| / ||fine-tune - stored backbone|| over the
matrices of the decoder, so that rows of different precision can be compared.
"""

import argparse
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.measure import N_ITEMS, TEXT_ROWS, Bench, BenchOptions, Measurement
from benchmarks.quality.models import State, read_state
from deltacome_core.checkpoint import CONFIG_NAME, Checkpoint, at_precision, open_checkpoint
from deltacome_core.compress import compress_checkpoint
from deltacome_core.container import open_delta
from deltacome_core.inspection import inspect_delta
from deltacome_core.precision import NATIVE, SCHEMES, plan_precision
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import apply_entry, reconstruct_checkpoint
from deltacome_core.safetensors_file import TensorSource, write_safetensors
from deltacome_core.served import write_served
from deltacome_core.tensors import TORCH_DTYPES, as_float32, dtype_name, load_tensor, tensor_bytes

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "tiny-llama"
STORED_DTYPES = ("BF16", "F16", "F32")
_KEPT = (
    "kl_task", "kl_text", "recovery", "recovery_text", "top1", "top1_text", "score", "score_se",
    "n_items",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A recipe, and the bits that a matrix parameter may take."""

    recipe: str
    matrix_bits: float

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.matrix_bits:g}"


DELTAS = (
    Made(recipe="hub", matrix_bits=1.0),
    Made(recipe="hub", matrix_bits=2.0),
    Made(recipe="datafree", matrix_bits=1.0),
    Made(recipe="datafree", matrix_bits=2.0),
    Made(recipe="bitdelta-row", matrix_bits=1.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A fine-tune and its backbone, the text that calibrates, and where the work is done."""

    base: Checkpoint
    tuned: Checkpoint
    texts: Path
    options: BenchOptions
    work: Path

    def compress(self, out: Path, made: Made, precision: str) -> Path:
        compress_checkpoint(
            self.base.path,
            self.tuned.path,
            out,
            get_recipe(made.recipe, matrix_bits=made.matrix_bits),
            calibration=self.texts if self.texts.is_file() else None,
            backbone_precision=precision,
            device=self.options.device,
        )
        return out

    def rebuild(self, delta: Path, out: Path) -> Path:
        device = torch.device(self.options.device)
        reconstruct_checkpoint(self.base.path, delta, out, dtype=torch.float32, device=device)
        return out


class Judge:
    """Scores checkpoints against a fine-tune."""

    def __init__(self, pair: Pair) -> None:
        self._bench = Bench(pair.tuned.path, pair.base.path, pair.options)
        precision = plan_precision("int4", pair.base.layout)
        names = sorted(precision.tensors) if precision else []
        base, tuned = read_state(pair.base.path), read_state(pair.tuned.path)
        self._truth = {name: tuned[name] for name in names}
        self._moved = self._distance(base)

    def backbone(self) -> dict[str, Any]:
        return _describe_found(self._bench.backbone) | {"weight_error": 1.0}

    def measure(self, folder: Path) -> dict[str, Any]:
        """Score a checkpoint and remove it: a few dozen in fp32 would fill a disk."""
        state = read_state(folder)
        shutil.rmtree(folder)
        error = self._distance(state) / self._moved
        return _describe_found(self._bench.measure(state)) | {"weight_error": error}

    def _distance(self, state: State) -> float:
        squares = (
            float((as_float32(state[name]) - as_float32(truth)).square().sum())
            for name, truth in self._truth.items()
        )
        return math.sqrt(sum(squares))


def _describe_found(found: Measurement) -> dict[str, Any]:
    whole = asdict(found)
    return {key: whole[key] for key in _KEPT}


def write_like(source: Checkpoint, out: Path, tensor: Callable[[str], torch.Tensor]) -> Path:
    """Write a checkpoint with the names and sidecars of another one."""

    def sources() -> Iterator[TensorSource]:
        for name in source.tensors:
            values = tensor(name)
            yield name, dtype_name(values.dtype), tuple(values.shape), tensor_bytes(values)

    out.mkdir()
    write_safetensors(out / "model.safetensors", sources(), {"format": "pt"})
    for sidecar in source.sidecars:
        shutil.copyfile(sidecar, out / sidecar.name)
    return out


def cast(source: Checkpoint, dtype: str, out: Path) -> Checkpoint:
    """Write a checkpoint in another float type, its held-out items beside it."""
    write_like(source, out, lambda name: load_tensor(source, name).to(TORCH_DTYPES[dtype]))
    config = json.loads((out / CONFIG_NAME).read_text())
    config["dtype"] = str(TORCH_DTYPES[dtype]).removeprefix("torch.")
    (out / CONFIG_NAME).write_text(json.dumps(config))
    items = source.path / "evaluation.jsonl"
    if items.is_file():
        shutil.copyfile(items, out / items.name)
    return open_checkpoint(out)


def apply_uncorrected(served: Checkpoint, delta_dir: Path, tuned: Checkpoint, out: Path) -> Path:
    """Add a delta to a backbone it was not made for, which the library itself refuses."""
    delta = open_delta(delta_dir)

    def tensor(name: str) -> torch.Tensor:
        return apply_entry(load_tensor(served, name), delta.load(name), dtype=torch.float32)

    return write_like(tuned, out, tensor)


def describe(
    kind: str, backbone: str, made: Made | None = None, delta: Path | None = None
) -> dict[str, Any]:
    return {
        "backbone": backbone,
        "delta": kind,
        "recipe": made.recipe if made else "",
        "matrix_bits": made.matrix_bits if made else 0.0,
        "ratio": inspect_delta(delta).ratio if delta else None,
    }


def run_dtypes(pair: Pair) -> Iterator[dict[str, Any]]:
    """Deltas against backbones stored in the other float types, the fine-tune in the same."""
    made = DELTAS[0]
    for dtype in STORED_DTYPES:
        if dtype == pair.base.dtype == pair.tuned.dtype:
            continue
        own = Pair(
            base=cast(pair.base, dtype, pair.work / f"{dtype}-base"),
            tuned=cast(pair.tuned, dtype, pair.work / f"{dtype}-tuned"),
            texts=pair.texts,
            options=pair.options,
            work=pair.work,
        )
        judge = Judge(own)
        delta = own.compress(pair.work / f"{dtype}-delta", made, NATIVE)
        full = own.rebuild(delta, pair.work / f"{dtype}-full")
        yield describe("native", dtype, made, delta) | judge.measure(full)


def run_schemes(pair: Pair) -> Iterator[dict[str, Any]]:
    """Backbones served with fewer bits: alone, with an uncorrected and with a folded delta."""
    judge, work = Judge(pair), pair.work
    yield describe("none", NATIVE) | judge.backbone()
    native = {made: pair.compress(work / f"native-{made.name}", made, NATIVE) for made in DELTAS}
    for made, delta in native.items():
        full = pair.rebuild(delta, work / "full")
        yield describe("native", NATIVE, made, delta) | judge.measure(full)
    for scheme in SCHEMES:
        precision = plan_precision(scheme, pair.base.layout)
        served = at_precision(pair.base, precision)
        for kind, side in (("none", pair.base), ("fine-tune rounded too", pair.tuned)):
            write_served(at_precision(side, precision), work / "rounded")
            yield describe(kind, scheme) | judge.measure(work / "rounded")
        for made, delta in native.items():
            full = apply_uncorrected(served, delta, pair.tuned, work / "full")
            yield describe("uncorrected", scheme, made, delta) | judge.measure(full)
            folded = pair.compress(work / f"{scheme}-{made.name}", made, scheme)
            full = pair.rebuild(folded, work / "full")
            yield describe("folded", scheme, made, folded) | judge.measure(full)


def describe_machine(device: str) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path)
    parser.add_argument("--tuned", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--items", type=int, default=N_ITEMS, help="held out, at most")
    parser.add_argument("--text-rows", type=int, default=TEXT_ROWS, help="of general text")
    parser.add_argument("--commit", default="", help="which code ran")
    args = parser.parse_args()
    if (args.base is None) != (args.tuned is None):
        parser.error("--base and --tuned go together")
    pairs = [(EXAMPLES / "backbone", EXAMPLES / name) for name in ("dates", "extraction")]
    if args.base is not None:
        pairs = [(args.base, args.tuned)]
    options = BenchOptions(
        device=args.device, n_items=args.items, text_rows=args.text_rows, dtype=torch.float32
    )
    found: dict[str, list[dict[str, Any]]] = {}
    record = describe_machine(args.device) | {"commit": args.commit, "pairs": found}
    started = time.monotonic()
    for base, tuned in pairs:
        rows = found[f"{base.name}/{tuned.name}"] = []
        with tempfile.TemporaryDirectory() as work:
            pair = Pair(
                base=open_checkpoint(base),
                tuned=open_checkpoint(tuned),
                texts=tuned / "calibration.jsonl",
                options=options,
                work=Path(work),
            )
            for run in (run_schemes, run_dtypes):
                for row in run(pair):
                    rows.append(row)
                    print(f"{time.monotonic() - started:.0f} s", json.dumps(row), flush=True)
                    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
