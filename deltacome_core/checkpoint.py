"""Look into a checkpoint folder without loading it: shapes, sizes, digests, and what fits what."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltacome_core import strict_json
from deltacome_core.errors import UserError
from deltacome_core.file_names import is_plain_name
from deltacome_core.safetensors_file import TensorInfo, read_chunks, read_header

if TYPE_CHECKING:
    from deltacome_core.precision import Precision

Layout = dict[str, tuple[str, tuple[int, ...]]]

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
# What makes the weights usable: kept inside a delta and restored with the checkpoint.
MODEL_SIDECAR_NAMES = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
)
SIDECAR_NAMES = (
    *MODEL_SIDECAR_NAMES,
    "README.md",
    "calibration.jsonl",
    "calibration.txt",
    "evaluation.jsonl",
)
MAX_JSON_BYTES = 64 << 20
# Modules whose rows are the words of a vocabulary, by the names public architectures use.
_VOCABULARY_MODULES = frozenset(
    {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings", "shared"}
)
_HEAD_MODULES = frozenset({"lm_head", "embed_out"})
_CODE_KEYS = frozenset({"auto_map", "custom_pipelines"})
# Types a tensor may change between from a backbone to its fine-tune.
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLocation:
    """Where a tensor lies: `start` counts from the first byte of the file."""

    file: Path
    info: TensorInfo
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened folder; `size_bytes` is that of its weight files, headers included.

    With a `precision`, load_tensor gives what a server with fewer bits computes with; layout and
    hashes stay those of the files.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorLocation]
    files: tuple[Path, ...]
    sidecars: tuple[Path, ...]
    size_bytes: int
    precision: "Precision | None" = None

    @property
    def layout(self) -> Layout:
        return {name: (at.info.dtype, at.info.shape) for name, at in self.tensors.items()}

    def is_rounded(self, name: str) -> bool:
        """Whether a tensor is served with other values than those in the files."""
        return self.precision is not None and name in self.precision.tensors

    @property
    def n_params(self) -> int:
        return sum(at.info.n_params for at in self.tensors.values())

    @property
    def dtype(self) -> str:
        """The data type most parameters have."""
        counts: Counter[str] = Counter()
        for at in self.tensors.values():
            counts[at.info.dtype] += at.info.n_params
        return min(counts, key=lambda dtype: (-counts[dtype], dtype))

    @property
    def architecture(self) -> str:
        names = self.config.get("architectures")
        first = names[0] if isinstance(names, list) and names else self.config.get("model_type")
        return first if isinstance(first, str) else "unknown"


def is_vocabulary_tensor(name: str) -> bool:
    """Tell whether a tensor has one row per token of the vocabulary.

    Args:
        name: full tensor name.

    Returns:
        True for embeddings and output heads.
    """
    parts = name.split(".")
    return len(parts) > 1 and parts[-1] == "weight" and parts[-2] in _VOCABULARY_MODULES


def find_heads(layout: Layout) -> tuple[str, ...]:
    """Say which tensors multiply the last hidden states to give logits.

    Args:
        layout: dtype and shape by tensor name.

    Returns:
        The output heads; where there is none, the one embedding that is tied to it.
    """
    names = tuple(name for name in layout if is_vocabulary_tensor(name))
    heads = tuple(name for name in names if name.split(".")[-2] in _HEAD_MODULES)
    return heads or (names if len(names) == 1 else ())


def is_sidecar(name: str, patterns: Iterable[str] = SIDECAR_NAMES) -> bool:
    """Tell whether a file may stand beside the weights.

    Args:
        name: file name without folders.
        patterns: allow-list of shell patterns.

    Returns:
        True when the name is plain and on the list.
    """
    return is_plain_name(name) and any(fnmatchcase(name, item) for item in patterns)


def find_sidecars(folder: Path, patterns: Iterable[str] = MODEL_SIDECAR_NAMES) -> tuple[Path, ...]:
    """List the files beside the weights that belong to the model.

    Args:
        folder: checkpoint or delta folder.
        patterns: allow-list of shell patterns.

    Returns:
        Paths sorted by name.
    """
    allowed = tuple(patterns)
    found = (path for path in folder.iterdir() if is_sidecar(path.name, allowed))
    return tuple(sorted(path for path in found if path.is_file()))


def check_config(value: object, *, file: str) -> None:
    """Refuse a configuration that would have model-supplied Python code run.

    Args:
        value: parsed JSON.
        file: its name, for the error.

    Raises:
        UserError: config_unsafe.
    """
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            found = sorted(_CODE_KEYS & item.keys())
            if found:
                raise UserError("config_unsafe", file=file, found=found)
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def read_json_object(path: Path, *, code: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: the file.
        code: error code to raise, with `path` and `reason`.

    Returns:
        The object.

    Raises:
        UserError: `code`.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(code, path=path.name, reason=f"{path.name} is larger than 64 MiB")
    try:
        value = strict_json.loads(path.read_bytes(), allow_negative=True)
    except ValueError as error:
        reason = f"{path.name} is not valid JSON ({str(error)[:120]})"
        raise UserError(code, path=path.name, reason=reason) from None
    if not isinstance(value, dict):
        raise UserError(code, path=path.name, reason=f"{path.name} is not a JSON object")
    return value


def _indexed_files(folder: Path) -> tuple[dict[str, str], list[Path]]:
    index = read_json_object(folder / INDEX_NAME, code="index_invalid")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError("index_invalid", reason="it has no weight_map")
    names = set()
    for name in weight_map.values():
        if not isinstance(name, str) or not is_plain_name(name):
            raise UserError("index_invalid", reason=f"{ascii(name)[:80]} is not a plain file name")
        if not name.endswith(".safetensors"):
            raise UserError("index_invalid", reason=f"{name} is not a safetensors file")
        names.add(name)
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise UserError("shard_missing", files=missing)
    return weight_map, [folder / name for name in sorted(names)]


def _weight_files(folder: Path) -> tuple[dict[str, str] | None, list[Path]]:
    has_single = (folder / WEIGHTS_NAME).is_file()
    if (folder / INDEX_NAME).is_file():
        weight_map, files = _indexed_files(folder)
        if has_single and folder / WEIGHTS_NAME not in files:
            reason = f"{WEIGHTS_NAME} lies beside shards that do not include it"
            raise UserError("index_invalid", reason=reason)
        return weight_map, files
    if has_single:
        return None, [folder / WEIGHTS_NAME]
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        found = "a PyTorch pickle, which can run code when opened"
        raise UserError("not_safetensors", file=pickled[0].name, found=found)
    raise UserError("not_a_checkpoint", path=folder.name, reason=f"there is no {WEIGHTS_NAME}")


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorLocation]) -> None:
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise UserError("tensor_missing", tensors=absent)
    for name, at in tensors.items():
        if weight_map.get(name) != at.file.name:
            reason = f"{name} lies in {at.file.name}, the index says {weight_map.get(name)}"
            raise UserError("index_invalid", reason=reason)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check a checkpoint folder and list its tensors; weights are not read.

    Args:
        folder: config.json with model.safetensors, or with shards and their index.

    Returns:
        The checkpoint.

    Raises:
        UserError: not_a_checkpoint, not_safetensors, config_unsafe, index_invalid, shard_missing,
            tensor_missing, duplicate_tensor, and everything read_header raises.
    """
    if not folder.is_dir():
        raise UserError("not_a_checkpoint", path=folder.name, reason="it is not a folder")
    if not (folder / CONFIG_NAME).is_file():
        raise UserError("not_a_checkpoint", path=folder.name, reason=f"there is no {CONFIG_NAME}")
    config = read_json_object(folder / CONFIG_NAME, code="not_a_checkpoint")
    check_config(config, file=CONFIG_NAME)
    weight_map, files = _weight_files(folder)
    tensors: dict[str, TensorLocation] = {}
    size_bytes = 0
    for file in files:
        header = read_header(file)
        size_bytes += header.size_bytes
        for info in header.tensors:
            if info.name in tensors:
                raise UserError("duplicate_tensor", name=info.name, file=file.name)
            start = header.data_start + info.start
            tensors[info.name] = TensorLocation(file=file, info=info, start=start)
    if weight_map is not None:
        _check_index(weight_map, tensors)
    return Checkpoint(
        path=folder,
        config=config,
        tensors=tensors,
        files=tuple(files),
        sidecars=find_sidecars(folder),
        size_bytes=size_bytes,
    )


