import subprocess
import sys

import pytest

MODULES = [
    "atomic",
    "checkpoint",
    "delta_folder",
    "entries",
    "errors",
    "fields",
    "inspection",
    "layout",
    "manifest",
    "messages",
    "precision",
    "quantised",
    "recipe",
    "safetensors_file",
    "shards",
    "strict_json",
]


@pytest.mark.parametrize("module", MODULES)
def test_the_module_loads_without_torch(module):
    code = (
        f"import sys; import deltacome_core.{module}; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'django')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
