"""Responses of the OpenAI API, built from the pieces that generation emits."""

import time
from dataclasses import dataclass

from workers.engine.fields import Json
from workers.engine.generate import Finish, Piece

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Who answers: repeated in every response and chunk."""

    id: str
    model: str
    fingerprint: str
    created: int

    @classmethod
    def begin(cls, answer_id: str, *, model: str, fingerprint: str) -> "Answer":
        return cls(id=answer_id, model=model, fingerprint=fingerprint, created=int(time.time()))

    def envelope(self, kind: str) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def join_text(pieces: list[Piece], finish: Finish) -> str:
    return "".join(piece.text for piece in pieces) + finish.text


def chat_logprobs(pieces: list[Piece]) -> Json:
    return {
        "content": [
            {
                **_chat_token(piece.token, piece.logprob),
                "top_logprobs": [_chat_token(token, logprob) for token, logprob in piece.top],
            }
            for piece in pieces
        ],
        "refusal": None,
    }


def _chat_token(token: str, logprob: float | None) -> Json:
    # A token that is a part of a character has no text of its own to give the bytes of.
    is_whole = _UNFINISHED not in token
    return {"token": token, "logprob": logprob, "bytes": list(token.encode()) if is_whole else None}


def completion_logprobs(pieces: list[Piece], *, offset_chars: int = 0) -> Json:
    offsets: list[int] = []
    for piece in pieces:
        offsets.append(offset_chars)
        offset_chars += len(piece.text)
    return {
        "tokens": [piece.token for piece in pieces],
        "token_logprobs": [piece.logprob for piece in pieces],
        "top_logprobs": [_completion_top(piece) for piece in pieces],
        "text_offset": offsets,
    }


def _completion_top(piece: Piece) -> dict[str, float] | None:
    if piece.logprob is None:
        return None
    table: dict[str, float] = {}
    # Two ids may read the same; the likelier one keeps the entry, so that a client that
    # compares the actual token with the maximum still finds the true maximum.
    for token, logprob in ((piece.token, piece.logprob), *piece.top):
        table[token] = max(logprob, table.get(token, logprob))
    return table
