"""The rules of the house that a linter cannot check: see ARCHITECTURE.md and CONTRIBUTING.md."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT, is_triton, list_modules, public_functions, walk_functions

MAX_FUNCTION_LINES = 60
MAX_TRITON_LINES = 120
MAX_MODULE_LINES = 400
HEAVY = ("torch", "triton", "transformers", "kernels")

START_THE_WEB_PROCESS = f"""
import json, sys
import hub.asgi, hub.celery
from django.urls import get_resolver, URLResolver

def walk(resolver):
    for entry in resolver.url_patterns:
        if isinstance(entry, URLResolver):
            yield from walk(entry)
        else:
            yield entry.callback

callbacks = list(walk(get_resolver()))
loaded = [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps({{"urls": len(callbacks), "loaded": loaded}}))
"""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_functions_fit_one_screen():
    too_long = [
        f"{relative(path)}:{node.lineno} {node.name} has {lines} lines"
        for path in list_modules()
        for node in walk_functions(path)
        if (lines := node.end_lineno - node.lineno + 1)
        > (MAX_TRITON_LINES if is_triton(node) else MAX_FUNCTION_LINES)
    ]
    assert not too_long


def test_modules_stay_short():
    lengths = {
        relative(path): sum(bool(line.strip()) for line in path.read_text().splitlines())
        for path in (*list_modules(), *ROOT.glob("tests/**/*.py"))
    }
    assert not {name: n for name, n in lengths.items() if n > MAX_MODULE_LINES}


def test_public_functions_of_core_and_kernels_have_a_docstring():
    bare = [
        f"{relative(path)}:{node.lineno} {node.name}"
        for path in list_modules("deltacome_core", "kernels")
        for node in public_functions(path)
        if not is_triton(node) and ast.get_docstring(node) is None
    ]
    assert not bare


def test_the_web_process_never_loads_torch():
    started = subprocess.run(
        [sys.executable, "-c", f"import django; django.setup()\n{START_THE_WEB_PROCESS}"],
        cwd=ROOT,
        env={"DJANGO_SETTINGS_MODULE": "hub.settings", "DEBUG": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(started.stdout.splitlines()[-1])
    assert seen["urls"] > 20, "the walk over the URLs found too little to prove anything"
    assert seen["loaded"] == []


def test_import_contracts_hold():
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_every_job_step_is_a_registered_task():
    from hub.celery import app
    from hub.jobs import STEPS

    app.loader.import_default_modules()
    wanted = {f"workers.tasks.{step}" for steps in STEPS.values() for step in steps}
    assert wanted <= set(app.tasks)


def public_operations() -> dict[str, inspect.Signature]:
    import kernels

    return {name: inspect.signature(getattr(kernels, name)) for name in kernels.__all__}


@pytest.mark.parametrize("name", ["dequantise", "shrink", "expand", "merge", "delta_linear"])
def test_kernel_operation_is_public(name):
    assert name in public_operations()


def test_every_kernel_operation_has_a_reference_of_the_same_signature_and_a_test():
    from kernels import reference

    tests = "".join(path.read_text() for path in (ROOT / "tests/kernels").glob("test_*.py"))
    for name, signature in public_operations().items():
        twin = inspect.signature(getattr(reference, name))
        assert list(twin.parameters) == list(signature.parameters), name
        assert name in tests, f"no test in tests/kernels names {name}"
