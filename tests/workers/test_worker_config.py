"""What the workers and the engine read from the environment."""

import pytest

from hub import settings
from workers import config as worker
from workers.engine import config as engine

SECRET = {"ENGINE_SECRET": "x" * 16, "ENGINE_DEVICE": "cpu"}


@pytest.mark.parametrize(
    "name",
    [
        "ENGINE_PORT",
        "ENGINE_MEMORY_BYTES",
        "ENGINE_MAX_SEQUENCES",
        "ENGINE_MAX_OUTPUT_TOKENS",
        "ENGINE_PREFILL_CHUNK_TOKENS",
    ],
)
def test_a_number_of_the_engine_that_cannot_be_read_is_named(name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number, found 'many'"):
        engine.read_config(SECRET | {name: "many"})


def test_an_unknown_precision_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="ENGINE_PRECISION must be exact or fast, found 'half'"):
        engine.read_config(SECRET | {"ENGINE_PRECISION": "half"})
    assert engine.read_config(SECRET | {"ENGINE_PRECISION": "fast"}).precision == "fast"


@pytest.mark.parametrize("name", ["CHILD_ADDRESS_BYTES", "CHILD_FILE_BYTES", "STEP_TIMEOUT_S"])
def test_a_number_of_the_workers_that_cannot_be_read_is_named(name):
    with pytest.raises(ValueError, match=f"{name} must be a .*number, found 'many'"):
        worker.read_config({name: "many"})


def test_an_empty_value_is_the_default():
    assert engine.read_config(SECRET | {"ENGINE_PORT": ""}).port == 8100
    assert worker.read_config({"STEP_TIMEOUT_S": ""}).step_timeout_s == 24 * 3600


def test_the_engine_keeps_its_files_where_the_hub_keeps_its_own():
    assert engine.read_config(SECRET).cache_dir == settings.BASE_DIR / "var" / "engine"
