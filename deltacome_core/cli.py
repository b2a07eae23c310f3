"""The `deltacome` command: text for people goes to stderr, data to stdout."""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from deltacome_core.cli_hub import pull, push
from deltacome_core.cli_options import (
    AsJson,
    Base,
    BitsPerParam,
    DeltaDir,
    Device,
    Force,
    MatrixBits,
    Precision,
    Ratio,
    RecipeName,
    TotalBytes,
    Tuned,
    read_budget,
)
from deltacome_core.cli_output import BYTES_PER_MB, EXIT_FAILURE, print_json, tell
from deltacome_core.errors import UserError
from deltacome_core.precision import NATIVE
from deltacome_core.recipe import DEFAULT_RECIPE

if TYPE_CHECKING:
    from deltacome_core.units import LayerDone

EXIT_INTEGRITY = 7
EXIT_INCOMPATIBLE = 12
_EXIT_CODES = {
    "file_digest_mismatch": EXIT_INTEGRITY,
    "delta_invalid": EXIT_INTEGRITY,
    "file_truncated": EXIT_INTEGRITY,
    "header_truncated": EXIT_INTEGRITY,
    "backbone_mismatch": EXIT_INCOMPATIBLE,
    "backbone_digest_mismatch": EXIT_INCOMPATIBLE,
    "backbone_unrelated": EXIT_INCOMPATIBLE,
    "fine_tune_mismatch": EXIT_INCOMPATIBLE,
    "residual_mismatch": EXIT_INCOMPATIBLE,
    "shape_mismatch": EXIT_INCOMPATIBLE,
}
_STEPS_TOLD = 10

