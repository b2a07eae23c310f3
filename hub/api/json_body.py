"""JSON that a caller sends: RFC 8259 in UTF-8, whose text every database can hold."""

import json
from collections.abc import Mapping
from typing import IO, Any

from rest_framework.exceptions import ParseError
from rest_framework.parsers import JSONParser
from rest_framework.utils.json import strict_constant


def parse_json(raw: bytes) -> Any:
    """Read a body.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has half a surrogate pair in a text.
    """
    try:
        value = json.loads(raw.decode(), parse_constant=strict_constant)
        # Only an escape can bring a half, for UTF-8 has none.
        if rb"\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("the body is nested too deeply") from None
    return value


class StrictJSONParser(JSONParser):
    def parse(
        self,
        stream: IO[bytes],
        media_type: str | None = None,
        parser_context: Mapping[str, Any] | None = None,
    ) -> Any:
        del media_type, parser_context
        try:
            return parse_json(stream.read())
        except ValueError as error:
            raise ParseError(str(error)) from None
