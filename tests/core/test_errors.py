import ast
import string
from pathlib import Path

import pytest

import deltacome_core
from deltacome_core import messages
from deltacome_core.errors import DeltaError, InternalError, UserError

CORE = Path(deltacome_core.__file__).parent


def raised_codes():
    """Every UserError("code", ...) written in the core, with the names of its values."""
    for path in sorted(CORE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("UserError"):
                first = node.args[0]
                codes = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
                names = {keyword.arg for keyword in node.keywords}
                for code in codes:
                    if isinstance(code, ast.Constant):
                        yield pytest.param(code.value, names, id=f"{path.stem}:{node.lineno}")


@pytest.mark.parametrize(("code", "given"), list(raised_codes()))
def test_every_raised_code_has_a_text_and_all_its_values(code, given):
    message = messages.MESSAGES[code]
    needed = {
        name
        for text in (message.title, message.what, message.do)
        for _, name, _, _ in string.Formatter().parse(text)
        if name
    }
    assert needed <= given


@pytest.mark.parametrize("code", sorted(messages.MESSAGES))
def test_a_text_says_what_happened_and_what_to_do(code):
    message = messages.MESSAGES[code]
    assert message.title[0].isupper()
    assert not message.title.endswith(".")
    assert message.what.endswith(".")
    assert message.do.endswith(".")


def test_a_user_error_renders_its_text():
    error = UserError("recipe_unknown", name="zip", known=["come", "datafree"])
    assert str(error) == (
        "No recipe has this name. zip is not a recipe. Known: come, datafree. "
        "Choose one of the known recipes."
    )
    assert isinstance(error, DeltaError)
    assert not isinstance(error, InternalError)


def test_a_long_list_is_cut_in_the_text_but_kept_in_the_values():
    names = [f"t{number}" for number in range(12)]
    error = UserError("tensor_missing", tensors=names)
    assert "t0, t1, t2, t3, t4 and 7 more" in str(error)
    assert error.params["tensors"] == names


def test_braces_in_a_value_are_not_a_format():
    error = UserError("name_unsafe", name="{name.__class__}")
    assert "{name.__class__}" in str(error)


def test_an_unknown_code_and_a_missing_value_still_render():
    assert str(UserError("made_up", n=3)) == "made_up (n=3)"
    assert "(no name given)" in messages.render("name_unsafe", {})
