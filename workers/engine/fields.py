"""Reading the fields of a request: each is understood, known to be harmless, or refused by name."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from workers.engine.errors import bad_request

Json = dict[str, Any]

# They change nothing in the answer: labels, billing and hints to caches.
HARMLESS = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prediction"),
        *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
    }
)
# Fields that would change the answer and that we do not implement, with the values that mean "off".
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "repetition_penalty": (None, 1),
}
_WHY: Mapping[str, str] = {
    "response_format": "Only response_format of type text is supported.",
    "tools": "Tools are not supported here.",
}


def read_object(body: object) -> Json:
    if not isinstance(body, dict):
        raise bad_request("The request body must be a JSON object.", None, code="invalid_json")
    return body


def check_fields(fields: Json, understood: Collection[str]) -> None:
    """Refuse what we would have to ignore although it asks for another answer."""
    for name, value in fields.items():
        if name in understood or name in HARMLESS:
            continue
        if name not in UNSUPPORTED:
            close = get_close_matches(name, understood, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise bad_request(
                f"{name[:80]} is not a field of this request.{hint}",
                name[:80],
                code="unknown_parameter",
            )
        if not any(_same(value, harmless) for harmless in UNSUPPORTED[name]):
            why = _WHY.get(name, f"{name} is not supported here.")
            raise bad_request(why, name, code="unsupported_parameter")


def _same(left: object, right: object) -> bool:
    """Equality that does not take True for 1."""
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def read_name(fields: Json, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise bad_request(f"{name} must name a backbone or a delta.", name)
    return value


def read_flag(fields: Json, name: str, *, default: bool = False) -> bool:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise bad_request(f"{name} must be true or false.", name)
    return value


def read_integer(fields: Json, name: str, low: int, high: int | None) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_request(f"{name} must be a whole number.", name)
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise bad_request(f"{name} must be {limits}.", name)
    return value


def read_number(fields: Json, name: str, default: float, *, low: float, high: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad_request(f"{name} must be a number.", name)
    # Written so that NaN, which compares false with everything, is refused too.
    if not low <= value <= high:
        raise bad_request(f"{name} must be from {low:g} to {high:g}.", name)
    return float(value)


def is_token_list(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) for item in value
    )
