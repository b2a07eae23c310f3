"""Kernels are compiled before a delta is in its slot: all that its steps launch, and no others."""

import sys
import threading

import pytest
from interpreters import run_here

from deltacome_core.errors import UserError
from kernels.fragments import PRECISIONS
from kernels.vocabulary import RowKind
from kernels.wanted import RowKernels, dump_wanted, name_wanted, parse_wanted
from workers.engine.metrics import EngineMetrics
from workers.engine.preparation import KernelPreparation

ROWS = RowKernels(
    kind=RowKind(cols=256, width=32, bits=8, group=0, has_zero=False, has_basis=True),
    dtype="bfloat16",
)

# Steps run on a CPU under a driver that notes launches: nothing is computed, everything is asked.
STEPS = """
import functools
import sys
from dataclasses import replace
import torch
from deltacome_core.layout import RankBand
from deltacome_core.packed import PackedRows
from deltacome_core.rows import BASIS_GROUP
from kernels.arena import DeltaArena
from kernels.bench.models import HUB, ModelShape, Pool
from kernels.dense import Unfolder
from kernels.precompile import list_kernels, noting_launches
from workers.engine import arena_slots
from workers.engine.arena_slots import ArenaSlots, KernelOptions
from workers.engine.packed_vocabulary import PackedVocabulary
from workers.engine.parts import ArrivingMatrices, TenantParts
from workers.engine.rooms import BUCKETS
from workers.engine.slots import Span

bands = tuple(RankBand(bits, 16) for bits in (4, 3, 2, 1))
layout = replace(HUB, square=bands, wide=bands, deep=bands)
shape = ModelShape(name="small", n_layers=2, hidden=256, intermediate=384, key_value=128)
sites, pool = shape.sites(), Pool(0)
dtype, vocabulary = torch.bfloat16, 320
arena_slots.DeltaArena = functools.partial(DeltaArena, operand_order=True)

def draw_rows(name, has_basis):
    width = 32 if has_basis else 256
    bits, group = (8, BASIS_GROUP) if has_basis else (4, (1, 128))
    factor = pool.factor(vocabulary, width, bits=bits, group=group, symmetric=has_basis)
    return PackedRows(
        name=name, rows=vocabulary, cols=256, changed=torch.ones(vocabulary, dtype=torch.bool),
        factor=factor, new_rows=None, base_scale=None,
        basis=torch.zeros(32, 256).bfloat16() if has_basis else None,
    )

wanted = []
slots = ArenaSlots(
    sites, head_shape=(vocabulary, 256), n_slots=3, device=torch.device("cpu"), dtype=dtype,
    delta_bytes=1 << 40, kernels=KernelOptions(prepare=wanted.extend, planes=int(sys.argv[1])),
)
table = torch.zeros(vocabulary, 256, dtype=dtype)
words = PackedVocabulary(table, table, slots)
lock = __import__("threading").RLock()

def step(spans, n_rows, n_single):
    slots.begin(spans, n_rows=n_rows, n_single=n_single)
    for number, site in enumerate(sites):
        x = torch.zeros(n_rows, site.in_features, dtype=dtype)
        slots.linear(x, torch.zeros(site.total_out, site.in_features, dtype=dtype), number)

with noting_launches(90) as used, torch.inference_mode():
    for has_basis in (True, False):
        # The second one changed fewer layers, so that there is room for its larger head.
        changed = sites if has_basis else sites[:4]
        parts = TenantParts(
            matrices=ArrivingMatrices({}).beside(pool.delta(changed, layout)), vectors={},
            embedding=draw_rows("embed", has_basis), head=draw_rows("head", has_basis),
        )
        slot = slots.load(parts, lock=lock, factor_bytes=0)
        words.load(slot, parts)
    slots._unfolder = Unfolder(slots._arena, dtype=dtype)
    for kind in words._kinds:
        if kind._table is not None:
            # Of this the vocabulary asks whether there are kernels.
            kind._table.device = torch.device("cuda")
    for size in BUCKETS:
        own = [Span(first=0, last=size, slot=size % 2)]
        step(own, size, size)
        for more in (2, 40, 130, 300, 1200):
            chunks = [
                Span(first=at, last=min(at + 100, size + more), slot=1 - size % 2)
                for at in range(size, size + more, 100)
            ]
            if more == 130:
                chunks = [Span(first=size, last=size + more, slot=0)]
            step(own + chunks, size + more, size)
        ids = torch.zeros(size, dtype=torch.int64)
        for slot in (0, 1):
            own = [Span(first=0, last=size, slot=slot)]
            words.embed(ids, own)
            words.logits(torch.zeros(size, 256, dtype=dtype), own)
listed = {text: job for one in wanted for text, job in
          ((job.specialization, job) for job in list_kernels(one, arch=90))}
def name(keys, by):
    return sorted(by[key].name for key in keys)
print("not listed", name(used.keys() - listed.keys(), used),
      "not used", name(listed.keys() - used.keys(), listed), len(used) > 8)
"""


