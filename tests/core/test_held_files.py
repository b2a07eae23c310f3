from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories_core import fine_tune, llama_tensors, make_delta, write_checkpoint

import deltacome_core.held_files
from deltacome_core.container import open_delta
from deltacome_core.errors import UserError
from deltacome_core.held_files import HeldFiles
from deltacome_core.layout import MATRIX_ALIGNMENT_BYTES
from deltacome_core.tensors import read_bytes, read_into


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(deltacome_core.held_files, "_BLOCK_BYTES", 1000)


@pytest.fixture(params=[None, 3000], ids=["one file", "shards"])
def delta(tmp_path, request):
    base = llama_tensors(0)
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", fine_tune(base, 1, new_rows=3))
    options = {} if request.param is None else {"max_shard_bytes": request.param}
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta", **options)
    return open_delta(tmp_path / "delta", verify_digests=False)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(3) as threads:
        yield threads


def test_what_is_held_is_what_the_files_have(delta, pool):
    held = HeldFiles(delta.folder, pool)
    in_memory = replace(delta, read=held.read)
    first = held.memory.data_ptr()
    for name, at in delta.folder.stored.items():
        raw = held.read(at.file, at.start, at.info.size_bytes)
        assert torch.equal(raw, read_bytes(at.file, at.start, at.info.size_bytes))
        if name.startswith("packed."):
            place = raw.data_ptr() - first
            assert place >= 0
            assert place % MATRIX_ALIGNMENT_BYTES == 0
    for name in delta.names:
        found, wanted = in_memory.load(name), delta.load(name)
        assert type(found) is type(wanted)
    held.check()


@pytest.mark.parametrize("where", ["data", "sidecar"])
def test_other_bytes_than_the_manifest_says_are_refused(delta, pool, where):
    folder = delta.folder.path
    path = max(folder.glob("*.safetensors" if where == "data" else "config.json"))
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError) as refusal:
        HeldFiles(delta.folder, pool).check()
    assert refusal.value.code == "file_digest_mismatch"


def test_a_file_that_was_cut_meanwhile_is_refused(delta, pool):
    path = max(delta.folder.path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    held = HeldFiles(delta.folder, pool)
    own = (at for at in delta.folder.stored.values() if at.file == path)
    last = max(own, key=lambda at: at.start)
    for ask in (held.check, lambda: held.read(last.file, last.start, last.info.size_bytes)):
        with pytest.raises(UserError) as refusal:
            ask()
        assert refusal.value.code == "file_truncated"


def test_what_is_asked_for_first_is_read_first(delta):
    """A thread that has just begun must not have to wait for the whole file."""
    begun, opened = [], set()

    class Noting(ThreadPoolExecutor):
        def submit(self, fn, *args):
            if fn is read_into:
                _, file, start = args
                begun.append((Path(file.name), start))
                opened.add(file)
            return super().submit(fn, *args)

    last = max(delta.folder.stored, key=lambda name: delta.folder.stored[name].start)
    at = delta.folder.stored[last]
    with Noting(1) as pool:
        held = HeldFiles(delta.folder, pool, first=[last])
        raw = held.read(at.file, at.start, at.info.size_bytes)
        held.check()
    assert torch.equal(raw, read_bytes(at.file, at.start, at.info.size_bytes))
    wanted = range(at.start // 1000, -(-(at.start + at.info.size_bytes) // 1000))
    assert opened
    assert all(file.closed for file in opened)
    assert begun[: len(wanted)] == [(at.file, 1000 * number) for number in wanted]
    assert (
        len(set(begun))
        == len(begun)
        == sum(
            -(-delta.manifest.files[file.name].size_bytes // 1000)
            for file in {stored.file for stored in delta.folder.stored.values()}
        )
    )
