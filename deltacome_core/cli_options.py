"""Options that several commands of the command line share."""

from pathlib import Path
from typing import Annotated

import typer

from deltacome_core.budget import Budget
from deltacome_core.errors import UserError
from deltacome_core.precision import PRECISIONS
from deltacome_core.recipe import PRESETS

Base = Annotated[Path, typer.Option(help="Checkpoint folder of the backbone.")]
Tuned = Annotated[Path, typer.Option(help="Checkpoint folder of the fine-tune.")]
DeltaDir = Annotated[Path, typer.Option("--delta", help="Folder of the delta.")]
RecipeName = Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")]
Ratio = Annotated[
    float | None, typer.Option(help="Budget: so many times smaller than the fine-tune.")
]
TotalBytes = Annotated[int | None, typer.Option("--bytes", help="Budget: bytes of the delta.")]
BitsPerParam = Annotated[
    float | None, typer.Option(help="Budget: bits of the delta per parameter of the fine-tune.")
]
MatrixBits = Annotated[
    float | None,
    typer.Option(help="Bits per parameter of the matrices alone, instead of a budget."),
]
Precision = Annotated[
    str, typer.Option(help=f"What the backbone is served with: {', '.join(PRECISIONS)}.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Accept weights that look like another backbone's.")
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
Url = Annotated[
    str, typer.Option(envvar="DELTACOME_URL", help="Address of the hub.", show_default=False)
]
Token = Annotated[
    str, typer.Option(envvar="DELTACOME_TOKEN", help="API token.", show_default=False)
]


def read_budget(
    ratio: float | None,
    total_bytes: int | None,
    bits_per_param: float | None,
    matrix_bits: float | None = None,
) -> Budget | None:
    """Make one budget of the options for it.

    Raises:
        UserError: budget_invalid, there are several or one is not positive.
    """
    given = [value for value in (ratio, total_bytes, bits_per_param) if value is not None]
    if given and matrix_bits is not None:
        raise UserError("budget_invalid")
    if not given:
        return None
    return Budget(ratio=ratio, total_bytes=total_bytes, bits_per_param=bits_per_param)
