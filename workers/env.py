"""Numbers from the environment; one that cannot be read stops the process with its name."""

from collections.abc import Mapping


def envint(name: str, default: int, *, env: Mapping[str, str]) -> int:
    """Read a whole number.

    Raises:
        ValueError: the value is not one.
    """
    value = env.get(name, "")
    try:
        return int(value) if value else default
    except ValueError:
        raise ValueError(f"{name} must be a whole number, found {value!r}") from None


def envfloat(name: str, default: float, *, env: Mapping[str, str]) -> float:
    """Read a number.

    Raises:
        ValueError: the value is not one.
    """
    value = env.get(name, "")
    try:
        return float(value) if value else default
    except ValueError:
        raise ValueError(f"{name} must be a number, found {value!r}") from None
