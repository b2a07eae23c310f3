import json
import shutil

import pytest
import torch
from factories_core import (
    factorise,
    fine_tune,
    llama_tensors,
    make_delta,
    make_head,
    pack_checkpoint,
    quantise,
    write_checkpoint,
)
from packed_folders import DOWN, KEY, LAYER, NORM, QUERY, make_folders

from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.container import open_delta
from deltacome_core.entries import UnchangedEntry
from deltacome_core.errors import InternalError, UserError
from deltacome_core.inspection import inspect_delta
from deltacome_core.layout import PLANES, RankBand
from deltacome_core.packed import ExactTensor, PackedDirect, PackedRows, PackedStack
from deltacome_core.parts import describe, read_part, write_delta, write_part
from deltacome_core.payload import matrix_from_payload, matrix_to_payload
from deltacome_core.reconstruct import reconstruct_checkpoint
from deltacome_core.safetensors_file import read_header
from deltacome_core.tensors import load_tensor, tensor_bytes


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("folders"))


def arrays(packed):
    """Every array of a packed tensor as bytes."""
    if isinstance(packed, ExactTensor):
        return [bytes(tensor_bytes(packed.value))]
    if isinstance(packed, PackedRows):
        factors, found = [packed.factor], [packed.changed, packed.new_rows]
    elif isinstance(packed, PackedDirect):
        factors, found = [packed.factor], []
    else:
        factors = [factor for band in packed.bands for factor in (band.u, band.v)]
        found = [packed.sigma]
    for factor in factors:
        found += [factor.codes, factor.scale, factor.zero]
    return [None if array is None else bytes(tensor_bytes(array)) for array in found]


def test_what_was_packed_is_read_back(folders):
    base = llama_tensors(0)
    packed = pack_checkpoint(base, fine_tune(base, 1, new_rows=3))
    delta = open_delta(folders / "delta")
    assert set(delta.names) == set(packed)
    for name, expected in packed.items():
        loaded = delta.load(name)
        if isinstance(expected, UnchangedEntry):
            assert loaded is None
        else:
            assert arrays(loaded) == arrays(expected)


def test_a_layer_is_read_in_one_piece(folders):
    delta = open_delta(folders / "delta")
    payload, matrices = delta.load_group(LAYER)
    assert [matrix.name.split(".")[-2] for matrix in matrices] == ["q_proj", "k_proj", "down_proj"]
    for matrix in matrices:
        assert arrays(matrix) == arrays(delta.load(matrix.name))
        direct = isinstance(matrix, PackedDirect)
        first = matrix.factor.codes if direct else matrix.sigma
        start = first.data_ptr() - payload.data_ptr()
        assert start % 256 == 0
        assert 0 <= start < len(payload)
    assert [group for group, _ in delta.iter_groups()] == [LAYER]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["lowrank", "direct"])
def test_a_stack_is_read_back_slice_by_slice(tmp_path, kind, transposed):
    generator = torch.Generator().manual_seed(0)
    name, shape = f"{LAYER}.mlp.experts.down_proj", (3, 40, 48)
    base = {name: torch.randn(shape, generator=generator)}
    tuned = {name: base[name] + torch.randn(shape, generator=generator)}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", tuned)
    deltas = tuned[name] - base[name]
    slices = []
    for index, delta in enumerate(deltas.mT if transposed else deltas):
        own = f"{name}[{index}]"
        direct = PackedDirect(name=own, factor=quantise(delta, 8, (1, 128)))
        slices.append(direct if kind == "direct" else factorise(own, delta))
    stack = PackedStack(name=name, shape=shape, slices=tuple(slices), transposed=transposed)
    part = tmp_path / "part"
    layout = open_checkpoint(tmp_path / "tuned").layout
    write_part(part, [stack], layout=layout, fingerprint="test")
    config = tmp_path / "tuned" / "config.json"
    head = make_head(tmp_path / "base", tmp_path / "tuned")
    write_delta(tmp_path / "delta", [part], head=head, sidecars=[config])
    loaded = open_delta(tmp_path / "delta").load(name)
    for ours, truth in zip(loaded.slices, slices, strict=True):
        assert ours.name == truth.name
        assert torch.equal(ours.dequantise(), truth.dequantise())
    assert inspect_delta(tmp_path / "delta").n_matrices == 3
    reconstruct_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "back")
    rebuilt = load_tensor(open_checkpoint(tmp_path / "back"), name)
    steps = torch.stack([piece.dequantise() for piece in slices])
    assert torch.equal(rebuilt, base[name] + (steps.mT if transposed else steps))


