"""Compare exact ways to keep a fine-tune, in whole-file bytes, each checked by restoring it.

    python benchmarks/lossless.py --out docs/benchmarks/lossless.json [--zipnn FOLDER]
    python benchmarks/lossless.py --base BASE --tuned TUNED --out OUT.json

`--zipnn` is a folder that holds a built `zipnn` package (it is no dependency of this project).
Speeds are megabytes of the fine-tune's weight files per second, the best of three runs. `lossless`
and `datafree + residual` are timed as whole commands: reading, hashing and writing included; the
others work on bytes in memory.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from deltacome_core.checkpoint import Checkpoint, hash_tensors, open_checkpoint
from deltacome_core.compress import compress_checkpoint
from deltacome_core.inspection import inspect_delta
from deltacome_core.lossless import ZSTD_VERSION
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint
from deltacome_core.residual_writer import write_residual
from deltacome_core.tensors import load_tensor, tensor_bytes

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "tiny-llama"
RUNS = 3
ZIPNN_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one method made of the weight files; `n_bytes` counts everything it must keep."""

    method: str
    n_bytes: int
    encode_s: float
    decode_s: float


def best_of(action: Callable[[int], Any]) -> tuple[float, Any]:
    """Return the shortest wall time of RUNS calls and the last result."""
    seconds, made = float("inf"), None
    for number in range(RUNS):
        started = time.perf_counter()
        made = action(number)
        seconds = min(seconds, time.perf_counter() - started)
    return seconds, made


def measure_bytes(
    method: str,
    raw: bytes,
    encode: Callable[[bytes], bytes],
    decode: Callable[[bytes], bytes],
    *,
    more_bytes: int = 0,
) -> Result:
    encode_s, coded = best_of(lambda _: encode(raw))
    decode_s, back = best_of(lambda _: decode(coded))
    if bytes(back) != raw:
        raise SystemExit(f"{method} did not restore the bytes")
    return Result(
        method=method, n_bytes=len(coded) + more_bytes, encode_s=encode_s, decode_s=decode_s
    )


def run_zstd(raw: bytes, level: int) -> Result:
    compressor, decompressor = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    return measure_bytes(f"zstd -{level}", raw, compressor.compress, decompressor.decompress)


def xor_aligned(base: Checkpoint, tuned: Checkpoint, raw: bytes) -> Callable[[bytes], bytes]:
    """Return the mapping that XORs every tensor with its base and is its own inverse."""
    mask = np.zeros(len(raw), dtype=np.uint8)
    start = 0
    for path in tuned.files:
        for name, at in tuned.tensors.items():
            if at.file == path and base.layout.get(name) == tuned.layout[name]:
                old = np.frombuffer(tensor_bytes(load_tensor(base, name)), dtype=np.uint8)
                mask[start + at.start : start + at.start + len(old)] = old
        start += path.stat().st_size
    return lambda data: (np.frombuffer(data, dtype=np.uint8) ^ mask).tobytes()


def run_bitx(base: Checkpoint, tuned: Checkpoint, raw: bytes, level: int) -> Result:
    flip = xor_aligned(base, tuned, raw)
    compressor, decompressor = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    return measure_bytes(
        f"BitX (xor, zstd -{level})",
        raw,
        lambda data: compressor.compress(flip(data)),
        lambda data: flip(decompressor.decompress(data)),
    )


def run_zipnn(zipnn: Any, tuned: Checkpoint, raw: bytes) -> Result:
    coder = zipnn.ZipNN(input_format="byte", bytearray_dtype=ZIPNN_DTYPES[tuned.dtype], threads=1)
    # ZipNN works in place.
    return measure_bytes(
        "ZipNN",
        raw,
        lambda data: coder.compress(bytearray(data)),
        lambda data: coder.decompress(bytearray(data)),
    )


def check_same(out: Path, tuned: Checkpoint) -> None:
    if hash_tensors(open_checkpoint(out)) != hash_tensors(tuned):
        raise SystemExit(f"{out} is not the fine-tune")


