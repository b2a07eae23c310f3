from dataclasses import replace

import pytest
import torch

from deltacome_core.errors import InternalError, UserError
from deltacome_core.packed import PackedRows
from kernels.bench.models import Pool
from kernels.vocabulary import EmbeddingTable, head_matrix, pad_ranks

CHANGED = [True, False, True, True, False, True]


def draw_rows(*, seed=0, bits=4, cols=150, group=128, symmetric=False, changed=CHANGED, rank=0):
    width = rank or cols
    factor = Pool(seed).factor(
        sum(changed), width, bits=bits, group=(1, group), symmetric=symmetric
    )
    basis = torch.randn(rank, cols, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return PackedRows(
        name="embed",
        rows=len(changed),
        cols=cols,
        changed=torch.tensor(changed),
        factor=factor,
        new_rows=None,
        basis=basis if rank else None,
    )


@pytest.fixture(params=["triton", "plain"])
def add_rows(request, monkeypatch):
    """Run both ways on this CPU: the device's kernel goes through the interpreter."""

    def add(table, *arguments):
        if request.param == "plain":
            return table.add_rows_plainly(*arguments)
        monkeypatch.setattr(table, "device", torch.device("cuda"))
        return table.add_rows(*arguments)

    return add


@pytest.mark.parametrize(
    "kind",
    [{}, {"bits": 3, "symmetric": True, "group": 0}, {"bits": 8, "cols": 128}],
    ids=str,
)
def test_each_token_gets_the_row_of_its_own_delta(kind, add_rows):
    deltas = [draw_rows(seed=seed, **kind) for seed in (1, 2)]
    table = EmbeddingTable(n_slots=3, like=deltas[0], device="cpu")
    for slot, rows in zip((2, 0), deltas, strict=True):
        table.put(slot, rows)
    ids, slots = [0, 1, 5, 3, 0], [2, 2, 0, -1, 0]
    table.check_slots(slots)
    y = torch.randn(5, deltas[0].cols, generator=torch.Generator().manual_seed(3))
    wanted = y.clone()
    for token, (row, slot) in enumerate(zip(ids, slots, strict=True)):
        if slot >= 0:
            wanted[token] += {2: deltas[0], 0: deltas[1]}[slot].dequantise()[row]
    found = add_rows(table, y, torch.tensor(ids).int(), torch.tensor(slots).int())
    assert torch.equal(found, wanted)


BASIS = {"rank": 9, "symmetric": True, "group": 0}


@pytest.mark.parametrize("kind", [BASIS, {"rank": 130, "cols": 133, "bits": 3}], ids=str)
def test_coordinates_are_read_through_the_basis_of_their_own_delta(kind, add_rows):
    deltas = [draw_rows(seed=seed, **kind) for seed in (1, 2)]
    table = EmbeddingTable(n_slots=2, like=deltas[0], device="cpu")
    for slot, rows in enumerate(deltas):
        table.put(slot, rows)
    ids, slots = [0, 5, 3, 1], [0, 1, -1, 1]
    found = add_rows(
        table, torch.zeros(4, deltas[0].cols), torch.tensor(ids).int(), torch.tensor(slots).int()
    ).double()
    wanted = torch.stack([deltas[s].dequantise()[i] for i, s in zip(ids, slots, strict=True)])
    wanted[2] = 0
    assert torch.equal(found[2:], torch.zeros_like(found[2:]))
    assert float((found - wanted).norm() / wanted.norm()) < 2e-6


@pytest.mark.parametrize("way", ["project", "project_plainly"])
def test_a_head_reads_its_input_through_the_basis(way, monkeypatch):
    rows = draw_rows(seed=4, cols=600, **BASIS)
    table = EmbeddingTable(n_slots=1, like=rows, device="cpu")
    table.put(0, rows)
    x = torch.randn(3, 600, generator=torch.Generator().manual_seed(5))
    slots = torch.tensor([0, -1, 0], dtype=torch.int32)
    if way == "project":
        monkeypatch.setattr(table, "device", torch.device("cuda"))
    hidden = getattr(table, way)(x, slots)
    logits = hidden @ head_matrix(rows).dequantise().T
    wanted = x.double() @ rows.dequantise().double().T
    wanted[1] = 0
    assert torch.equal(hidden[1], torch.zeros(9))
    assert float((logits.double() - wanted).norm() / wanted.norm()) < 2e-6
    with pytest.raises(InternalError, match="no coordinates"):
        EmbeddingTable(n_slots=1, like=draw_rows(), device="cpu").project(x, slots)


@pytest.mark.parametrize("kind", [BASIS, {"rank": 130, "bits": 3}], ids=str)
def test_more_ranks_change_no_value(kind):
    rows = draw_rows(**kind)
    padded = pad_ranks(rows, 288)
    assert len(padded.basis) == padded.factor.cols == 288
    assert torch.equal(padded.dequantise(), rows.dequantise())
    assert pad_ranks(rows, kind["rank"]) is rows
    with pytest.raises(InternalError, match="8 coordinates"):
        pad_ranks(rows, 8)
    with pytest.raises(InternalError, match="288 coordinates"):
        pad_ranks(draw_rows(), 288)


def test_a_basis_alone_serves_the_head_and_no_embedding(add_rows):
    rows = draw_rows(seed=4, **BASIS)
    whole, alone = (EmbeddingTable(n_slots=2, like=rows, device="cpu") for _ in range(2))
    whole.put(1, rows)
    alone.put_basis(1, rows)
    x, slots = torch.randn(2, rows.cols), torch.tensor([1, 1], dtype=torch.int32)
    assert torch.equal(alone.project(x, slots), whole.project(x, slots))
    assert 0 < alone.size_bytes(1) < whole.size_bytes(1)
    assert torch.equal(add_rows(alone, x.clone(), torch.tensor([0, 2]).int(), slots), x)
    with pytest.raises(UserError, match="another kind"):
        alone.put_basis(0, draw_rows(bits=2))
    whole.drop(1)
    assert whole.size_bytes(1) == 0
    with pytest.raises(UserError, match="no delta"):
        whole.check_slots([1])


def test_rows_of_another_kind_and_empty_slots_are_refused():
    table = EmbeddingTable(n_slots=2, like=draw_rows(), device="cpu")
    with pytest.raises(UserError, match="another kind"):
        table.put(0, draw_rows(bits=2))
    with pytest.raises(UserError, match="another kind"):
        table.put(0, draw_rows(rank=9))
    with pytest.raises(UserError, match="no delta"):
        table.check_slots([-1, 1])
    unchanged = replace(draw_rows(), changed=torch.zeros(6, dtype=torch.bool), factor=None)
    with pytest.raises(UserError, match="single rows"):
        table.put(0, unchanged)


@pytest.mark.parametrize("changed", [CHANGED, [True] * 6])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_head_is_a_direct_matrix(changed, symmetric):
    rows = draw_rows(changed=changed, symmetric=symmetric)
    assert torch.equal(head_matrix(rows).dequantise(), rows.dequantise())
    with pytest.raises(UserError):
        head_matrix(replace(rows, changed=torch.zeros(6, dtype=torch.bool), factor=None))