# Rich is left out of help and tracebacks: importing it takes longer than all the rest.
app = typer.Typer(
    name="deltacome",
    help="Keep full fine-tunes as verified packed deltas to their backbone.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def compress(  # noqa: PLR0913 - one parameter for each option
    *,
    base: Base,
    tuned: Tuned,
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    recipe: RecipeName = DEFAULT_RECIPE,
    ratio: Ratio = None,
    total_bytes: TotalBytes = None,
    bits_per_param: BitsPerParam = None,
    matrix_bits: MatrixBits = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text (.txt or .jsonl) of the kind the fine-tune is for.")
    ] = None,
    backbone_precision: Precision = NATIVE,
    force: Force = False,
    device: Device = "cpu",
    devices: Annotated[
        str | None, typer.Option(help="CUDA devices that share the layers, for example 0,1.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compress a fine-tune into a delta; a killed run continues where it stopped."""
    from deltacome_core.compress import compress_checkpoint
    from deltacome_core.recipe import get_recipe

    report = compress_checkpoint(
        base,
        tuned,
        out,
        get_recipe(recipe, matrix_bits=matrix_bits),
        budget=read_budget(ratio, total_bytes, bits_per_param, matrix_bits),
        calibration=calibration,
        device=device if devices is None else [f"cuda:{name}" for name in devices.split(",")],
        backbone_precision=backbone_precision,
        force=force,
        on_layer=_tell_layer,
        on_step=_tell_step,
    )
    tell(
        f"{out}: {report.total_bytes / BYTES_PER_MB:.2f} MB, {report.ratio:.2f}x smaller, "
        f"{report.bits_per_param:.3f} bits per parameter, {report.seconds:.1f} s; "
        f"{report.with_feedback} of {report.n_matrices} matrices calibrated"
    )
    if report.distilled is not None:
        tell(report.distilled.describe())
    if not report.payload_bytes:
        tell("The fine-tune equals the backbone: 0 bytes of payload, nothing to store.")
    if force:
        tell("Whether this is a fine-tune of the backbone was not asked: run `deltacome verify`.")
    print_json(report.to_json(), wanted=as_json)


def _tell_layer(done: "LayerDone") -> None:
    where = f"layer {done.index + 1}/{done.n_layers} {done.group}"
    if done.resumed:
        tell(f"{where}: already done")
    else:
        tell(f"{where}: {done.n_matrices} matrices, {done.seconds:.2f} s")


def _tell_step(done: int, total: int) -> None:
    if done % _STEPS_TOLD == 0:
        tell(f"training step {done}/{total}")


@app.command()
def plan(  # noqa: PLR0913 - one parameter for each option
    *,
    base: Base,
    tuned: Tuned,
    recipe: RecipeName = DEFAULT_RECIPE,
    ratio: Ratio = None,
    total_bytes: TotalBytes = None,
    bits_per_param: BitsPerParam = None,
    measure: Annotated[
        bool, typer.Option(help="Read the weights too, and predict the error.")
    ] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Say what a delta will weigh, from the headers of both checkpoints."""
    from deltacome_core.cli_plan import plan_rows
    from deltacome_core.recipe import get_recipe

    rows = plan_rows(
        base,
        tuned,
        get_recipe(recipe),
        budget=read_budget(ratio, total_bytes, bits_per_param),
        measure=measure,
        device=device,
    )
    for row in rows:
        tell(row.describe())
    print_json({"recipe": recipe, "rows": [row.to_json() for row in rows]}, wanted=as_json)
    if all(row.plan is None for row in rows):
        sys.exit(EXIT_FAILURE)


@app.command()
def fit(
    *,
    base: Base,
    deltas: Annotated[list[Path], typer.Argument(help="Folders of deltas of the backbone.")],
    gpu: Annotated[float, typer.Option(min=1, help="Memory of the card, GB.")] = 80.0,
    kv_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of all conversations at once.")
    ] = 16_384,
    as_json: AsJson = False,
) -> None:
    """Say how many deltas like these fit on a GPU beside their backbone."""
    from deltacome_core.memory import GIGABYTE, describe_forecast, forecast_files

    card_bytes = int(gpu * GIGABYTE)
    found = forecast_files(base, deltas, kv_tokens=kv_tokens)
    tell(describe_forecast(found, card_bytes=card_bytes))
    fits = found.total_bytes <= card_bytes
    sizes = {"card_bytes": card_bytes, "fits": fits, "room": found.count_fitting(card_bytes)}
    print_json(found.to_json() | sizes, wanted=as_json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of the delta.")], *, as_json: AsJson = False
) -> None:
    """Show where the bytes of a delta go."""
    from deltacome_core.inspection import inspect_delta

    report = inspect_delta(path)
    tell(
        f"{report.manifest.fine_tune.architecture}, {report.n_params:,} parameters, "
        f"recipe {report.manifest.recipe.name}, "
        f"backbone served as {report.manifest.backbone.served_as}\n"
        f"{report.total_bytes:,} bytes, {report.ratio:.2f}x smaller, "
        f"{report.bits_per_param:.3f} bits per parameter"
    )
    for name, size_bytes in asdict(report.sizes).items():
        tell(f"  {name:<11}{size_bytes:>14,}")
    print_json(report.to_json(), wanted=as_json)


@app.command()
def verify(
    *,
    base: Base,
    tuned: Tuned,
    delta: DeltaDir,
    prompts: Annotated[
        Path | None, typer.Option(help="Held-out texts (.jsonl or .txt); built in by default.")
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Compare a delta with the fine-tune it stands for; exit 1 when it fails."""
    from deltacome_core.verify import save_report, verify_delta

    chosen = () if prompts is None else (prompts,)
    report = verify_delta(base, tuned, delta, prompts=chosen, device=device)
    save_report(report, delta)
    tell(
        f"grade {report.grade}: recovery {report.recovery:.4f}, KL {report.kl:.5f}, "
        f"top-1 {report.top1:.4f}, perplexity ratio {report.ppl_ratio:.4f}, "
        f"greedy match {report.greedy_match:.3f}"
    )
    for check in report.checks:
        state = "ok" if check.ok else "FAILED"
        tell(f"  {check.name}: {check.value:.5g} (threshold {check.threshold:g}) {state}")
    print_json(report.to_json(), wanted=as_json)
    if report.grade == "F":
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def evaluate(
    *,
    base: Base,
    items: Annotated[Path, typer.Option(help='.jsonl file of {"prompt", "answer"} lines.')],
    tuned: Annotated[Path | None, typer.Option(help="Checkpoint folder of the fine-tune.")] = None,
    delta: Annotated[Path | None, typer.Option(help="Folder of the delta.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the longest answer.")] = 64,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Score backbone, fine-tune and delta on the same items by exact match."""
    from deltacome_core.evaluate import evaluate_subjects

    summary = evaluate_subjects(
        items,
        base_dir=base,
        tuned_dir=tuned,
        delta_dir=delta,
        max_new_tokens=max_new_tokens,
        device=device,
    )
    for subject in ("backbone", "finetune", "delta"):
        if subject in summary:
            found = summary[subject]
            tell(f"{subject:<9} {found['accuracy']:.4f} ± {found['se']:.4f} (n = {found['n']})")
    print_json(summary, wanted=as_json)


@app.command()
def reconstruct(
    *,
    base: Base,
    delta: DeltaDir,
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; the fine-tune's by default.")
    ] = None,
    residual: Annotated[
        Path | None, typer.Option(help="File of `deltacome residual`: makes the result exact.")
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Write the fine-tune as a checkpoint that transformers loads."""
    from deltacome_core.models import parse_dtype, resolve_device
    from deltacome_core.reconstruct import reconstruct_checkpoint

    report = reconstruct_checkpoint(
        base,
        delta,
        out,
        dtype=None if dtype is None else parse_dtype(dtype),
        device=resolve_device(device),
        residual=residual,
    )
    tell(f"{out}: {report.n_tensors} tensors, {report.size_bytes / BYTES_PER_MB:.2f} MB")
    print_json(asdict(report) | {"path": str(out)}, wanted=as_json)


@app.command()
def residual(
    *,
    base: Base,
    tuned: Tuned,
    delta: DeltaDir,
    out: Annotated[Path, typer.Option(help="File to create, FILE.safetensors.")],
    as_json: AsJson = False,
) -> None:
    """Write what a delta lost, so that both together give the fine-tune bit for bit."""
    from deltacome_core.residual_writer import write_residual

    report = write_residual(base, tuned, delta, out)
    tell(
        f"{out}: {report.size_bytes / BYTES_PER_MB:.2f} MB, {report.n_coded} tensors coded, "
        f"{report.n_exact} exact already"
    )
    print_json(report.to_json(), wanted=as_json)


app.command()(push)
app.command()(pull)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line.

    Args:
        arguments: without the program's name; those of the process by default.

    Raises:
        SystemExit: 0 done, 1 failed, 2 wrong usage, 7 damaged files, 12 checkpoints that do not
            belong together.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(args=given, prog_name="deltacome")
    except UserError as error:
        tell(f"{error} [{error.code}]")
        if "--json" in given:
            failure = {"code": error.code, "message": str(error), "params": error.params}
            print_json({"error": failure}, wanted=True)
        sys.exit(_EXIT_CODES.get(error.code, EXIT_FAILURE))
    except BrokenPipeError:
        # The reader of stdout went away; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILURE)
    sys.exit(0)


if __name__ == "__main__":
    main()
