"""Compare deltas against backbones of several precisions, each with and without correction.

    python benchmarks/precisions.py --out docs/benchmarks/precisions.json
    python benchmarks/precisions.py --base BASE --tuned TUNED --out OUT.json --device cuda

Every subject is written as a plain checkpoint and held against the fine-tune by the functions that
`deltacome verify` and `deltacome evaluate` use. `kl` is KL(fine-tune || subject) in nats a token on
the answers of up to 60 items of the fine-tune's evaluation.jsonl, `score` exact match on as many.
`recovery` is 1 - kl / KL(fine-tune || stored backbone) in every row, and `weight_error`
||subject - fine-tune|| / ||fine-tune - stored backbone|| over the matrices of the decoder, so that
rows of different precision can be compared.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from deltacome_core.checkpoint import CONFIG_NAME, Checkpoint, at_precision, open_checkpoint
from deltacome_core.compress import compress_checkpoint
from deltacome_core.container import open_delta
from deltacome_core.evaluate import evaluate_exact_match, read_evaluation
from deltacome_core.models import load_model, load_tokenizer
from deltacome_core.precision import NATIVE, SCHEMES, plan_precision
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import apply_entry, reconstruct_checkpoint
from deltacome_core.safetensors_file import TensorSource, write_safetensors
from deltacome_core.served import write_served
from deltacome_core.tensors import TORCH_DTYPES, as_float32, dtype_name, load_tensor, tensor_bytes
from deltacome_core.verify import compare_models, measure_recovery, read_scored_texts

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "tiny-llama"
STORED_DTYPES = ("BF16", "F16", "F32")
DELTAS = (("datafree", 1.0), ("datafree", 2.0), ("bitdelta-row", 1.0))
MAX_ITEMS = 60


class Judge:
    """Holds the fine-tune and scores checkpoints against it."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint, device: str) -> None:
        self._base, self._tuned, self._device = base, tuned, device
        self._tokenizer = load_tokenizer(tuned.path, base.path)
        items = tuned.path / "evaluation.jsonl"
        found = read_evaluation(items)
        self._items = found[:: -(-len(found) // MAX_ITEMS)]
        answers = [self._tokenizer.encode(item.answer) for item in self._items]
        self._max_new_tokens = max(map(len, answers)) + 2
        texts = read_scored_texts([items], self._tokenizer)
        self._texts = texts[:: -(-len(texts) // MAX_ITEMS)]
        self._reference = load_model(tuned.path, device=device)
        precision = plan_precision("int4", base.layout)
        self._matrices = sorted(precision.tensors) if precision else []
        self._kl_backbone = 0.0
        self.backbone = self.measure(base.path)

    def measure(self, folder: Path) -> dict[str, Any]:
        model = load_model(folder, device=self._device)
        found = compare_models(self._reference, model, self._texts)
        # The stored backbone is judged first, and sets the measure for all others.
        self._kl_backbone = self._kl_backbone or found.kl
        score = evaluate_exact_match(
            model, self._tokenizer, self._items, max_new_tokens=self._max_new_tokens
        )
        return {
            "kl": found.kl,
            "recovery": measure_recovery(found.kl, self._kl_backbone),
            "top1": found.top1,
            "score": score.accuracy,
            "score_se": score.se,
            "weight_error": self._weight_error(open_checkpoint(folder)),
        }

    def _weight_error(self, subject: Checkpoint) -> float:
        missed = moved = 0.0
        for name in self._matrices:
            truth = as_float32(load_tensor(self._tuned, name))
            missed += float((as_float32(load_tensor(subject, name)) - truth).square().sum())
            moved += float((truth - as_float32(load_tensor(self._base, name))).square().sum())
        return (missed / moved) ** 0.5


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


def cast(source: Checkpoint, dtype: str, out: Path) -> Path:
    """Write a checkpoint in another float type."""
    write_like(source, out, lambda name: load_tensor(source, name).to(TORCH_DTYPES[dtype]))
    config = json.loads((out / CONFIG_NAME).read_text())
    config["dtype"] = str(TORCH_DTYPES[dtype]).removeprefix("torch.")
    (out / CONFIG_NAME).write_text(json.dumps(config))
    return out


def apply_uncorrected(served: Checkpoint, delta_dir: Path, tuned: Checkpoint, out: Path) -> Path:
    """Add a delta to a backbone it was not made for, which the library itself refuses."""
    delta = open_delta(delta_dir)

    def tensor(name: str) -> torch.Tensor:
        dtype = TORCH_DTYPES[delta.entry(name).dtype]
        return apply_entry(load_tensor(served, name), delta.load(name), dtype=dtype)

    return write_like(tuned, out, tensor)


def run_dtypes(
    base: Checkpoint, tuned: Checkpoint, work: Path, device: str
) -> list[dict[str, Any]]:
    """Deltas against backbones stored in the other float types, the fine-tune in the same."""
    rows = []
    for dtype in STORED_DTYPES:
        if dtype == base.dtype == tuned.dtype:
            continue
        pair = [
            open_checkpoint(cast(side, dtype, work / f"{dtype}-{name}"))
            for name, side in (("base", base), ("tuned", tuned))
        ]
        shutil.copyfile(tuned.path / "evaluation.jsonl", pair[1].path / "evaluation.jsonl")
        judge = Judge(pair[0], pair[1], device)
        recipe, bits = DELTAS[0]
        delta, out = work / f"{dtype}-delta", work / f"{dtype}-full"
        compress(pair[0].path, pair[1].path, delta, recipe, bits, NATIVE, tuned, device)
        reconstruct_checkpoint(pair[0].path, delta, out)
        rows.append(describe("native", dtype, recipe, bits) | judge.measure(out))
        print(rows[-1], flush=True)
    return rows


def compress(
    base: Path,
    tuned: Path,
    out: Path,
    recipe: str,
    bits: float,
    precision: str,
    texts: Checkpoint,
    device: str,
) -> None:
    text = texts.path / "calibration.jsonl"
    compress_checkpoint(
        base,
        tuned,
        out,
        get_recipe(recipe, matrix_bits=bits),
        calibration=text if text.is_file() else None,
        backbone_precision=precision,
        device=device,
    )


def describe(delta: str, backbone: str, recipe: str = "", bits: float = 0.0) -> dict[str, Any]:
    return {"backbone": backbone, "delta": delta, "recipe": recipe, "matrix_bits": bits}


def run_schemes(
    base: Checkpoint, tuned: Checkpoint, work: Path, device: str
) -> list[dict[str, Any]]:
    """Backbones served with fewer bits: alone, with an uncorrected and with a folded delta."""
    judge = Judge(base, tuned, device)
    rows = [describe("none", NATIVE) | judge.backbone]
    native: dict[tuple[str, float], Path] = {}
    for recipe, bits in DELTAS:
        native[recipe, bits] = delta = work / f"native-{recipe}-{bits}"
        compress(base.path, tuned.path, delta, recipe, bits, NATIVE, tuned, device)
        reconstruct_checkpoint(base.path, delta, work / f"{delta.name}-full")
        found = judge.measure(work / f"{delta.name}-full")
        rows.append(describe("native", NATIVE, recipe, bits) | found)
        print(rows[-1], flush=True)
    for scheme in SCHEMES:
        precision = plan_precision(scheme, base.layout)
        served = at_precision(base, precision)
        write_served(served, work / f"{scheme}-backbone")
        write_served(at_precision(tuned, precision), work / f"{scheme}-tuned")
        subjects = {
            ("none", "", 0.0): work / f"{scheme}-backbone",
            ("fine-tune rounded too", "", 0.0): work / f"{scheme}-tuned",
        }
        for recipe, bits in DELTAS:
            name = f"{scheme}-{recipe}-{bits}"
            plain = apply_uncorrected(
                served, native[recipe, bits], tuned, work / f"{name}-uncorrected"
            )
            subjects["uncorrected", recipe, bits] = plain
            folded, out = work / name, work / f"{name}-folded"
            compress(base.path, tuned.path, folded, recipe, bits, scheme, tuned, device)
            reconstruct_checkpoint(base.path, folded, out)
            subjects["folded", recipe, bits] = out
        for (kind, recipe, bits), folder in subjects.items():
            rows.append(describe(kind, scheme, recipe, bits) | judge.measure(folder))
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path)
    parser.add_argument("--tuned", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    if (args.base is None) != (args.tuned is None):
        parser.error("--base and --tuned go together")
    pairs = [(EXAMPLES / "backbone", EXAMPLES / name) for name in ("dates", "extraction")]
    if args.base is not None:
        pairs = [(args.base, args.tuned)]
    record: dict[str, Any] = {
        "commit": args.commit,
        "device": args.device,
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "pairs": {},
    }
    for base_dir, tuned_dir in pairs:
        base, tuned = open_checkpoint(base_dir), open_checkpoint(tuned_dir)
        with tempfile.TemporaryDirectory() as work:
            rows = run_dtypes(base, tuned, Path(work), args.device)
            rows += run_schemes(base, tuned, Path(work), args.device)
        record["pairs"][f"{base_dir.name}/{tuned_dir.name}"] = rows
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
