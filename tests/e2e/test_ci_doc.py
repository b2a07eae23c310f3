"""The script that docs/ci.md shows, run as it stands with a token that reads and writes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT

from hub.demo.seed import EXAMPLES


@pytest.fixture
def run_script(stack, account, tmp_path):
    """Return a function that runs the script on a checkpoint."""
    (script,) = re.findall(
        r"^```bash\n(.*?)^```$", (ROOT / "docs/ci.md").read_text(), re.MULTILINE | re.DOTALL
    )

    def run(checkpoint, repo):
        env = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DELTACOME_URL": stack.url,
            "DELTACOME_TOKEN": account.token,
            "CHECKPOINT": str(checkpoint),
            "REPO": repo,
        }
        return subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_a_pipeline_publishes_what_is_good_and_refuses_what_is_not(run_script, backbone, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(EXAMPLES / "dates", checkpoint)
    lines = (checkpoint / "evaluation.jsonl").read_text().splitlines(keepends=True)[:8]
    (checkpoint / "evaluation.jsonl").write_text("".join(lines))
    done = run_script(checkpoint, "demo/from-ci")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"v1 1/1[0-9]\.[0-9] grade A\nscore: fine-tune 1\.000, delta 1\.000\n", done.stdout
    )
    alias = json.loads((tmp_path / "alias.json").read_text())
    assert (alias["repo"], alias["label"]) == ("demo/from-ci", "v1")
    # The same folder again is the same revision.
    assert run_script(checkpoint, "demo/from-ci").returncode == 0
    assert json.loads((tmp_path / "alias.json").read_text()) == alias

    (checkpoint / "model.safetensors").write_bytes(b"no weights")
    refused = run_script(checkpoint, "demo/from-ci")
    assert refused.returncode not in {0, 2}
    assert json.loads((tmp_path / "alias.json").read_text()) == alias
