"""safetensors files as raw bytes, so that a test can say what no writer would."""

import json
import struct


def entry(shape=(2, 3), dtype="F32", start=0, end=24, **extra):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end], **extra}


def frame(header, data=b"", *, length=None):
    """A file of a header (bytes, text or object) and data, with any length prefix."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data
