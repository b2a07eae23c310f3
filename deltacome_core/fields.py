"""Take typed values out of parsed JSON that came from a stranger."""

import re
from collections.abc import Sequence
from math import isfinite
from typing import Any

from deltacome_core.errors import UserError

_SHA256 = re.compile(r"\A[0-9a-f]{64}\Z")
_MAX_NATURAL = 2**63 - 1
_MAX_TEXT_CHARS = 1024


def invalid(reason: str) -> UserError:
    """Make the error for a damaged delta.

    Args:
        reason: what is wrong, without a full stop.

    Returns:
        UserError delta_invalid, to be raised.
    """
    return UserError("delta_invalid", reason=reason)


class Fields:
    """A JSON object whose keys are taken once each; `done` refuses what nobody asked for."""

    def __init__(self, value: Any, *, where: str) -> None:
        self.where = where
        if not isinstance(value, dict):
            raise self.invalid("it is not an object")
        self._value: dict[str, Any] = value
        self._taken: set[str] = set()

    def invalid(self, reason: str) -> UserError:
        return invalid(f"{self.where}: {reason}")

    def at(self, where: str) -> "Fields":
        """Continue with the same object under a clearer name."""
        self.where = where
        return self

    def take(self, key: str) -> Any:
        if key not in self._value:
            raise self.invalid(f"{key[:80]!a} is missing")
        self._taken.add(key)
        return self._value[key]

    def has(self, key: str) -> bool:
        """Tell whether a field that may be absent is there."""
        return key in self._value

    def done(self) -> None:
        unknown = sorted(self._value.keys() - self._taken)
        if unknown:
            raise self.invalid(f"{unknown[0][:80]!a} is not a known field")

    def keys(self, *, limit: int) -> Sequence[str]:
        if len(self._value) > limit:
            raise self.invalid(f"it has {len(self._value)} keys, the limit is {limit}")
        return sorted(self._value)

    def child(self, key: str) -> "Fields":
        return Fields(self.take(key), where=f"{self.where} {key[:80]!a}")

    def text(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str) or len(value) > _MAX_TEXT_CHARS or not value.isprintable():
            raise self.invalid(f"{key[:80]!a} is not a plain text")
        return value

    def sha256(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str) or not _SHA256.match(value):
            raise self.invalid(f"{key[:80]!a} is not a sha256")
        return value

    def flag(self, key: str) -> bool:
        value = self.take(key)
        if not isinstance(value, bool):
            raise self.invalid(f"{key} is neither true nor false")
        return value

    def natural(self, key: str, *, limit: int = _MAX_NATURAL) -> int:
        value = self.take(key)
        # bool is a subclass of int, and true is no count.
        if type(value) is not int or not 0 <= value <= limit:
            raise self.invalid(f"{key} is not a whole number from 0 to {limit}")
        return value

    def number(self, key: str) -> float:
        value = self.take(key)
        if type(value) not in {int, float} or not isfinite(value):
            raise self.invalid(f"{key} is not a number")
        return float(value)

    def scalar(self, key: str) -> str | float | bool | None:
        """Take a text, a number, a flag or null."""
        value = self.take(key)
        if isinstance(value, str):
            return self.text(key)
        if value is not None and not isinstance(value, bool):
            # A whole number stays one, so that writing it again gives the same bytes.
            self.number(key)
        found: str | float | bool | None = value
        return found

    def items(self, key: str, *, limit: int) -> list[Any]:
        value = self.take(key)
        if not isinstance(value, list) or len(value) > limit:
            raise self.invalid(f"{key} is not a list of at most {limit}")
        return value

    def naturals(self, key: str, *, limit: int, count: int | None = None) -> tuple[int, ...]:
        value = self.items(key, limit=_MAX_TEXT_CHARS)
        is_valid = all(type(item) is int and 0 <= item <= limit for item in value)
        if not is_valid or count not in {None, len(value)}:
            raise self.invalid(f"{key} is not a list of whole numbers from 0 to {limit}")
        return tuple(value)
