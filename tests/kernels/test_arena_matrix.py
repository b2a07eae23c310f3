import json
import os
import subprocess
import sys

from kernels.arena_matrix import KERNELS, keeps_one_element, list_variants
from kernels.config import SHARED_LIMIT_BYTES

PLAIN = """
#blocked = #ttg.blocked<{sizePerThread = [1], threadsPerWarp = [32], order = [0]}>
#wide = #ttg.blocked<{sizePerThread = [2], threadsPerWarp = [32], order = [0]}>
%1:4 = tt.elementwise_inline_asm "mma" : tensor<128xi32, LAYOUT> -> tensor<128xi32, LAYOUT>
"""


def run_compiler(**changes):
    environment = {**os.environ, **changes}
    return subprocess.run(
        [sys.executable, "-m", "kernels.arena_matrix"],
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_arena_kernel_compiles_for_every_architecture():
    run = run_compiler(TRITON_INTERPRET=None)
    report = json.loads(run.stdout)
    assert [row for row in report["variants"] if not row["passed"]] == []
    assert report["passed"]
    assert run.returncode == 0
    seen = {(row["variant"]["kernel"], row["variant"]["arch"]) for row in report["variants"]}
    assert seen == {(kernel, arch) for kernel in KERNELS for arch in SHARED_LIMIT_BYTES}


def test_the_interpreter_cannot_pass_for_the_compiler():
    assert run_compiler(TRITON_INTERPRET="1").returncode == 2


def test_every_width_and_grouping_is_compiled():
    variants = list(list_variants())
    assert {bits for variant in variants for bits in variant.widths} == {1, 2, 3, 4, 8}
    assert {variant.has_groups for variant in variants} == {False, True}


def test_a_layout_of_two_elements_a_thread_is_seen():
    assert keeps_one_element(PLAIN.replace("LAYOUT", "#blocked"))
    assert not keeps_one_element(PLAIN.replace("LAYOUT", "#wide"))
