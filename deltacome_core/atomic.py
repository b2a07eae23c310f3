"""Folders and files that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltacome_core.errors import UserError


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut.

    Args:
        folder: the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary sibling and rename it to `path` when the block ends without an error.

    Args:
        path: folder to create; its parents are made as needed.

    Yields:
        The temporary folder; it is removed when the block fails.

    Raises:
        UserError: output_exists.
    """
    _refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        # mkdtemp makes folders private; the finished one gets what the umask allows.
        temporary.chmod(0o777 & ~_umask())
        sync_folder(temporary)
        _refuse_existing(path)
        temporary.rename(path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a temporary sibling and rename it to `path` when the block ends without an error.

    Args:
        path: file to create; its parents are made as needed.

    Yields:
        Where to write; nothing is there yet, and it is removed when the block fails.

    Raises:
        UserError: output_exists.
    """
    _refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        _refuse_existing(path)
        temporary.rename(path)
        sync_folder(path.parent)


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise UserError("output_exists", path=str(path))


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_file(path: Path, data: bytes) -> None:
    """Write a small file to disk.

    Args:
        path: file to create; it must not exist.
        data: its content.
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