def run_lossless(base: Checkpoint, tuned: Checkpoint, work: Path) -> Result:
    recipe = get_recipe("lossless")

    def encode(number: int) -> Path:
        out = work / f"lossless-{number}"
        compress_checkpoint(base.path, tuned.path, out, recipe)
        return out

    encode_s, delta = best_of(encode)

    def decode(number: int) -> Path:
        out = work / f"exact-{number}"
        reconstruct_checkpoint(base.path, delta, out)
        return out

    decode_s, out = best_of(decode)
    check_same(out, tuned)
    n_bytes = inspect_delta(delta).total_bytes
    return Result(method="lossless", n_bytes=n_bytes, encode_s=encode_s, decode_s=decode_s)


def run_residual(base: Checkpoint, tuned: Checkpoint, work: Path) -> tuple[Result, dict[str, int]]:
    delta = work / "datafree"
    started = time.perf_counter()
    compress_checkpoint(base.path, tuned.path, delta, get_recipe("datafree"))
    compress_s = time.perf_counter() - started

    def encode(number: int) -> Path:
        out = work / f"residual-{number}.safetensors"
        write_residual(base.path, tuned.path, delta, out)
        return out

    encode_s, residual = best_of(encode)

    def decode(number: int) -> Path:
        out = work / f"upgraded-{number}"
        reconstruct_checkpoint(base.path, delta, out, residual=residual)
        return out

    decode_s, out = best_of(decode)
    check_same(out, tuned)
    parts = {
        "delta": inspect_delta(delta).total_bytes,
        "residual": residual.stat().st_size,
    }
    result = Result(
        method="datafree + residual",
        n_bytes=sum(parts.values()),
        encode_s=compress_s + encode_s,
        decode_s=decode_s,
    )
    return result, parts


def run_pair(base_dir: Path, tuned_dir: Path, zipnn: Any) -> dict[str, Any]:
    base, tuned = open_checkpoint(base_dir), open_checkpoint(tuned_dir)
    raw = b"".join(path.read_bytes() for path in tuned.files)
    with tempfile.TemporaryDirectory() as work:
        upgraded, parts = run_residual(base, tuned, Path(work))
        results = [run_lossless(base, tuned, Path(work)), upgraded]
    results += [run_zstd(raw, level) for level in (3, 19)]
    results += [run_bitx(base, tuned, raw, level) for level in (3, 19)]
    if zipnn is not None:
        results.append(run_zipnn(zipnn, tuned, raw))
    megabytes = len(raw) / 1e6
    rows = [
        {
            "method": result.method,
            "bytes": result.n_bytes,
            "ratio": round(len(raw) / result.n_bytes, 4),
            "encode_mb_s": round(megabytes / result.encode_s, 1),
            "decode_mb_s": round(megabytes / result.decode_s, 1),
        }
        for result in results
    ]
    best = min(row["bytes"] for row in rows[2:])
    return {
        "pair": f"{base_dir.name}/{tuned_dir.name}",
        "dtype": tuned.dtype,
        "weight_file_bytes": len(raw),
        "rows": rows,
        "residual_parts": parts,
        "lossless_over_best_other": round(rows[0]["bytes"] / best, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path)
    parser.add_argument("--tuned", type=Path)
    parser.add_argument("--zipnn", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    if (args.base is None) != (args.tuned is None):
        parser.error("--base and --tuned go together")
    pairs = [(EXAMPLES / "backbone", EXAMPLES / name) for name in ("dates", "extraction")]
    if args.base is not None:
        pairs = [(args.base, args.tuned)]
    zipnn = None
    if args.zipnn is not None:
        sys.path.append(str(args.zipnn))
        zipnn = importlib.import_module("zipnn")
    record = {
        "cpu_cores": os.cpu_count(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "zstandard")}
        | {"zstd": ZSTD_VERSION, "zipnn": None if zipnn is None else version("zipnn")},
        "commit": args.commit,
        "pairs": [run_pair(base, tuned, zipnn) for base, tuned in pairs],
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