def at_precision(checkpoint: Checkpoint, precision: "Precision | None") -> Checkpoint:
    """See a checkpoint as it is served.

    Args:
        checkpoint: an opened checkpoint.
        precision: what the server computes with; None for the weights as they are stored.

    Returns:
        The same files, whose tensors load_tensor gives at that precision.
    """
    return replace(checkpoint, precision=precision)


def locate_tensor(checkpoint: Checkpoint, name: str) -> TensorLocation:
    """Find a tensor.

    Args:
        checkpoint: an opened checkpoint.
        name: tensor name.

    Returns:
        Its location.

    Raises:
        UserError: tensor_missing.
    """
    if name not in checkpoint.tensors:
        raise UserError("tensor_missing", tensors=[name])
    return checkpoint.tensors[name]


def hash_tensor(checkpoint: Checkpoint, name: str) -> str:
    """Hash the bytes of one tensor.

    Args:
        checkpoint: an opened checkpoint.
        name: tensor name.

    Returns:
        sha256 as 64 hexadecimal digits.

    Raises:
        UserError: tensor_missing, file_truncated.
    """
    at = locate_tensor(checkpoint, name)
    digest = hashlib.sha256()
    for chunk in read_chunks(at.file, at.start, at.info.size_bytes):
        digest.update(chunk)
    return digest.hexdigest()


def hash_tensors(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> dict[str, str]:
    """Hash tensors one after the other.

    Args:
        checkpoint: an opened checkpoint.
        names: which tensors; all by default.

    Returns:
        sha256 in hexadecimal by tensor name.

    Raises:
        UserError: tensor_missing, file_truncated.
    """
    wanted = checkpoint.tensors if names is None else names
    return {name: hash_tensor(checkpoint, name) for name in wanted}


def checkpoint_digest(layout: Layout, hashes: Mapping[str, str]) -> str:
    """Name a set of weights by content, whatever files it is cut into.

    Args:
        layout: dtype and shape by tensor name.
        hashes: sha256 in hexadecimal by tensor name.

    Returns:
        sha256 in hexadecimal of the canonical JSON {name: [dtype, shape, sha256]}.
    """
    table = {
        name: [dtype, list(shape), hashes[name]] for name, (dtype, shape) in sorted(layout.items())
    }
    return hashlib.sha256(strict_json.dumps_canonical(table)).hexdigest()
