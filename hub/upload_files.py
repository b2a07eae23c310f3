"""Which files an upload may consist of: weights as safetensors, and the text beside them."""

import re
from collections.abc import Mapping, Sequence
from itertools import islice

from django.conf import settings

from deltacome_core.errors import UserError
from deltacome_core.file_names import is_plain_name

SUFFIXES = (".safetensors", ".json", ".txt", ".jsonl", ".jinja", ".md", ".model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf", ".npz")
PLAIN_REASON = "a plain name has letters, digits, dots, dashes and underscores, no folder and no .."
# As transformers names the files of a checkpoint in several: which one it is, and of how many.
SHARD_NAME = re.compile(r"\A(.+)-([0-9]{5})-of-([0-9]{5})\.safetensors\Z")
# The largest tokenizers in use have 35 MB.
MAX_TEXT_BYTES = 64 * 2**20
CONFIG, INDEX = "config.json", "model.safetensors.index.json"


def check_files(files: Sequence[tuple[str, int]]) -> None:
    """Refuse names, sizes and sets of files that cannot be a checkpoint.

    Raises:
        UserError: file_name_unsafe, not_safetensors, upload_too_large, file_set_invalid.
    """
    sizes = dict(files)
    if len(sizes) < len(files):
        raise UserError("file_set_invalid", reason="A name is listed twice")
    for path, size_bytes in files:
        check_name(path)
        if size_bytes < 1:
            raise UserError("file_name_unsafe", path=path, reason="it is empty")
        if not path.endswith(".safetensors") and size_bytes > MAX_TEXT_BYTES:
            reason = f"only weights may have more than {MAX_TEXT_BYTES} bytes"
            raise UserError("file_name_unsafe", path=path, reason=reason)
    total_bytes = sum(sizes.values())
    if total_bytes > settings.UPLOAD_MAX_BYTES or len(sizes) > settings.UPLOAD_MAX_FILES:
        raise UserError(
            "upload_too_large",
            size_bytes=total_bytes,
            files=len(sizes),
            limit_bytes=settings.UPLOAD_MAX_BYTES,
            limit_files=settings.UPLOAD_MAX_FILES,
        )
    _check_set(sizes)


def check_name(path: str) -> None:
    """Refuse a name that is not plain, or whose kind is not on the list.

    Raises:
        UserError: file_name_unsafe, not_safetensors.
    """
    shown = ascii(path[:80])
    if not is_plain_name(path) or ".." in path:
        raise UserError("file_name_unsafe", path=shown, reason=PLAIN_REASON)
    if path.lower().endswith(PICKLES):
        raise UserError("not_safetensors", file=path, found="a format that can run code or hide it")
    if not path.endswith(SUFFIXES) and not path.upper().startswith("LICENSE"):
        raise UserError("file_name_unsafe", path=path, reason="its kind is not on the list")


def _check_set(sizes: Mapping[str, int]) -> None:
    if len({path.lower() for path in sizes}) < len(sizes):
        raise UserError("file_set_invalid", reason="Two names differ only in case")
    weights = [path for path in sizes if path.endswith(".safetensors")]
    if not weights:
        raise UserError("file_set_invalid", reason="There is no safetensors file")
    if CONFIG not in sizes:
        raise UserError("file_set_invalid", reason=f"{CONFIG} is missing")
    _check_shards(weights)
    if len(weights) > 1 and INDEX not in sizes:
        raise UserError("file_set_invalid", reason=f"{INDEX} is missing")


def _check_shards(weights: Sequence[str]) -> None:
    """Miss a shard by the names of the others, before gigabytes move; ingest reads the index."""
    for path in weights:
        found = SHARD_NAME.match(path)
        if found is None:
            continue
        stem, total = found[1], int(found[3])
        wanted = (f"{stem}-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1))
        # The total comes from a name that anybody can write; so many files no upload may have.
        missing = sorted(set(islice(wanted, settings.UPLOAD_MAX_FILES)) - set(weights))
        if missing:
            raise UserError("shard_missing", files=missing)