def test_slices_of_different_kinds_are_no_stack(tmp_path):
    name = f"{LAYER}.mlp.experts.down_proj"
    slices = (
        PackedDirect(name=f"{name}[0]", factor=quantise(torch.ones(40, 48), 8, (1, 128))),
        PackedDirect(name=f"{name}[1]", factor=quantise(torch.ones(40, 48), 4, (1, 128))),
    )
    stack = PackedStack(name=name, shape=(2, 40, 48), slices=slices, transposed=False)
    with pytest.raises(InternalError, match="different bits"):
        describe(stack, dtype="F32")


def test_every_payload_and_tensor_is_aligned(folders):
    header = read_header(folders / "delta" / "delta.safetensors")
    for info in header.tensors:
        boundary = 256 if info.name.startswith("packed.") else 2
        assert (header.data_start + info.start) % boundary == 0


def test_equal_input_gives_equal_folders(folders, tmp_path):
    make_delta(folders / "base", folders / "tuned", tmp_path / "again")
    for path in (folders / "delta").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_shards_hold_the_same_tensors(folders, tmp_path):
    make_delta(folders / "base", folders / "tuned", tmp_path / "cut", max_shard_bytes=4000)
    cut, whole = open_delta(tmp_path / "cut"), open_delta(folders / "delta")
    assert len(cut.manifest.data_files) > 1
    assert cut.manifest.data_files[0].startswith("delta-00001-of-")
    assert cut.manifest.entries == whole.manifest.entries
    for name in whole.names:
        if whole.load(name) is not None:
            assert arrays(cut.load(name)) == arrays(whole.load(name))


def test_parts_join_to_the_same_bytes_as_one(folders, tmp_path):
    base = llama_tensors(0)
    tuned = open_checkpoint(folders / "tuned")
    packed = pack_checkpoint(base, fine_tune(base, 1, new_rows=3))
    # Entries keep the order of the parts, so the parts follow the order of one big part.
    names = list(open_delta(folders / "delta").names)
    pieces = []
    for number, chosen in enumerate((names[:3], names[3:4], names[4:])):
        piece = tmp_path / f"{number}.part"
        write_part(piece, [packed[name] for name in chosen], layout=tuned.layout, fingerprint="f")
        pieces.append(piece)
    head = make_head(folders / "base", folders / "tuned")
    write_delta(tmp_path / "joined", pieces, head=head, sidecars=tuned.sidecars)
    for path in (folders / "delta").iterdir():
        assert (tmp_path / "joined" / path.name).read_bytes() == path.read_bytes()


def test_a_part_knows_its_fingerprint_and_entries(folders, tmp_path):
    tuned = open_checkpoint(folders / "tuned")
    norm = ExactTensor(name=NORM, value=torch.ones(48, dtype=torch.bfloat16))
    written = write_part(tmp_path / "p", [norm], layout=tuned.layout, fingerprint="abc")
    assert read_part(tmp_path / "p") == written
    assert written.fingerprint == "abc"


def test_a_torn_part_is_refused(folders, tmp_path):
    tuned = open_checkpoint(folders / "tuned")
    norm = ExactTensor(name=NORM, value=torch.ones(48, dtype=torch.bfloat16))
    write_part(tmp_path / "p", [norm], layout=tuned.layout, fingerprint="abc")
    raw = (tmp_path / "p").read_bytes()
    for size in (0, 100, len(raw) - 1):
        (tmp_path / "p").write_bytes(raw[:size])
        with pytest.raises(UserError):
            read_part(tmp_path / "p")
    shutil.copy(folders / "base" / "model.safetensors", tmp_path / "q")
    with pytest.raises(UserError, match="not a part"):
        read_part(tmp_path / "q")


