"""What commands say: text for people goes to stderr, data to stdout."""

import json
from typing import Any

import typer

EXIT_FAILURE = 1
BYTES_PER_MB = 1_000_000


def tell(text: str) -> None:
    """Say something to the person at the terminal.

    Args:
        text: one line or more, without the last line break.
    """
    typer.echo(text, err=True)


def print_json(document: dict[str, Any], *, wanted: bool) -> None:
    """Write the one object a command gives to programs.

    Args:
        document: what the command found.
        wanted: whether --json was given.
    """
    if wanted:
        typer.echo(json.dumps(document, ensure_ascii=False))
