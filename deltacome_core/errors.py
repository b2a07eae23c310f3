"""The two kinds of failure: the user's to fix (with a code and a text) and ours."""

from deltacome_core import messages

Param = str | int | float | list[str]


class DeltaError(Exception):
    """Base of every error this project raises on purpose."""


class UserError(DeltaError):
    """Something the user can put right; `code` picks the text in `messages.MESSAGES`."""

    def __init__(self, code: str, /, **params: Param) -> None:
        super().__init__(code)
        self.code = code
        self.params = params

    def __str__(self) -> str:
        return messages.render(self.code, self.params)


class InternalError(DeltaError):
    """A broken invariant of ours; logged with its trace, never explained to a user."""
