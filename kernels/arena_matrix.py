"""Compile the arena kernels ahead of time for every supported architecture; needs no GPU.

`python -m kernels.arena_matrix` prints one object and exits with 1 if a kernel does not compile,
does not fit the shared memory of its architecture, or does not keep one element a thread: that
element i of a tensor is in thread i is what lets the matrix instruction be issued at all
(docs/adr/0014). Unfolding must store 16 bytes at a time where rows allow it. TRITON_INTERPRET must
be unset.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from kernels.compile_matrix import WARP_SIZE
from kernels.config import SHARED_LIMIT_BYTES
from kernels.fragments import FAST_PLANES, PLANES
from kernels.triton_ops.batch_expand import batch_expand_kernel
from kernels.triton_ops.batch_shrink import batch_shrink_kernel
from kernels.triton_ops.gather import gather_kernel, project_kernel
from kernels.triton_ops.layer import layer_kernel
from kernels.triton_ops.prepare import prepare_kernel
from kernels.triton_ops.product import product_kernel
from kernels.triton_ops.repack import repack_kernel
from kernels.triton_ops.unfold import unfold_kernel

KERNELS: Final[dict[str, Any]] = {
    "prepare": prepare_kernel,
    "shrink": batch_shrink_kernel,
    "expand": batch_expand_kernel,
    "layer": layer_kernel,
    "repack": repack_kernel,
    "unfold": unfold_kernel,
    "product": product_kernel,
    "gather": gather_kernel,
    "project": project_kernel,
}
_WIDE_STORE: Final = "st.global.v4.b32"
INSTRUCTION: Final = "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
ON_TENSOR_CORES: Final = ("shrink", "expand", "layer")
_POINTERS: Final = {
    "planes_ptr": "*i64",
    "hidden_ptr": "*i64",
    "step_ptr": "*fp32",
    "norm_ptr": "*fp32",
    "term_ptr": "*fp32",
    "sums_ptr": "*i64",
    "hidden_sums_ptr": "*i64",
    "product_ptr": "*fp32",
    "table_ptr": "*i64",
    "jobs_ptr": "*i64",
    "source_ptr": "i64",
    "slab_ptr": "i64",
}
_OF_THE_MODEL: Final = {
    "x_ptr",
    "y_ptr",
    "out_ptr",
    "weight_ptr",
    "bias_ptr",
    "left_ptr",
    "right_ptr",
    "base_ptr",
}
_ALL_WIDTHS: Final = (1, 2, 3, 4, 8)
# Overlapping launches need Hopper.
_OVERLAP_FROM: Final = 90
_INLINE = re.compile(r"tt\.elementwise_inline_asm.*?-> tensor<\d+xi32, (#\w+)>")
_LAYOUT = re.compile(r"^(#\w+) = #ttg\.blocked<\{(.*?)\}>", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaVariant:
    """One compiled kernel: widths it reads, scales for tiles or not, planes."""

    kernel: str
    arch: int
    dtype: str
    widths: tuple[int, ...]
    has_groups: bool
    planes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaResult:
    """What came out of the compiler for one variant."""

    variant: ArenaVariant
    shared_bytes: int
    keeps_one_element_a_thread: bool
    keeps_wide_stores: bool
    error: str | None

    @property
    def is_fit(self) -> bool:
        fits = self.shared_bytes <= SHARED_LIMIT_BYTES[self.variant.arch]
        kept = self.keeps_one_element_a_thread and self.keeps_wide_stores
        return self.error is None and fits and kept


def list_variants() -> Iterator[ArenaVariant]:
    """All widths and groupings on the newest architecture, turns of them on the others."""
    newest = max(SHARED_LIMIT_BYTES)
    for turn, arch in enumerate(SHARED_LIMIT_BYTES):
        for kernel in KERNELS:
            # A layer sums its delta as `expand` does: once with all widths is enough.
            every = arch == newest and kernel != "layer"
            widths = _ALL_WIDTHS if every else (_ALL_WIDTHS[turn + 1],)
            yield ArenaVariant(
                kernel=kernel,
                arch=arch,
                dtype=("bf16", "fp16", "fp32")[turn % 3],
                widths=widths,
                has_groups=turn % 2 == 1,
                planes=FAST_PLANES if turn % 2 else PLANES,
            )


def _constants(variant: ArenaVariant) -> dict[str, Any]:
    return {
        "P": variant.planes,
        "N_PLANES": variant.planes,
        "WIDTHS": sum(1 << bits for bits in variant.widths),
        "BITS": variant.widths[0],
        "HAS_GROUPS": variant.has_groups,
        "IS_PLAIN": not variant.has_groups,
        "IS_GROUPED": variant.has_groups,
        "HAS_ZERO": True,
        "IS_ALIGNED": variant.dtype != "fp32",
        "HAS_DIRECT": True,
        "HAS_FACTORS": True,
        "HAS_BIAS": True,
        "SHRINKS": 0 if variant.has_groups else 2,
        "HAS_BASIS": True,
        "ROWS": 16,
        "BLOCK_M": 128,
        "BLOCK_N": 128,
        "BLOCK_K": 32,
        "BLOCK_R": 8,
        "BAND": 8,
        "STAGES": 3,
        "TURNS": 1 if variant.has_groups else 2,
        "TOKENS": 1 if variant.has_groups else 2,
        "TOKENS_FIRST": variant.arch >= _OVERLAP_FROM,
        "R": 2,
        "SUMS": 128,
        "WK": 2,
        "WR": 2,
        "U": 2,
        "NARROW": variant.planes == PLANES,
        "X_AHEAD": variant.arch >= _OVERLAP_FROM,
        "USE_PTX": True,
        "OVERLAP": variant.arch >= _OVERLAP_FROM,
        "BLOCK": 256,
        "THREADS": 128,
        "SMALLEST": 128,
        "CHUNKS": 2,
        "COLUMNS": 1,
        "WARPS": 4,
    }


def _argument_type(name: str, variant: ArenaVariant) -> str:
    if name in _OF_THE_MODEL:
        return f"*{variant.dtype}"
    if name == "planes_ptr" and variant.kernel == "prepare":
        return "*i32"
    if name == "hidden_ptr" and variant.kernel in {"shrink", "project"}:
        return "*i32" if variant.kernel == "shrink" else "*fp32"
    if name == "scale":
        return "fp32"
    return _POINTERS.get(name, "*i32" if name.endswith("_ptr") else "i32")


def keeps_one_element(ttgir: str) -> bool:
    """Whether every inline instruction works on one element of each thread, in their order.

    Args:
        ttgir: the compiler's last form that still has layouts.

    Returns:
        True also where there is no inline instruction.
    """
    layouts = dict(_LAYOUT.findall(ttgir))
    wanted = ("sizePerThread = [1]", "threadsPerWarp = [32]", "order = [0]")
    used = {layouts.get(name, "") for name in _INLINE.findall(ttgir)}
    return all(part in layout for layout in used for part in wanted)


def compile_variant(variant: ArenaVariant) -> ArenaResult:
    """Compile one kernel to machine code.

    Args:
        variant: what to compile.

    Returns:
        Its shared memory and layouts, or the compiler's message.
    """
    kernel = KERNELS[variant.kernel]
    constants = _constants(variant)
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={
            name: "constexpr" if name in constants else _argument_type(name, variant)
            for name in names
        },
        constexprs={name: constants[name] for name in names if name in constants},
        attrs={
            (position,): [["tt.divisibility", 16]]
            for position, name in enumerate(names)
            if name.endswith("_ptr") and name not in {"source_ptr", "slab_ptr"}
        },
    )
    target = GPUTarget("cuda", variant.arch, WARP_SIZE)
    try:
        compiled = triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 1})
    except (TritonError, RuntimeError) as error:
        return ArenaResult(
            variant=variant,
            shared_bytes=0,
            keeps_one_element_a_thread=False,
            keeps_wide_stores=False,
            error=str(error),
        )
    has_instruction = INSTRUCTION in compiled.asm["ptx"]
    return ArenaResult(
        variant=variant,
        shared_bytes=compiled.metadata.shared,
        keeps_one_element_a_thread=keeps_one_element(compiled.asm["ttgir"])
        and has_instruction == (variant.kernel in ON_TENSOR_CORES),
        keeps_wide_stores=_WIDE_STORE in compiled.asm["ptx"]
        or variant.kernel != "unfold"
        or not constants["IS_ALIGNED"],
        error=None,
    )


def main() -> int:
    """Compile all variants; 0 if each one fits its architecture."""
    parser = argparse.ArgumentParser(prog="python -m kernels.arena_matrix")
    parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    with tempfile.TemporaryDirectory() as cache_dir, triton.knobs.cache.scope():
        # A warm cache would answer for the compiler.
        triton.knobs.cache.dir = cache_dir
        results = [compile_variant(variant) for variant in list_variants()]
    passed = all(result.is_fit for result in results)
    report = {
        "triton": triton.__version__,
        "variants": [asdict(result) | {"passed": result.is_fit} for result in results],
        "passed": passed,
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
