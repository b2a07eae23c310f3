"""The product's own source, parsed once for the tests that measure it."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("deltacome_core", "kernels", "hub", "workers")
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def list_modules(*packages: str) -> list[Path]:
    """Every Python file of the packages, generated migrations left out."""
    found = (path for name in packages or PACKAGES for path in (ROOT / name).rglob("*.py"))
    return sorted(path for path in found if "migrations" not in path.parts)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def walk_functions(path: Path) -> Iterator[FunctionNode]:
    return (node for node in ast.walk(parse(path)) if isinstance(node, FunctionNode))


def is_triton(function: FunctionNode) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def public_functions(path: Path) -> Iterator[FunctionNode]:
    """Functions of the module without a leading underscore."""
    for node in parse(path).body:
        if isinstance(node, FunctionNode) and not node.name.startswith("_"):
            yield node


def called_name(call: ast.Call) -> str:
    """`f` of `f(…)` and of `module.f(…)`."""
    return ast.unparse(call.func).rpartition(".")[2]


def string_constants(node: ast.AST) -> set[str]:
    return {
        child.value
        for child in ast.walk(node)
        if isinstance(child, ast.Constant) and isinstance(child.value, str)
    }
