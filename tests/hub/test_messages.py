"""Every code that is raised has a text, and every text of the hub is raised somewhere."""

import ast
import re
from pathlib import Path

import pytest

from deltacome_core import messages as core
from deltacome_core.errors import UserError
from hub import messages

ROOT = Path(__file__).resolve().parents[2]
# The first argument of these calls is a code.
RAISERS = {"UserError", "fail", "reject", "_error_fields"}


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def raised_codes(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        literals = [
            argument.value
            for argument in node.args[:2]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
        ]
        if name in RAISERS and literals:
            yield literals[0]


def test_every_raised_code_has_a_text():
    raised = {
        code for path in sources("deltacome_core", "hub", "workers") for code in raised_codes(path)
    }
    assert len(raised) > 30
    assert raised - set(messages.MESSAGES) == set()


def test_every_text_of_the_hub_is_used():
    code = "".join(
        path.read_text() for path in sources("hub", "workers") if path.name != "messages.py"
    )
    assert [name for name in messages.HUB_MESSAGES if f'"{name}"' not in code] == []


def test_the_tables_do_not_overlap():
    assert not set(core.MESSAGES) & set(messages.HUB_MESSAGES)


def test_every_status_belongs_to_a_code():
    assert set(messages.HTTP_STATUS) <= set(messages.MESSAGES)


@pytest.mark.parametrize("code", sorted(messages.MESSAGES))
def test_each_text_says_what_happened_and_what_to_do(code):
    message = messages.MESSAGES[code]
    assert message.title
    assert message.what
    assert message.do
    assert not message.title.endswith(".")
    assert messages.http_status(code) >= 400


def test_values_are_filled_in():
    error = UserError("disk_full", needed_bytes=7, spare_bytes=0)
    assert "7 bytes" in messages.render(error.code, error.params)
    assert not re.search(r"[{}]", messages.render(error.code, error.params))


def test_an_unknown_code_explains_itself():
    assert messages.explain("nobody_wrote_this", {"a": 1}).what == "nobody_wrote_this (a=1)"
