"""A strict reader of safetensors headers and a writer that gives the same bytes every time."""

import json
import os
import struct
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from deltacome_core import strict_json
from deltacome_core.errors import InternalError, UserError
from deltacome_core.layout import align_up

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
# The library allows 100 MB, which costs it 25 s and 1.4 GB of memory; a model with 65,536
# tensors needs less than 8 MiB.
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 65_536
MAX_RANK = 8
MAX_NAME_CHARS = 256
MAX_METADATA_BYTES = 64 << 10
MAX_METADATA_KEYS = 256
DATA_ALIGNMENT_BYTES = 256
LENGTH_BYTES = 8
_MAX_OFFSET = 2**63 - 1
_OFFSETS = 2
# Marks that a header of MAX_TENSORS tensors and full metadata can need; counted before JSON turns
# eight mebibytes into hundreds of mebibytes of objects.
_MAX_MARKS = {
    b"{": MAX_TENSORS + 1 + MAX_METADATA_BYTES,
    b"[": 2 * MAX_TENSORS + MAX_METADATA_BYTES,
    b'"': 10 * MAX_TENSORS + 2 * MAX_METADATA_BYTES,
    b",": (MAX_RANK + 4) * MAX_TENSORS + MAX_METADATA_BYTES,
}
_UNSAFE_CHARS = frozenset("<>\"'`&\\")
_FOREIGN_MAGIC = (
    (b"PK\x03\x04", "a zip archive or a PyTorch file"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version h", "a Git LFS pointer, not the file itself"),
    *((bytes([0x80, protocol]), "a Python pickle") for protocol in range(2, 6)),
)
_COPY_BYTES = 8 << 20

Chunks = bytes | bytearray | memoryview | Iterable[bytes | bytearray | memoryview]
TensorSource = tuple[str, str, tuple[int, ...], Chunks]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor; start and end are bytes from the first byte of data, not of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start

    @property
    def n_params(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A checked header: tensors lie in file order, contiguous, and end where the file ends."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    data_start: int
    size_bytes: int


def check_tensor_name(name: str) -> None:
    """Refuse names that could deceive a reader, a shell, a page or a file system.

    Args:
        name: name of a tensor.

    Raises:
        UserError: name_unsafe.
    """
    if (
        not 0 < len(name) <= MAX_NAME_CHARS
        or not name.isprintable()
        or name != name.strip()
        or name.startswith("/")
        or ".." in name
        or not _UNSAFE_CHARS.isdisjoint(name)
        or unicodedata.normalize("NFC", name) != name
    ):
        raise UserError("name_unsafe", name=ascii(name[:80]))


def _foreign_format(raw: bytes) -> str | None:
    return next((what for magic, what in _FOREIGN_MAGIC if raw.startswith(magic)), None)


def _header_length(raw: bytes, *, file_size_bytes: int, file: str) -> int:
    if len(raw) < LENGTH_BYTES:
        foreign = _foreign_format(raw)
        if foreign:
            raise UserError("not_safetensors", file=file, found=foreign)
        raise UserError("header_truncated", file=file)
    length: int = struct.unpack("<Q", raw[:LENGTH_BYTES])[0]
    opens = raw[LENGTH_BYTES:][:1] in {b"{", b""}
    foreign = None if opens and length <= MAX_HEADER_BYTES else _foreign_format(raw)
    if not opens and length > MAX_HEADER_BYTES:
        foreign = foreign or "data of a format that is not known here"
    if foreign:
        raise UserError("not_safetensors", file=file, found=foreign)
    if length > MAX_HEADER_BYTES:
        raise UserError("header_too_large", file=file, found=length, limit=MAX_HEADER_BYTES)
    if LENGTH_BYTES + length > file_size_bytes:
        raise UserError("header_truncated", file=file)
    return length


def _invalid(file: str, reason: str) -> UserError:
    return UserError("header_invalid", file=file, reason=reason)


def _load_json(text: bytes, file: str) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise _invalid(file, "it does not start with an opening brace")
    if any(text.count(mark) > limit for mark, limit in _MAX_MARKS.items()):
        raise _invalid(file, f"it describes more than {MAX_TENSORS} tensors can need")
    try:
        document = strict_json.loads(text)
    except strict_json.DuplicateKeyError as error:
        raise UserError("duplicate_tensor", file=file, name=ascii(error.key[:80])) from None
    except ValueError as error:
        raise _invalid(file, f"it is not valid JSON ({str(error)[:120]})") from None
    if not isinstance(document, dict):
        raise _invalid(file, "it is not a JSON object")
    return document


def _parse_metadata(value: object, file: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _invalid(file, "__metadata__ is not an object of texts")
    n_bytes = sum(len(key.encode()) + len(text.encode()) for key, text in value.items())
    if len(value) > MAX_METADATA_KEYS or n_bytes > MAX_METADATA_BYTES:
        raise _invalid(file, f"__metadata__ has {len(value)} keys and {n_bytes} bytes")
    return value


def _naturals(value: object, *, limit: int) -> tuple[int, ...] | None:
    # bool is a subclass of int, and true is no dimension.
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        return None
    numbers = tuple(value)
    return numbers if all(0 <= number <= limit for number in numbers) else None


def _parse_tensor(name: str, value: object, file: str) -> TensorInfo:
    check_tensor_name(name)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _invalid(file, f"{name} does not have exactly dtype, shape and data_offsets")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UserError("unknown_dtype", file=file, name=name, dtype=ascii(dtype)[:40])
    shape = _naturals(value["shape"], limit=_MAX_OFFSET)
    if shape is None or len(shape) > MAX_RANK:
        raise _invalid(file, f"{name} has a shape that is not up to {MAX_RANK} whole numbers")
    offsets = _naturals(value["data_offsets"], limit=_MAX_OFFSET)
    if offsets is None or len(offsets) != _OFFSETS or offsets[0] > offsets[1]:
        raise _invalid(file, f"{name} has data_offsets that are not a start and an end")
    # Zero dimensions are left out so that 0 x 2^62 x 2^62 is refused like its siblings.
    if prod(size for size in shape if size) * ITEM_BYTES[dtype] > _MAX_OFFSET:
        raise _invalid(file, f"{name} has more elements than any file can hold")
    start, end = offsets
    if prod(shape) * ITEM_BYTES[dtype] != end - start:
        raise _invalid(file, f"{name} has {end - start} bytes, which is not its shape times dtype")
    return TensorInfo(name=name, dtype=dtype, shape=shape, start=start, end=end)


def _check_contiguous(tensors: list[TensorInfo], file: str) -> int:
    expected = 0
    for info in tensors:
        if info.start < expected:
            raise UserError("tensor_overlap", file=file, name=info.name)
        if info.start > expected:
            raise UserError("tensor_gap", file=file, name=info.name)
        expected = info.end
    return expected


def parse_header(raw: bytes, *, file_size_bytes: int, file: str = "The file") -> Header:
    """Check the first bytes of a safetensors file and read its header.

    Args:
        raw: at least the length prefix and the whole header; more is ignored.
        file_size_bytes: size of the whole file.
        file: what to call the file in errors.

    Returns:
        The header, tensors sorted by offset.

    Raises:
        UserError: not_safetensors, header_too_large, header_truncated, header_invalid,
            duplicate_tensor, unknown_dtype, name_unsafe, tensor_overlap, tensor_gap,
            file_truncated.
    """
    length = _header_length(raw, file_size_bytes=file_size_bytes, file=file)
    data_start = LENGTH_BYTES + length
    if len(raw) < data_start:
        raise UserError("header_truncated", file=file)
    document = _load_json(raw[LENGTH_BYTES:data_start], file)
    metadata = _parse_metadata(document.pop("__metadata__", {}), file)
    if not 0 < len(document) <= MAX_TENSORS:
        raise _invalid(file, f"it describes {len(document)} tensors")
    tensors = [_parse_tensor(name, value, file) for name, value in document.items()]
    tensors.sort(key=lambda info: (info.start, info.end))
    expected = data_start + _check_contiguous(tensors, file)
    if expected > file_size_bytes:
        raise UserError("file_truncated", file=file, found=file_size_bytes, expected=expected)
    if expected < file_size_bytes:
        raise UserError("tensor_gap", file=file, name="the end of the file")
    return Header(
        tensors=tuple(tensors),
        metadata=metadata,
        data_start=data_start,
        size_bytes=file_size_bytes,
    )


def read_header(path: Path) -> Header:
    """Read and check the header of a file; never more than 8 MiB of it.

    Args:
        path: a safetensors file.

    Returns:
        The header.

    Raises:
        UserError: file_missing, and everything parse_header raises.
    """
    if not path.is_file():
        raise UserError("file_missing", file=path.name)
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        raw = file.read(LENGTH_BYTES + 1)
        if len(raw) > LENGTH_BYTES:
            length = _header_length(raw, file_size_bytes=size_bytes, file=path.name)
            raw += file.read(length - 1) if length else b""
        return parse_header(raw, file_size_bytes=size_bytes, file=path.name)


def encode_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """Write the first bytes of a safetensors file, up to its data.

    Args:
        tensors: (name, dtype, shape) in file order.
        metadata: texts for __metadata__.

    Returns:
        Length and header, a multiple of 256 bytes.

    Raises:
        UserError: name_unsafe, or a header beyond the reader's limits.
        InternalError: two tensors of one name.
    """
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + prod(shape) * ITEM_BYTES[dtype]
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    length = align_up(LENGTH_BYTES + len(text), DATA_ALIGNMENT_BYTES) - LENGTH_BYTES
    raw = struct.pack("<Q", length) + text.ljust(length)
    if len(document) - bool(metadata) != len(tensors):
        raise InternalError("two tensors of one name")
    parse_header(raw, file_size_bytes=len(raw) + end, file="The output")
    return raw


def chunks_of(data: Chunks) -> Iterable[bytes | bytearray | memoryview]:
    """See data as chunks, whether they are whole or come in pieces.

    Args:
        data: bytes, or an iterable of them.

    Returns:
        The pieces in order.
    """
    return (data,) if isinstance(data, bytes | bytearray | memoryview) else data


def write_safetensors(
    path: Path, tensors: Iterable[TensorSource], metadata: Mapping[str, str]
) -> int:
    """Write a safetensors file, streaming the data; equal input gives equal bytes.

    Args:
        path: file to create; it must not exist.
        tensors: (name, dtype, shape, little-endian data or an iterable of chunks of it), written
            in this order. Lazy chunks are drawn one tensor at a time.
        metadata: texts for __metadata__.

    Returns:
        Size of the file in bytes; the data start on a 256-byte boundary and are on disk.

    Raises:
        UserError: name_unsafe, or a header beyond the reader's limits.
        InternalError: a tensor's data are longer or shorter than its shape says.
    """
    sources = list(tensors)
    header = encode_header([source[:3] for source in sources], metadata)
    with path.open("xb") as file:
        file.write(header)
        for name, dtype, shape, data in sources:
            missing = prod(shape) * ITEM_BYTES[dtype]
            for chunk in chunks_of(data):
                missing -= memoryview(chunk).nbytes
                file.write(chunk)
            if missing:
                raise InternalError(f"{name} is off by {missing} bytes")
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def read_chunks(path: Path, start: int, size_bytes: int) -> Iterable[bytes]:
    """Stream a range of a file.

    Args:
        path: the file.
        start: first byte.
        size_bytes: how many bytes.

    Returns:
        Chunks of at most 8 MiB.

    Raises:
        UserError: file_truncated when the file ends early.
    """
    with path.open("rb") as file:
        file.seek(start)
        left = size_bytes
        while left:
            chunk = file.read(min(left, _COPY_BYTES))
            if not chunk:
                expected = start + size_bytes
                found = expected - left
                raise UserError("file_truncated", file=path.name, found=found, expected=expected)
            left -= len(chunk)
            yield chunk
