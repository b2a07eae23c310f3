"""Held-out general text that every machine has: the help pages and sources of Python itself."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CODE_MODULES = ("textwrap", "heapq", "statistics", "fractions", "shlex", "configparser", "csv")
CODE_SHARE = 4
"""One row in so many is code, the others are prose."""


def read_prose() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_code() -> str:
    sources = []
    for name in CODE_MODULES:
        path = importlib.import_module(name).__file__
        if path is not None:
            sources.append(Path(path).read_text(encoding="utf-8"))
    return "\n\n".join(sources)


def cut_evenly(stream: list[int], *, rows: int, length: int) -> list[list[int]]:
    """Take windows that do not overlap, spread over the whole stream.

    Raises:
        ValueError: the stream is too short.
    """
    if len(stream) < rows * length:
        raise ValueError(f"{len(stream)} tokens are fewer than {rows} x {length}")
    stride = len(stream) // max(1, rows)
    return [stream[i * stride : i * stride + length] for i in range(rows)]


def general_tokens(tokenizer: Any, *, rows: int = 64, length: int = 512) -> Tensor:
    """Tokenise held-out text to int64 [rows, length]; the last rows are code.

    It differs between versions of Python, whose help pages grow; the version stands beside results.
    """
    n_code = rows // CODE_SHARE
    taken: list[list[int]] = []
    for text, n in ((read_prose(), rows - n_code), (read_code(), n_code)):
        stream = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        taken += cut_evenly(stream, rows=n, length=length)
    return torch.tensor(taken, dtype=torch.int64)