@pytest.mark.parametrize("planes", PRECISIONS.values())
def test_all_that_steps_launch_is_listed_and_nothing_else(planes):
    assert run_here(STEPS, str(planes)) == "not listed [] not used [] True\n"


# What the compiler is asked for in this process and in those that compile ahead.
KEYS = """
import json, sys
order = sys.argv[1]
if order == "backwards":
    from kernels.triton_ops.unfold import unfold_kernel
from kernels.precompile import noting_launches, _launch_rows
from kernels.wanted import parse_wanted
from kernels.triton_ops import batch_expand, batch_shrink, gather, layer, prepare, repack, unfold
from triton.runtime import driver
kernels = [prepare.prepare_kernel, batch_shrink.batch_shrink_kernel, batch_expand.batch_expand_kernel,
           layer.layer_kernel, repack.repack_kernel, unfold.unfold_kernel, gather.gather_kernel]
for kernel in reversed(kernels) if order == "backwards" else kernels:
    kernel.cache_key
asked = []
def note(source, *, target, options, **_):
    asked.append((source.hash(), str(target), sorted(options.items(), key=str)))
    raise InterruptedError

wanted = parse_wanted(sys.argv[2])
with noting_launches(90) as found:
    _launch_rows(wanted)
for job in found.values():
    kernel = getattr(sys.modules[job.module], job.name)
    kernel.device_caches[0]
    kernel.compile = note
    try:
        kernel.preload(job.specialization)
    except InterruptedError:
        pass
ahead = len(asked)
for launch in range(2):
    try:
        _launch_rows(wanted)
    except InterruptedError:
        gather.gather_kernel.run = lambda *a, **k: None
print(json.dumps([asked[:ahead] == asked[ahead:], ahead, [k.cache_key for k in kernels]]))
"""


def test_kernels_have_the_same_names_in_every_process():
    asked = dump_wanted(ROWS)
    forwards, backwards = (run_here(KEYS, order, asked) for order in ("forwards", "backwards"))
    assert forwards.startswith("[true, 2, ")
    assert forwards == backwards


COMPILE = """
import sys
from kernels.precompile import is_compiled, main
from kernels.wanted import parse_wanted
wanted = parse_wanted(sys.argv[1])
print(is_compiled(wanted, arch=90), is_compiled(wanted, arch=80))
"""


def test_an_engine_compiles_once(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    metrics = EngineMetrics()
    asked = dump_wanted(ROWS)
    assert run_here(COMPILE, asked, TRITON_CACHE_DIR=str(tmp_path)) == "False False\n"
    KernelPreparation(metrics).compile([ROWS], arch=90)
    assert {file.stem for file in tmp_path.glob("*/*.cubin")} == {"gather_kernel", "project_kernel"}
    assert run_here(COMPILE, asked, TRITON_CACHE_DIR=str(tmp_path)) == "True False\n"


def test_a_kernel_that_does_not_compile_is_an_error(tmp_path, monkeypatch):
    """No compiler knows this architecture."""
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    preparation = KernelPreparation(EngineMetrics())
    with pytest.raises(UserError, match="_kernel does not compile") as caught:
        preparation.compile([ROWS], arch=11)
    assert caught.value.code == "kernels_not_compiled"
    assert not preparation.is_running


SLEEPER = "import sys, time; time.sleep(600)"


def test_a_compiler_that_never_ends_is_an_error():
    metrics = EngineMetrics()
    preparation = KernelPreparation(metrics, command=(sys.executable, "-c", SLEEPER), limit_s=0.2)
    with pytest.raises(UserError, match=r"more than 0\.2 s"):
        preparation.compile([ROWS], arch=90)
    assert metrics.preparing.value() == 0


def test_an_engine_that_ends_ends_what_compiles():
    metrics = EngineMetrics()
    preparation = KernelPreparation(metrics, command=(sys.executable, "-c", SLEEPER))
    caught = []

    def compile_rows():
        try:
            preparation.compile([ROWS], arch=90)
        except UserError as error:
            caught.append(error.code)

    waiting = threading.Thread(target=compile_rows)
    waiting.start()
    while metrics.preparing.value() != 1:
        waiting.join(0.01)
    assert preparation.is_running
    preparation.close()
    waiting.join()
    assert caught == ["kernels_not_compiled"]


def test_names_differ_by_what_the_compiler_makes():
    names = {
        name_wanted(ROWS, arch=90, compiler="3.6"),
        name_wanted(ROWS, arch=80, compiler="3.6"),
        name_wanted(ROWS, arch=90, compiler="3.7"),
        name_wanted(RowKernels(kind=ROWS.kind, dtype="float32"), arch=90, compiler="3.6"),
    }
    assert len(names) == 4
    assert parse_wanted(dump_wanted(ROWS)) == ROWS
