"""What a backbone and its deltas take of a card."""

import json
import shutil

import pytest

from deltacome_core import memory
from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.errors import UserError

LLAMA_2_7B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
}


def forecast(**changes):
    sizes = {"backbone_bytes": 13_000, "n_deltas": 3, "kv_bytes": 500} | changes
    return memory.forecast([900, 1100], **sizes)


def test_all_parts_are_in_the_total():
    found = forecast()
    assert found.delta_bytes == 1040
    assert found.total_bytes == 13_000 + 3 * 1040 + 500 + found.workspace_bytes
    assert found.to_json()["total_bytes"] == found.total_bytes


@pytest.mark.parametrize(("spare", "room"), [(-1, 0), (0, 0), (1039, 0), (1040, 1), (10_400, 10)])
def test_as_many_deltas_fit_as_there_is_room_for(spare, room):
    found = forecast()
    empty = found.total_bytes - 3 * 1040
    assert found.count_fitting(empty + spare) == room


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, 2 * 32 * 4096 * 2),
        ({"num_key_value_heads": 8}, 2 * 32 * 1024 * 2),
        ({"num_key_value_heads": 8, "head_dim": 256}, 2 * 32 * 2048 * 2),
    ],
)
def test_keys_and_values_of_a_token_follow_from_the_config(changes, wanted):
    config = LLAMA_2_7B | changes
    assert memory.kv_bytes_per_token(config) == wanted
    assert memory.kv_bytes_per_token({"text_config": config, "hidden_size": 1}) == wanted


@pytest.mark.parametrize("value", [None, 0, -1, "32", True, 1.5])
def test_a_config_without_sizes_is_refused(value):
    with pytest.raises(UserError) as refused:
        memory.kv_bytes_per_token(LLAMA_2_7B | {"num_hidden_layers": value})
    assert refused.value.code == "not_a_checkpoint"


@pytest.mark.parametrize("name", ["head_dim", "num_key_value_heads"])
def test_a_size_that_may_be_absent_must_be_a_number_where_it_is_not(name):
    with pytest.raises(UserError) as refused:
        memory.kv_bytes_per_token(LLAMA_2_7B | {name: "128"})
    assert refused.value.code == "not_a_checkpoint"
    assert name in str(refused.value.params)


def test_files_give_what_their_headers_say(trained_pair, trained_delta):
    base = open_checkpoint(trained_pair[0])
    found = memory.forecast_files(trained_pair[0], [trained_delta] * 2, kv_tokens=10)
    stored = sum(path.stat().st_size for path in trained_delta.glob("*.safetensors"))
    assert found.n_deltas == 2
    assert found.delta_bytes == int(stored * 1.04)
    assert found.backbone_bytes == 2 * base.n_params
    assert found.kv_bytes == 10 * memory.kv_bytes_per_token(base.config)


def test_a_delta_of_another_shape_is_refused(trained_pair, trained_delta, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained_delta, other)
    manifest = json.loads((other / "delta.json").read_text())
    names = [entry["name"] for entry in manifest["entries"] if entry["kind"] == "lowrank"]
    text = (other / "delta.json").read_text().replace(names[0], names[0].replace("layers", "lairs"))
    (other / "delta.json").write_text(text)
    with pytest.raises(UserError):
        memory.forecast_files(trained_pair[0], [other], kv_tokens=1)


def test_a_card_that_is_too_small_is_told_what_is_missing():
    found = forecast()
    text = memory.describe_forecast(found, card_bytes=10**9)
    assert "missing" in text
    assert "0 such deltas fit in 1 GB." in text
    whole = memory.describe_forecast(found, card_bytes=80 * 10**9)
    assert "free" in whole


def test_deltas_without_bytes_fit_in_any_number():
    found = memory.forecast([0], backbone_bytes=1, n_deltas=1, kv_bytes=1)
    assert "Any number" in memory.describe_forecast(found, card_bytes=80 * 10**9)
