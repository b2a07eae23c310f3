import json
import sys

import pytest
import torch

import kernels
from deltacome_core.layout import PLANES
from kernels import gpu_check
from kernels.case_list import CASES, LARGE_CASES
from kernels.cases import DIRECT_OPS, LOWRANK_OPS, OPS, Case, RankBand

SMALL = [next(case for case in CASES if case.op == op) for op in OPS]


@pytest.fixture
def fake_device(monkeypatch):
    """Let the check run on this CPU: only what names the device is replaced."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "describe_device", lambda: {"device": "cpu"})
    monkeypatch.setattr(gpu_check, "CASES", SMALL)
    monkeypatch.setattr(gpu_check, "LARGE_CASES", ())
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")


def test_cases_cover_every_op_width_and_dtype():
    widths = {(case.op, width) for case in CASES for width in case.widths}
    assert widths == {(op, bits) for op in OPS for bits in PLANES}
    direct = {(case.op, bool(case.bands)) for case in CASES}
    assert direct == {(op, True) for op in LOWRANK_OPS} | {(op, False) for op in DIRECT_OPS}
    dtypes = {(case.op, case.dtype) for case in CASES if case.op != "dequantise"}
    assert dtypes == {(op, dtype) for op in OPS[1:] for dtype in kernels.ACTIVATION_DTYPES}
    assert {case.op for case in LARGE_CASES} == set(OPS)
    assert len(set(map(str, CASES))) == len(CASES)


def test_the_check_passes_and_writes_its_report(fake_device, monkeypatch, tmp_path):
    out = tmp_path / "check.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--json", str(out)])
    assert gpu_check.main() == 0
    report = json.loads(out.read_text())
    assert report["passed"]
    assert report["n_cases"] == len(OPS)
    assert set(report["max_errors"]) == set(OPS)


def test_a_wrong_op_fails_the_check(fake_device, monkeypatch, capsys):
    right = kernels.shrink
    monkeypatch.setattr(
        kernels, "shrink", lambda x, matrix, *, out: right(x, matrix, out=out).mul_(1.00001)
    )
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 1
    report = json.loads(capsys.readouterr().out)
    assert [row["op"] for row in report["cases"] if not row["passed"]] == ["shrink"]
    assert report["max_errors"]["shrink"] == pytest.approx(1e-5, rel=0.1)


def test_a_case_that_raises_fails_alone(monkeypatch):
    def explode(*args, **kwargs):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(kernels, "merge", explode)
    report = gpu_check.check_cases(SMALL, kernels, device="cpu")
    assert report["n_failed"] == 1
    (row,) = [row for row in report["cases"] if not row["passed"]]
    assert row["op"] == "merge"
    assert "illegal memory access" in row["exception"]


def test_no_cases_are_no_success():
    assert not gpu_check.check_cases([], kernels, device="cpu")["passed"]


def test_without_a_device_the_check_fails(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 1
    assert "nothing was checked" in capsys.readouterr().err


def test_large_cases_run_the_published_recipe():
    assert LARGE_CASES[0].bands == (RankBand(8, 2), RankBand(3, 32), RankBand(2, 968))
    assert isinstance(LARGE_CASES[0], Case)
