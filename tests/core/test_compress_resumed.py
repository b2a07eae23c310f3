"""A compression that is stopped, killed or spread over devices writes the same bytes."""

import signal
import subprocess
import sys
from dataclasses import replace

import finetunes
import pytest
import torch

from deltacome_core.compress import compress_checkpoint, parts_folder
from deltacome_core.errors import UserError
from deltacome_core.recipe import get_recipe

COME = get_recipe("come", matrix_bits=3.0)
FREE = get_recipe("datafree", matrix_bits=3.0)


def read_folder(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class StopError(Exception):
    pass


def stop_after(count):
    seen = []

    def on_layer(done):
        seen.append(done)
        if len(seen) == count:
            raise StopError

    return on_layer


def test_a_stopped_run_goes_on_after_its_last_layer(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path)
    with pytest.raises(StopError):
        compress_checkpoint(base, tuned, tmp_path / "delta", COME, on_layer=stop_after(1))
    assert not (tmp_path / "delta").exists()
    seen = []
    report = compress_checkpoint(base, tuned, tmp_path / "delta", COME, on_layer=seen.append)
    assert [(done.group, done.resumed) for done in seen] == [
        ("model.layers.0", True),
        ("model.layers.1", False),
        ("rest", False),
    ]
    assert report.resumed_layers == 1


def test_a_full_device_is_named_and_the_next_run_goes_on(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path)
    said = "CUDA out of memory. Tried to allocate 40.00 MiB. GPU 0 has 79 GiB, and so on."

    def fill(_done):
        raise torch.OutOfMemoryError(said)

    with pytest.raises(UserError) as caught:
        compress_checkpoint(base, tuned, tmp_path / "delta", COME, on_layer=fill)
    assert caught.value.code == "device_memory_short"
    assert "It says: CUDA out of memory. Tried to allocate 40.00 MiB." in str(caught.value)
    assert compress_checkpoint(base, tuned, tmp_path / "delta", COME).resumed_layers == 1


def test_a_run_stopped_before_the_vocabulary_writes_the_same_bytes(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path, tie_word_embeddings=True)
    recipe = replace(get_recipe("hub", matrix_bits=3.0), vocabulary_rank=16)
    compress_checkpoint(base, tuned, tmp_path / "whole", recipe)
    with pytest.raises(StopError):
        compress_checkpoint(base, tuned, tmp_path / "delta", recipe, on_layer=stop_after(2))
    report = compress_checkpoint(base, tuned, tmp_path / "delta", recipe)
    assert report.resumed_layers == 2
    assert read_folder(tmp_path / "delta") == read_folder(tmp_path / "whole")


@pytest.mark.parametrize("change", ["recipe", "calibration", "fine-tune"])
def test_parts_of_other_inputs_are_not_used(tmp_path, change):
    base, tuned = finetunes.save_pair(tmp_path)
    with pytest.raises(StopError):
        compress_checkpoint(base, tuned, tmp_path / "delta", COME, on_layer=stop_after(2))
    recipe = get_recipe("come", matrix_bits=2.9) if change == "recipe" else COME
    if change == "calibration":
        (tuned / "calibration.txt").write_text(finetunes.CALIBRATION[1:])
    if change == "fine-tune":
        finetunes.save(finetunes.perturb(finetunes.make_model(), seed=3), tuned)
    report = compress_checkpoint(base, tuned, tmp_path / "delta", recipe)
    assert report.resumed_layers == 0


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from deltacome_core.compress import compress_checkpoint
from deltacome_core.recipe import get_recipe

base, tuned, out = map(Path, sys.argv[1:4])
left = int(sys.argv[4])

def on_layer(done):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

compress_checkpoint(base, tuned, out, get_recipe("come", matrix_bits=3.0), on_layer=on_layer)
"""


@pytest.mark.parametrize("layers_before_kill", [1, 3])
def test_a_killed_run_leaves_the_bytes_of_an_undisturbed_one(tmp_path, layers_before_kill):
    base, tuned = finetunes.save_pair(tmp_path, num_hidden_layers=4)
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_RUN, str(base), str(tuned), str(killed)]
    child = subprocess.run([*command, str(layers_before_kill)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert not killed.exists()
    assert len(list(parts_folder(killed).rglob("*.safetensors"))) == layers_before_kill
    report = compress_checkpoint(base, tuned, killed, COME)
    assert report.resumed_layers == layers_before_kill
    compress_checkpoint(base, tuned, tmp_path / "calm", COME)
    assert read_folder(killed) == read_folder(tmp_path / "calm")


@pytest.mark.parametrize("recipe", [COME, FREE, get_recipe("hub"), get_recipe("lossless")])
def test_the_number_of_devices_does_not_change_a_byte(tmp_path, recipe):
    base, tuned = finetunes.save_pair(tmp_path, num_hidden_layers=3, dtype=torch.bfloat16)
    seen = []
    for devices in ("cpu", ["cpu", "cpu"], ["cpu", "cpu", "cpu"]):
        out = tmp_path / f"delta-{len(seen)}"
        done = []
        compress_checkpoint(base, tuned, out, recipe, device=devices, on_layer=done.append)
        assert sorted(layer.index for layer in done) == [0, 1, 2, 3]
        seen.append(read_folder(out))
    assert seen[0] == seen[1] == seen[2]


def test_a_run_that_was_stopped_goes_on_with_more_devices(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path, num_hidden_layers=3)
    with pytest.raises(StopError):
        compress_checkpoint(base, tuned, tmp_path / "delta", COME, on_layer=stop_after(1))
    report = compress_checkpoint(base, tuned, tmp_path / "delta", COME, device=["cpu", "cpu"])
    assert report.resumed_layers == 1
    compress_checkpoint(base, tuned, tmp_path / "calm", COME)
    assert read_folder(tmp_path / "delta") == read_folder(tmp_path / "calm")


def test_a_run_on_no_device_is_refused(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path)
    with pytest.raises(UserError) as caught:
        compress_checkpoint(base, tuned, tmp_path / "delta", FREE, device=[])
    assert caught.value.code == "device_unavailable"
