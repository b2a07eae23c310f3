"""Refusals in the shape of the OpenAI API."""

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A refusal that an OpenAI client understands.

    `retry_after_s` is set where the same request may succeed later.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.kind = kind
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> Mapping[str, str]:
        if self.retry_after_s is None:
            return {"x-should-retry": "false"} if self.status >= 500 else {}  # noqa: PLR2004 (HTTP class)
        return {"retry-after": str(self.retry_after_s), "x-should-retry": "true"}


def bad_request(message: str, param: str | None, *, code: str = "invalid_value") -> ApiError:
    return ApiError(400, code, message, param=param)


def too_busy(message: str, *, code: str, retry_after_s: int) -> ApiError:
    return ApiError(503, code, message, kind="server_error", retry_after_s=retry_after_s)


def too_many(message: str, *, code: str, retry_after_s: int) -> ApiError:
    """A refusal of one caller's share, where `too_busy` speaks of the whole engine."""
    return ApiError(429, code, message, kind="rate_limit_error", retry_after_s=retry_after_s)


def broken(message: str, *, code: str) -> ApiError:
    return ApiError(500, code, message, kind="server_error")


def stopping() -> ApiError:
    return too_busy("The engine is stopping.", code="engine_stopping", retry_after_s=5)
