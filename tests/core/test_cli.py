import json
import shutil
import subprocess
import sys
from dataclasses import replace

import finetunes
import pytest

from deltacome_core import cli, distil_schedule
from deltacome_core.checkpoint import open_checkpoint

CHECK_IMPORTS = """
import sys
from deltacome_core import cli
try:
    cli.main(["--help"])
except SystemExit as end:
    assert end.code == 0, end.code
slow = {"torch", "transformers", "numpy", "rich", "httpx", "safetensors"} & sys.modules.keys()
assert not slow, slow
"""


@pytest.fixture
def run(capfd):
    """Return a function that runs the command and gives exit code, stdout and stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return end.value.code, out, err

    return call


def pair_options(pair):
    return ["--base", pair[0], "--tuned", pair[1]]


def test_help_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", CHECK_IMPORTS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in (
        "compress",
        "plan",
        "fit",
        "inspect",
        "verify",
        "evaluate",
        "reconstruct",
        "residual",
        "push",
        "pull",
    ):
        assert f"\n  {command} " in done.stdout


def test_compress_prints_one_json_object_and_talks_on_stderr(run, trained_pair, tmp_path):
    options = [*pair_options(trained_pair), "--out", tmp_path / "d", "--bits-per-param", "4"]
    code, out, err = run("compress", *options, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["ratio"] > 4
    assert report.keys() >= {
        "seconds", "peak_host_bytes", "peak_gpu_bytes", "total_bytes", "ratio", "bits_per_param"
    }  # fmt: skip
    assert report["mode"] == "calibrated"
    assert report["stages"].keys() == {"scan", "calibrate", "matrices", "wait", "write", "join"}
    assert all(0 < seconds < report["seconds"] for seconds in report["stages"].values())
    assert "layer 1/3 model.layers.0: 7 matrices" in err


def test_a_recipe_that_trains_tells_its_steps(run, trained_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(distil_schedule, "ON_CPU", replace(distil_schedule.ON_CPU, steps=20))
    options = [*pair_options(trained_pair), "--out", tmp_path / "d", "--recipe", "distilled"]
    code, _, err = run("compress", *options, "--bits-per-param", "4")
    assert code == 0
    told = [line for line in err.splitlines() if line.startswith("training step ")]
    assert told == ["training step 10/20", "training step 20/20"]


def test_devices_that_are_not_there_are_refused(run, trained_pair, tmp_path):
    options = [*pair_options(trained_pair), "--out", tmp_path / "d", "--devices", "0,99"]
    code, out, _ = run("compress", *options, "--json")
    assert code == 1
    assert json.loads(out)["error"]["code"] == "device_unavailable"


def test_without_json_stdout_stays_empty(run, trained_pair, tmp_path):
    options = [*pair_options(trained_pair), "--out", tmp_path / "d", "--recipe", "datafree"]
    code, out, err = run("compress", *options)
    assert (code, out) == (0, "")
    assert "x smaller" in err


def test_inspect_counts_every_byte(run, trained_delta):
    code, out, _ = run("inspect", trained_delta, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["bytes"].keys() == {"codes", "scales", "embeddings", "exact", "coded", "header"}
    assert sum(report["bytes"].values()) == report["total_bytes"]
    assert report["ratio"] > 4
    assert report["bits_per_param"] < 8


def test_fit_counts_what_a_card_holds(run, trained_pair, trained_delta):
    arguments = ["fit", "--base", trained_pair[0], trained_delta, "--kv-tokens", 100, "--json"]
    code, out, err = run(*arguments, "--gpu", 8)
    found = json.loads(out)
    assert code == 0
    assert found["fits"]
    assert found["card_bytes"] == 8_000_000_000
    used = found["total_bytes"] + (found["room"] - 1) * found["delta_bytes"]
    assert used <= found["card_bytes"] < used + found["delta_bytes"]
    assert f"{found['room']} such deltas fit in 8 GB." in err
    code, out, err = run(*arguments, "--gpu", 2)
    assert (json.loads(out)["fits"], json.loads(out)["room"]) == (False, 0)
    assert "missing" in err


def test_verify_grades_and_leaves_its_report(run, trained_pair, trained_delta, tmp_path):
    delta = shutil.copytree(trained_delta, tmp_path / "delta")
    prompts = finetunes.write_items(tmp_path / "p.jsonl")
    options = [*pair_options(trained_pair), "--delta", delta, "--prompts", prompts]
    code, out, err = run("verify", *options, "--json")
    report = json.loads(out)
    assert code == 0
    assert report.keys() >= {
        "kl", "top1", "ppl_ratio", "recovery", "greedy_match", "grade", "worst_matrices"
    }  # fmt: skip
    assert json.loads((delta / "verification.json").read_text()) == report
    assert err.startswith("grade A")


def test_verify_exits_1_when_the_delta_fails(run, trained_pair, trained_delta, tmp_path):
    delta = shutil.copytree(trained_delta, tmp_path / "delta")
    other = finetunes.save(finetunes.perturb(finetunes.make_model(), size=0.1), tmp_path / "other")
    code, _, err = run("verify", "--base", trained_pair[0], "--tuned", other, "--delta", delta)
    assert code == 1
    assert "FAILED" in err.splitlines()[1]


def test_reconstruct_writes_the_asked_dtype(run, trained_pair, trained_delta, tmp_path):
    options = ["--base", trained_pair[0], "--delta", trained_delta, "--out", tmp_path / "back"]
    code, out, _ = run("reconstruct", *options, "--dtype", "bfloat16", "--json")
    assert code == 0
    assert json.loads(out)["n_tensors"] == 21
    assert open_checkpoint(tmp_path / "back").dtype == "BF16"


def test_evaluate_compares_all_three(run, trained_pair, trained_delta):
    items = trained_pair[1] / "evaluation.jsonl"
    options = [*pair_options(trained_pair), "--delta", trained_delta, "--items", items]
    code, out, err = run("evaluate", *options, "--json")
    report = json.loads(out)
    assert code == 0
    assert [report[s]["accuracy"] for s in ("backbone", "finetune", "delta")] == [0.0, 1.0, 1.0]
    assert len(err.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["compress"], 2), (["unknown"], 2), (["inspect", "/nowhere/at/all"], 1)],
)
def test_wrong_usage_and_failures_have_their_exit_codes(run, arguments, code):
    assert run(*arguments)[0] == code


def test_a_foreign_backbone_exits_12(run, trained_pair, trained_delta, tmp_path):
    other = finetunes.save(finetunes.make_model(seed=9), tmp_path / "other")
    options = ["--base", other, "--delta", trained_delta, "--out", tmp_path / "back"]
    assert run("reconstruct", *options)[0] == 12
    small = finetunes.save(finetunes.make_model(num_hidden_layers=1), tmp_path / "small")
    pair = ["--base", trained_pair[0], "--tuned", small]
    assert run("compress", *pair, "--out", tmp_path / "d")[0] == 12
    assert run("plan", *pair)[0] == 12
    pair[-1] = other
    assert run("plan", *pair, "--measure")[0] == 12
    code, _, err = run("compress", *pair, "--out", tmp_path / "d", "--recipe", "bitdelta")
    assert code == 12
    assert "[backbone_unrelated]" in err
    options = ["--out", tmp_path / "d", "--recipe", "bitdelta", "--force"]
    code, _, err = run("compress", *pair, *options)
    assert code == 0
    assert "run `deltacome verify`" in err


def test_a_plan_of_an_impossible_budget_fails_and_says_what_is_possible(run, trained_pair):
    pair = ["--base", trained_pair[0], "--tuned", trained_pair[1]]
    code, out, err = run("plan", *pair, "--ratio", 100_000, "--json")
    assert code == 1
    assert "impossible, the smallest is" in err
    assert json.loads(out)["rows"][0]["smallest_bytes"] > 0


def test_a_damaged_delta_exits_7_and_says_so_in_json(run, trained_pair, trained_delta, tmp_path):
    delta = shutil.copytree(trained_delta, tmp_path / "delta")
    data = delta / "delta.safetensors"
    data.write_bytes(data.read_bytes()[:-1] + b"\x7f")
    options = ["--base", trained_pair[0], "--delta", delta, "--out", tmp_path / "back"]
    code, out, err = run("reconstruct", *options, "--json")
    failure = json.loads(out)["error"]
    assert code == 7
    assert failure["code"] == "file_digest_mismatch"
    assert f"{failure['message']} [file_digest_mismatch]" == err.strip()


def test_an_unknown_recipe_or_dtype_is_named(run, trained_pair, trained_delta, tmp_path):
    options = [*pair_options(trained_pair), "--out", tmp_path / "d", "--recipe", "magic"]
    code, _, err = run("compress", *options)
    assert code == 1
    assert "magic is not a recipe" in err
    assert "hub, lossless, lowrank" in err
    options = ["--base", trained_pair[0], "--delta", trained_delta, "--out", tmp_path / "back"]
    code, _, err = run("reconstruct", *options, "--dtype", "float7")
    assert code == 1
    assert "float7" in err


def test_pull_from_a_hub_that_is_not_there_fails_with_a_text(run, tmp_path, monkeypatch):
    monkeypatch.setattr("deltacome_core.client.FIRST_PAUSE_S", 0.0)
    options = ["--url", "http://127.0.0.1:9", "--token", "dch_none"]
    code, _, err = run("pull", "acme/model", tmp_path / "x", *options)
    assert code == 1
    assert "hub" in err.lower()


def test_a_fine_tune_that_equals_its_backbone_is_said_to_cost_nothing(run, trained_pair, tmp_path):
    options = ["--base", trained_pair[0], "--tuned", trained_pair[0], "--out", tmp_path / "delta"]
    code, out, err = run("compress", *options, "--recipe", "datafree", "--json")
    assert code == 0
    assert json.loads(out)["payload_bytes"] == 0
    assert "equals the backbone: 0 bytes" in err