def test_a_delta_of_nothing_costs_its_manifest_only(folders, tmp_path):
    make_delta(folders / "base", folders / "base", tmp_path / "none")
    delta = open_delta(tmp_path / "none")
    assert all(delta.load(name) is None for name in delta.names)
    report = inspect_delta(tmp_path / "none")
    assert report.total_bytes == (tmp_path / "none" / "delta.json").stat().st_size
    assert report.entries_by_kind == {"unchanged": 7}


def test_an_existing_output_is_never_touched(folders, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError) as caught:
        make_delta(folders / "base", folders / "tuned", tmp_path / "out")
    assert caught.value.code == "output_exists"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_write_leaves_nothing(folders, tmp_path):
    head = make_head(folders / "base", folders / "tuned")
    with pytest.raises(FileNotFoundError):
        write_delta(tmp_path / "out", [], head=head, sidecars=[tmp_path / "absent.json"])
    assert list(tmp_path.iterdir()) == []


def inspect_entry(folder, name):
    """Size of each section of an entry's payload."""
    sections = open_delta(folder).entry(name).payload.sections
    return {section.key: section.size_bytes for section in sections}


def test_the_report_accounts_for_every_byte(folders):
    report = inspect_delta(folders / "delta", verify_digests=True)
    on_disk = {path.name: path.stat().st_size for path in (folders / "delta").iterdir()}
    packed = on_disk.pop("delta.safetensors") + on_disk.pop("delta.json")
    assert report.total_bytes == report.sizes.total_bytes == packed
    assert report.sidecar_bytes == sum(on_disk.values())
    tuned = open_checkpoint(folders / "tuned")
    assert report.ratio == tuned.size_bytes / packed
    assert report.bits_per_param == packed * 8 / tuned.n_params
    assert report.sizes.exact == 48 * 2
    assert report.entries_by_kind == {
        "lowrank": 2,
        "direct": 1,
        "exact": 1,
        "rows": 2,
        "unchanged": 1,
    }
    key = inspect_entry(folders / "delta", KEY)
    assert key == {"direct.codes": 24 * 5 * 4, "direct.scale": 24 * 2 * 2, "direct.zero": 24 * 2}
    query = inspect_entry(folders / "delta", QUERY)
    down = inspect_entry(folders / "delta", DOWN)
    sizes = [*key.items(), *query.items(), *down.items()]
    codes = sum(size for name, size in sizes if name.endswith("codes"))
    assert report.sizes.codes == codes
    assert report.sizes.scales == sum(size for _, size in sizes) - codes
    embedding = 5 + 20 * 24 + 20 * 2 + 20 + 3 * 48 * 2
    assert report.sizes.embeddings == 2 * embedding
    assert json.loads(json.dumps(report.to_json()))["total_bytes"] == packed


def test_a_matrix_survives_its_payload_with_any_bands():
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn((150, 140), generator=generator)
    for symmetric, group in ((False, (1, 128)), (True, (128, 1))):
        bands = (RankBand(8, 2), RankBand(4, 3), RankBand(3, 5), RankBand(2, 60), RankBand(1, 70))
        low_rank = factorise("rest.weight", delta, bands, group_u=group, symmetric=symmetric)
        check_round_trip(low_rank)
        for bits in PLANES:
            factor = quantise(delta, bits, group, symmetric=symmetric)
            check_round_trip(PackedDirect(name="rest.weight", factor=factor))


def check_round_trip(matrix):
    entry = describe(matrix, dtype="F32")
    raw = bytearray(matrix_to_payload(entry, matrix))
    assert len(raw) % 256 == 0
    again = matrix_from_payload(entry, torch.frombuffer(raw, dtype=torch.uint8))
    assert arrays(again) == arrays(matrix)


def test_a_packed_tensor_that_contradicts_the_fine_tune_is_our_error(folders, tmp_path):
    layout = open_checkpoint(folders / "tuned").layout
    wrong_shape = ExactTensor(name=NORM, value=torch.ones(47, dtype=torch.bfloat16))
    wrong_dtype = ExactTensor(name=NORM, value=torch.ones(48))
    for tensor in (wrong_shape, wrong_dtype):
        with pytest.raises(InternalError):
            write_part(tmp_path / "p", [tensor], layout=layout, fingerprint="f")
