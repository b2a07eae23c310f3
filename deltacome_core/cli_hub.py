"""The commands that talk to a hub."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from deltacome_core.cli_options import AsJson, BitsPerParam, RecipeName, Token, Url
from deltacome_core.cli_output import BYTES_PER_MB, EXIT_FAILURE, print_json, tell
from deltacome_core.recipe import DEFAULT_RECIPE


def push(  # noqa: PLR0913 - one parameter for each option
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    repo: Annotated[str, typer.Argument(help="namespace/name.")],
    *,
    url: Url,
    token: Token,
    kind: Annotated[str, typer.Option(help="delta or backbone.")] = "delta",
    backbone: Annotated[
        str | None, typer.Option(help="namespace/name of the backbone; found by default.")
    ] = None,
    recipe: RecipeName = DEFAULT_RECIPE,
    bits_per_param: BitsPerParam = None,
    visibility: Annotated[str, typer.Option(help="public or private.")] = "private",
    wait: Annotated[bool, typer.Option(help="Wait for the end of the job.")] = True,
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint to a hub; a second call continues a broken one."""
    from deltacome_core.client import HubClient

    with HubClient(url, token) as client:
        job = client.push(
            folder,
            repo,
            on_progress=_progress("sent"),
            kind=kind,
            backbone=backbone,
            recipe=recipe,
            bits_per_param=bits_per_param,
            visibility=visibility,
        )
        tell(f"job {job.id} is {job.state}")
        if wait:
            job = client.wait(job.id, on_update=lambda now: tell(f"{now.state} {now.step}"))
    print_json(asdict(job), wanted=as_json)
    if job.is_finished and job.state != "DONE":
        tell(job.error or job.state)
        raise typer.Exit(EXIT_FAILURE)


def pull(
    name: Annotated[str, typer.Argument(help="namespace/name or namespace/name@revision.")],
    folder: Annotated[Path, typer.Argument(help="Where the files go.")],
    *,
    url: Url,
    token: Annotated[
        str | None, typer.Option(envvar="DELTACOME_TOKEN", help="API token.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download a revision; a second call continues a broken one."""
    from deltacome_core.client import HubClient

    with HubClient(url, token) as client:
        pulled = client.pull(name, folder, on_progress=_progress("on disk"))
    tell(f"{pulled.name} is in {folder}")
    print_json(asdict(pulled) | {"folder": str(folder)}, wanted=as_json)


def _progress(verb: str) -> Callable[[int, int], None]:
    def show(done_bytes: int, total_bytes: int) -> None:
        done, total = done_bytes / BYTES_PER_MB, total_bytes / BYTES_PER_MB
        tell(f"{done:.1f} of {total:.1f} MB {verb}")

    return show
