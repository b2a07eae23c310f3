import os
from pathlib import Path

import pytest

# Two test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"


@pytest.fixture(scope="session")
def tiny():
    """The demo backbone and its fine-tune on dates; read only."""
    return TINY / "backbone", TINY / "dates"


@pytest.fixture(scope="session")
def bench(tiny):
    from benchmarks.quality.measure import Bench, BenchOptions

    base, tuned = tiny
    options = BenchOptions(device="cpu", n_items=12, text_rows=4, text_tokens=96, greedy_tokens=24)
    return Bench(tuned, base, options)
