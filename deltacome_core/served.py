"""Write a backbone as a plain checkpoint of the values that a server with fewer bits uses."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from deltacome_core.atomic import new_folder
from deltacome_core.checkpoint import (
    INDEX_NAME,
    Checkpoint,
    TensorLocation,
    at_precision,
    open_checkpoint,
)
from deltacome_core.manifest import read_manifest
from deltacome_core.safetensors_file import TensorSource, write_safetensors
from deltacome_core.tensors import load_tensor, tensor_bytes


def write_served(backbone: Checkpoint, out_dir: Path) -> None:
    """Write a checkpoint whose files hold what load_tensor gives, one tensor in memory at a time.

    Args:
        backbone: at the precision it is served with.
        out_dir: folder to create; it appears whole or not at all.

    Raises:
        UserError: output_exists, file_truncated.
    """
    with new_folder(out_dir) as folder:
        for file in backbone.files:
            inside = [(n, at) for n, at in backbone.tensors.items() if at.file == file]
            sources = [_source(backbone, name, at) for name, at in inside]
            write_safetensors(folder / file.name, sources, {"format": "pt"})
        index = backbone.path / INDEX_NAME
        kept = [*backbone.sidecars, *([index] if index.is_file() else [])]
        for sidecar in kept:
            shutil.copyfile(sidecar, folder / sidecar.name)


def _source(backbone: Checkpoint, name: str, at: TensorLocation) -> TensorSource:
    def chunks() -> Iterator[memoryview]:
        yield tensor_bytes(load_tensor(backbone, name))

    return name, at.info.dtype, at.info.shape, chunks()


@contextmanager
def served_backbone(base_dir: Path, delta_dir: Path | None) -> Iterator[Path]:
    """Give a folder that transformers loads the backbone of a delta from, as it is served.

    Args:
        base_dir: checkpoint folder of the backbone as it is stored.
        delta_dir: the delta, which names the precision; a copy lies beside it if one is needed.

    Yields:
        base_dir itself, or a copy at the delta's precision that is removed when the block ends.

    Raises:
        UserError: everything open_checkpoint and read_manifest raise.
    """
    precision = None if delta_dir is None else read_manifest(delta_dir).backbone.precision
    if delta_dir is None or precision is None:
        yield base_dir
        return
    with TemporaryDirectory(dir=delta_dir.parent, prefix=".served.") as scratch:
        folder = Path(scratch) / "backbone"
        write_served(at_precision(open_checkpoint(base_dir), precision), folder)
        yield folder
