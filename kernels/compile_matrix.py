"""Compile the kernels ahead of time for every supported architecture; needs no GPU.

`python -m kernels.compile_matrix --json` prints one object and exits with 1 if a variant does not
compile or does not fit the shared memory of its architecture. TRITON_INTERPRET must be unset.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Final, Literal

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from kernels.config import SHARED_LIMIT_BYTES, Blocks, Op, choose_blocks
from kernels.triton_ops.dequantise import dequantise_kernel
from kernels.triton_ops.direct import merge_direct_kernel, multiply_kernel
from kernels.triton_ops.expand import expand_kernel
from kernels.triton_ops.merge import merge_kernel
from kernels.triton_ops.shrink import shrink_kernel

Dtype = Literal["bf16", "fp16", "fp32"]

KERNELS: Final[dict[Op, Any]] = {
    "dequantise": dequantise_kernel,
    "shrink": shrink_kernel,
    "expand": expand_kernel,
    "merge": merge_kernel,
    "multiply": multiply_kernel,
    "merge_direct": merge_direct_kernel,
}
BITS: Final = (1, 2, 3, 4, 8)
DTYPES: Final[tuple[Dtype, ...]] = ("bf16", "fp16", "fp32")
ARCHITECTURES: Final = tuple(SHARED_LIMIT_BYTES)
# One token takes the decode blocks, more take the prefill blocks; the others have one kind.
TOKENS: Final[dict[Op, tuple[int, ...]]] = {
    "dequantise": (1,),
    "shrink": (1, 16),
    "expand": (1, 16),
    "merge": (1,),
    "multiply": (1, 16),
    "merge_direct": (1,),
}
WARP_SIZE: Final = 32
# Integers a launch finds to be multiples of 16 on the matrices of real models.
_ALIGNED_SIZES: Final = ("_stride", "n_rows", "n_cols", "row_words")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One compiled kernel; aligned means that sizes and addresses are multiples of 16."""

    op: Op
    bits: int
    dtype: Dtype
    arch: int
    n_tokens: int
    has_zero: bool
    is_aligned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came out of the compiler for one variant."""

    variant: Variant
    cubin_bytes: int
    shared_bytes: int
    error: str | None

    @property
    def is_fit(self) -> bool:
        limit_bytes = SHARED_LIMIT_BYTES[self.variant.arch]
        return self.error is None and self.cubin_bytes > 0 and self.shared_bytes <= limit_bytes


def _list_variants() -> Iterator[Variant]:
    """Every width of every kernel on the newest architecture, every dtype of it on the others.

    Widths, dtypes, architectures and the two switches meet in different lines of a kernel, so what
    is not listed takes turns: each architecture sees each width, each dtype and both switches.
    """
    newest = ARCHITECTURES[-1]
    shapes = [(op, n_tokens) for op in KERNELS for n_tokens in TOKENS[op]]
    for (shape, (op, n_tokens)), (turn, bits) in product(enumerate(shapes), enumerate(BITS)):
        yield Variant(
            op=op,
            bits=bits,
            dtype=DTYPES[(shape + turn) % len(DTYPES)],
            arch=newest,
            n_tokens=n_tokens,
            has_zero=True,
            is_aligned=True,
        )
    combinations = product(ARCHITECTURES[:-1], shapes, DTYPES)
    for turn, (arch, (op, n_tokens), dtype) in enumerate(combinations):
        yield Variant(
            op=op,
            bits=BITS[turn % len(BITS)],
            dtype=dtype,
            arch=arch,
            n_tokens=n_tokens,
            has_zero=turn % 2 == 0,
            is_aligned=turn // 2 % 2 == 0,
        )


VARIANTS: Final = tuple(_list_variants())


def _constants(variant: Variant, blocks: Blocks) -> dict[str, int | bool]:
    return {
        "BITS": variant.bits,
        "HAS_ZERO": variant.has_zero,
        "U_HAS_ZERO": variant.has_zero,
        "V_HAS_ZERO": variant.has_zero,
        "HAS_BASE": True,
        "BLOCK_T": blocks.tokens,
        "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.columns if variant.op == "merge" else blocks.rows,
        "BLOCK_K": blocks.reduction,
    }


def _argument_type(name: str, variant: Variant) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    activation = f"*{variant.dtype}"
    return {
        "codes_ptr": "*i32",
        "scale_ptr": "*fp16",
        "zero_ptr": "*u8" if variant.has_zero else "*fp16",
        "sigma_ptr": "*fp32",
        "h_ptr": "*fp32",
        "x_ptr": activation,
        "base_ptr": activation,
        "out_ptr": "*fp32" if variant.op == "dequantise" else activation,
    }[name.removeprefix("u_").removeprefix("v_")]


def compile_variant(variant: Variant) -> Result:
    """Compile one kernel to machine code.

    Args:
        variant: What to compile.

    Returns:
        Size of the code and shared memory, or the compiler's message.
    """
    kernel = KERNELS[variant.op]
    blocks = choose_blocks(variant.op, bits=variant.bits, n_tokens=variant.n_tokens)
    constants = _constants(variant, blocks)
    signature = {
        name: "constexpr" if name in constants else _argument_type(name, variant)
        for name in kernel.arg_names
    }
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if variant.is_aligned and name.endswith(("_ptr", *_ALIGNED_SIZES))
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={name: constants[name] for name in kernel.arg_names if name in constants},
        attrs=aligned,
    )
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    target = GPUTarget("cuda", variant.arch, WARP_SIZE)
    try:
        compiled = triton.compile(source, target=target, options=options)
    except (TritonError, RuntimeError) as error:
        return Result(variant=variant, cubin_bytes=0, shared_bytes=0, error=str(error))
    return Result(
        variant=variant,
        cubin_bytes=len(compiled.asm["cubin"]),
        shared_bytes=compiled.metadata.shared,
        error=None,
    )


def _report(results: list[Result], seconds: float) -> dict[str, Any]:
    return {
        "triton": triton.__version__,
        "architectures": list(ARCHITECTURES),
        "seconds": round(seconds, 1),
        "variants": [
            asdict(result.variant)
            | {
                "cubin_bytes": result.cubin_bytes,
                "shared_bytes": result.shared_bytes,
                "shared_limit_bytes": SHARED_LIMIT_BYTES[result.variant.arch],
                "error": result.error,
            }
            for result in results
        ],
        "passed": all(result.is_fit for result in results),
    }


def main() -> int:
    """Compile all variants; 0 if each one fits its architecture."""
    parser = argparse.ArgumentParser(prog="python -m kernels.compile_matrix")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as cache_dir, triton.knobs.cache.scope():
        # A warm cache would answer for the compiler.
        triton.knobs.cache.dir = cache_dir
        results = [compile_variant(variant) for variant in VARIANTS]
    report = _report(results, time.monotonic() - started)
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        for result in results:
            state = "ok" if result.is_fit else f"failed {result.error or ''}"
            sys.stdout.write(f"{result.variant} {result.shared_bytes} B shared, {state}\n")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
