"""JSON as files from strangers must be read: no duplicate keys, no NaN, no surprises."""

import json
from typing import Any


class DuplicateKeyError(ValueError):
    """A key twice in one object, which parsers resolve differently."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key[:80]!a} occurs twice")
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(key)
            seen.add(key)
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _plain_int(text: str) -> int:
    # Other parsers read -0 as a float; negative numbers have no place in our formats.
    if text.startswith("-"):
        raise ValueError(f"{text[:20]} is negative")
    return int(text)


def loads(raw: bytes, *, allow_negative: bool = False) -> Any:
    """Read one JSON document.

    Args:
        raw: UTF-8 bytes.
        allow_negative: whether negative integers are fine (configurations have them).

    Returns:
        What json.loads would return.

    Raises:
        ValueError: not UTF-8, not JSON, a key twice in one object, NaN or Infinity, text with a
            lone surrogate, nesting deeper than the interpreter's stack, an integer of more than
            4,300 digits.
    """
    try:
        text = raw.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=int if allow_negative else _plain_int,
        )
        if "\\u" in text:
            # An escape can spell half a surrogate pair, which no UTF-8 text can hold.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeError:
        raise ValueError("it is not UTF-8 text") from None
    return value


def dumps_canonical(value: Any) -> bytes:
    """Write JSON so that equal values give equal bytes.

    Args:
        value: anything json can write; floats must be finite.

    Returns:
        UTF-8 bytes, keys sorted, no spaces, non-ASCII escaped.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")
