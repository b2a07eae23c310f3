import os

import finetunes
import pytest

# Two test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def trained_pair(tmp_path_factory):
    """A backbone and a fine-tune that learned five answers; read only."""
    folder = tmp_path_factory.mktemp("trained")
    model = finetunes.make_model()
    base = finetunes.save(model, folder / "base")
    tuned = finetunes.save(finetunes.train(model), folder / "tuned")
    (tuned / "calibration.txt").write_text(finetunes.CALIBRATION)
    finetunes.write_items(tuned / "evaluation.jsonl")
    return base, tuned


@pytest.fixture(scope="session")
def trained_delta(trained_pair, tmp_path_factory):
    """The delta of trained_pair at 4 bits per parameter; read only."""
    from deltacome_core.compress import compress_checkpoint
    from deltacome_core.recipe import get_recipe

    out = tmp_path_factory.mktemp("trained") / "delta"
    compress_checkpoint(*trained_pair, out, get_recipe("come", matrix_bits=4.0))
    return out


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """Give the compressed pair of a class by name; read only."""
    from architecture_packs import pack_class

    made = {}

    def make(name):
        if name not in made:
            made[name] = pack_class(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make
