"""What a GPU alone does in a step, done here: padding, single-token kernels, captured graphs."""

from functools import partial

import tiny
import torch
from interpreters import run_interpreted
from serving import answer
from sharing import PROMPTS, ROWS, SHAPES, greedy, load_all, make_deltas, make_models

from kernels.arena import DeltaArena
from kernels.fragments import FAST_PLANES, PLANES
from workers.engine import arena_slots, shared
from workers.engine.attention import DecodeRows
from workers.engine.graphs import DecodeGraphs, StepInputs, _Captured
from workers.engine.scheduler import Limits


def test_graphs_of_another_arena_are_recorded_into_another_pool():
    """The pool dies with the last graph that was recorded into it."""
    graphs = DecodeGraphs(lambda inputs: inputs.embeds[0], n_pages=2)
    pools = []

    def capture(inputs):
        pools.append(graphs._pool)
        graphs._pool = object()
        return _Captured(Replay(lambda _: inputs.embeds[0], inputs, inputs.embeds[0]), inputs, None)

    graphs._capture = capture
    numbers = torch.zeros(2, dtype=torch.int32)
    decode = DecodeRows(pages=numbers[:, None], lengths=numbers + 1)
    rows = {"places": numbers, "owners": numbers, "chunks": (), "decode": decode}
    for size in (1, 2):
        step = StepInputs(embeds=torch.zeros(1, size, 4), positions=numbers[None, :size], **rows)
        graphs.run(step, key=("one", True))
    graphs.run(step, key=("another", True))
    assert [pool is None for pool in pools] == [True, False, True]


GPU_PATH = """
import sys
sys.path[:0] = ["tests/workers", "tests"]
from pathlib import Path
import interpreters
import test_engine_gpu_steps
interpreters.skip_unread_checks()
for folder in sys.argv[2:]:
    getattr(test_engine_gpu_steps, sys.argv[1])(Path(folder))
print("right")
"""


class Replay:
    """What a captured graph does: the same work on the same buffers, with what they hold now."""

    def __init__(self, run, inputs, hidden):
        self.replay = lambda: hidden.copy_(run(inputs))


def act_as_on_a_gpu(models):
    """Make steps padded, by the kernel for single tokens, with a graph's fixed buffers.

    Gives the graphs, what captures one, and the sizes that were captured.
    """
    executor = models[0].executor
    executor._pads = executor.is_async = True
    for kind in executor.vocabulary._kinds:
        if kind._table is not None and kind._table._kind.has_basis:
            # Its kernels, interpreted.
            kind._table.device = torch.device("cuda")
    graphs = DecodeGraphs(executor._run, n_pages=executor.pages.capacity)
    captured = []

    def capture(inputs):
        hidden = executor._run(inputs)
        captured.append(len(inputs.places))
        return _Captured(Replay(executor._run, inputs, hidden), inputs, hidden)

    graphs._capture = capture
    executor._graphs = graphs
    return graphs, capture, captured


def compare_tokens(root):
    """Every model's tokens are those of its dense checkpoint, interpreted."""
    models = load_all(root, 3, arena=True)
    _, _, captured = act_as_on_a_gpu(models)
    names = ("base", "r0", "r1", "r2")
    for prompt in PROMPTS:
        answers = answer(models, prompt=prompt, max_tokens=5, limits=Limits(prefill_tokens=9))
        for name, one in zip(names, answers, strict=True):
            assert one.ids == greedy(root / name, prompt, 5), (name, prompt)
    assert len(captured) < 8


def compare_fast(root):
    """The engine's kernels in fast mode: the backbone's numbers exactly, a delta's nearly."""
    found = []
    for planes in (PLANES, FAST_PLANES):
        # The reference of the kernels says what is exact.
        is_fast = planes == FAST_PLANES
        arena_slots.DeltaArena = partial(DeltaArena, operand_order=is_fast)
        models = load_all(root, 1, arena=True, planes=planes)
        act_as_on_a_gpu(models)
        heard = answer(models, prompt=PROMPTS[0][:3], max_tokens=1, logprobs=1)
        found.append([[piece.logprob for piece in one.pieces] for one in heard])
    exact, fast = torch.tensor(found)
    assert torch.equal(exact[0], fast[0])
    far = float((exact[1] - fast[1]).abs().max())
    assert 0 < far < 5e-3, far


def capture_again(root):
    """A graph that is refused, and graphs that are captured in quiet times."""
    models = load_all(root, 3, arena=True)
    executor = models[0].executor
    graphs, capture, captured = act_as_on_a_gpu(models)
    heard = answer(models, prompt=PROMPTS[0], max_tokens=5)[2].ids
    assert heard == greedy(root / "r1", PROMPTS[0], 5)

    def refuse(_inputs):
        raise RuntimeError("not while capturing")

    graphs._captured.clear()
    graphs._capture = refuse
    assert answer(models, prompt=PROMPTS[0], max_tokens=5)[2].ids == heard
    assert set(captured) <= {1, 2, 4}

    # In quiet times the largest is captured first, and an answer then finds what it needs.
    graphs.forget()
    graphs._capture, graphs._is_refused = capture, False
    captured.clear()
    shared.BUCKETS = (1, 2, 4)
    while executor.prepare_step():
        pass
    assert captured == [4, 2, 1]
    assert answer(models, prompt=PROMPTS[0], max_tokens=5)[2].ids == heard
    assert captured == [4, 2, 1]


def test_steps_of_a_gpu_give_the_same_tokens(tmp_path):
    """In the interpreter, which must be asked for before Triton is imported: one for all shapes."""
    folders = [str(make_models(tmp_path / name, name)) for name in SHAPES]
    assert run_interpreted(GPU_PATH, compare_tokens.__name__, *folders) == "right\n"


def test_a_gpu_captures_in_quiet_times_and_goes_on_where_it_cannot(tmp_path):
    tiny.save(tiny.make_model(), tmp_path / "base")
    tuned = [tiny.tune(tiny.make_model(), seed=seed, size=0.05) for seed in (1, 2, 3)]
    make_deltas(tmp_path, tuned, ROWS)
    assert run_interpreted(GPU_PATH, capture_again.__name__, str(tmp_path)) == "right\n"
    assert run_interpreted(GPU_PATH, compare_fast.__name__, str(tmp_path)) == "right\n"
