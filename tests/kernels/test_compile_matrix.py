import json
import os
import subprocess
import sys
from itertools import product

import pytest

from kernels import compile_matrix
from kernels.compile_matrix import ARCHITECTURES, BITS, DTYPES, KERNELS, VARIANTS, Result


def run_compiler(**changes):
    environment = {**os.environ, **changes}
    command = [sys.executable, "-m", "kernels.compile_matrix", "--json"]
    return subprocess.run(
        command,
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_variant_compiles_and_fits_its_architecture(tmp_path):
    run = run_compiler(TRITON_INTERPRET=None, TRITON_CACHE_DIR=str(tmp_path))
    report = json.loads(run.stdout)
    failed = [row for row in report["variants"] if row["error"] or not row["cubin_bytes"]]
    assert failed == []
    assert all(0 <= row["shared_bytes"] <= row["shared_limit_bytes"] for row in report["variants"])
    assert len(report["variants"]) == len(VARIANTS)
    assert report["passed"]
    assert run.returncode == 0


def test_the_interpreter_cannot_pass_for_the_compiler():
    run = run_compiler(TRITON_INTERPRET="1")
    assert run.returncode == 2
    assert "TRITON_INTERPRET" in run.stderr


def test_the_newest_architecture_sees_every_width_of_every_kernel():
    newest = [variant for variant in VARIANTS if variant.arch == ARCHITECTURES[-1]]
    assert {(v.op, v.bits) for v in newest} == set(product(KERNELS, BITS))
    assert {(v.op, v.dtype) for v in newest} == set(product(KERNELS, DTYPES))
    assert {(v.bits, v.dtype) for v in newest} == set(product(BITS, DTYPES))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_sees_every_kernel_and_dtype_and_every_width(arch):
    variants = [variant for variant in VARIANTS if variant.arch == arch]
    assert {(v.op, v.dtype) for v in variants} == set(product(KERNELS, DTYPES))
    assert {v.bits for v in variants} == set(BITS)


def test_the_older_architectures_see_every_width_of_every_kernel_and_both_switches():
    older = [variant for variant in VARIANTS if variant.arch != ARCHITECTURES[-1]]
    assert {(v.op, v.bits) for v in older} == set(product(KERNELS, BITS))
    switches = {(v.arch, v.has_zero, v.is_aligned) for v in older}
    assert switches == set(product(ARCHITECTURES[:-1], (True, False), (True, False)))


@pytest.mark.parametrize(
    "fault", [{"cubin_bytes": 0}, {"shared_bytes": 228 * 1024}, {"error": "no"}], ids=str
)
def test_a_variant_that_does_not_fit_fails_the_run(fault, monkeypatch, capsys):
    good = {"variant": VARIANTS[0], "cubin_bytes": 9, "shared_bytes": 0, "error": None}
    assert Result(**good).is_fit
    monkeypatch.setattr(compile_matrix, "VARIANTS", VARIANTS[:1])
    monkeypatch.setattr(compile_matrix, "compile_variant", lambda _: Result(**good | fault))
    monkeypatch.setattr(compile_matrix.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(sys, "argv", ["compile_matrix", "--json"])
    assert compile_matrix.main() == 1
    assert not json.loads(capsys.readouterr().out)["passed"]
