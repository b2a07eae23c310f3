"""What the code promises in its texts: error messages, and the table of settings."""

import ast
import re

from source_tree import ROOT, called_name, list_modules, parse, string_constants

# Calls that end in a message for a person, and the position of the code among their arguments.
CODE_POSITION = {"UserError": 0, "fail": 1, "reject": 1}
ENV_READERS = re.compile(r"^(os\.environ\.get|env\.get|env(bool|int|float|list|secret))$")


def raised_codes() -> dict[str, str]:
    """Every literal error code → the place that raises it."""
    found: dict[str, str] = {}
    for path in list_modules():
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.Call) or called_name(node) not in CODE_POSITION:
                continue
            position = CODE_POSITION[called_name(node)]
            for argument in node.args[position : position + 1]:
                choices = (
                    [argument.body, argument.orelse] if isinstance(argument, ast.IfExp) else []
                )
                for code in filter(None, map(_constant, [argument, *choices])):
                    found[code] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def test_every_raised_code_has_a_message():
    from hub.messages import MESSAGES

    raised = raised_codes()
    assert len(raised) > 30, "the search found too little to prove anything"
    assert not {code: place for code, place in raised.items() if code not in MESSAGES}


def test_every_message_is_raised():
    from hub.messages import MESSAGES

    used: set[str] = set()
    for path in list_modules():
        if path.name != "messages.py":
            used |= string_constants(parse(path))
    assert not set(MESSAGES) - used


def test_every_message_says_what_happened_and_what_to_do():
    from hub.messages import MESSAGES

    empty = [
        code
        for code, message in MESSAGES.items()
        if not (message.title.strip() and message.what.strip() and message.do.strip())
    ]
    assert not empty


def read_variables() -> set[str]:
    """Names of the environment variables that the product reads."""
    names: set[str] = set()
    for path in list_modules("hub", "workers", "deltacome_core"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and ENV_READERS.match(ast.unparse(node.func)):
                names |= {n for n in map(_constant, node.args[:1]) if n}
            elif isinstance(node, ast.keyword) and node.arg == "envvar":
                names |= {n for n in [_constant(node.value)] if n}
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                names |= {n for n in [_constant(node.slice)] if n}
    return names


def _constant(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def test_settings_and_their_table_agree():
    rows = re.findall(
        r"^\| `([A-Z][A-Z0-9_]+)` \|", (ROOT / "docs/settings.md").read_text(), re.MULTILINE
    )
    assert len(rows) == len(set(rows))
    assert set(rows) == read_variables()
