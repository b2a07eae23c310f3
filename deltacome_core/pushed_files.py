"""The files of a checkpoint folder that a push sends."""

from dataclasses import dataclass
from pathlib import Path

from deltacome_core.checkpoint import INDEX_NAME, WEIGHTS_NAME, is_sidecar
from deltacome_core.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class PushedFile:
    """One file of a checkpoint folder, as it was when the push began."""

    path: Path
    size_bytes: int
    modified_ns: int


def find_pushed_files(folder: Path) -> list[PushedFile]:
    """List what a push sends: weights, their index and what may stand beside them.

    Args:
        folder: checkpoint folder.

    Returns:
        Files that are not empty, by name.

    Raises:
        UserError: not_a_checkpoint.
    """
    if not folder.is_dir():
        raise UserError("not_a_checkpoint", path=str(folder), reason="it is not a folder")
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and _is_pushed(path.name) and path.stat().st_size
    )
    if not any(name.endswith(".safetensors") for name in names):
        raise UserError("not_a_checkpoint", path=str(folder), reason="it has no safetensors file")
    stats = {name: (folder / name).stat() for name in names}
    return [
        PushedFile(path=folder / name, size_bytes=stat.st_size, modified_ns=stat.st_mtime_ns)
        for name, stat in stats.items()
    ]


def _is_pushed(name: str) -> bool:
    return name in {WEIGHTS_NAME, INDEX_NAME} or name.endswith(".safetensors") or is_sidecar(name)
