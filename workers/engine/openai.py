"""Requests and responses of the OpenAI API: what is understood, what is refused."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.engine.errors import bad_request
from workers.engine.generate import Piece, Sampling

Json = dict[str, Any]

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_PROMPTS = 64
MAX_TOP_LOGPROBS = 20

# Fields that would change the answer and that we do not implement, with the values that mean "off".
# Anything else we do not know (user, metadata, store, ...) changes nothing and is ignored.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "parallel_tool_calls": (None, True, False),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "reasoning_effort": (None,),
    "web_search_options": (None,),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "repetition_penalty": (None, 1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    model: str
    messages: tuple[Json, ...]
    sampling: Sampling
    stream: bool
    include_usage: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    sampling: Sampling
    stream: bool
    include_usage: bool
    echo: bool


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


def parse_chat(body: object) -> ChatRequest:
    fields = _fields(body)
    wants_logprobs = _flag(fields, "logprobs")
    top = _integer(fields, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top is not None and not wants_logprobs:
        raise bad_request("top_logprobs needs logprobs: true.", "top_logprobs")
    stream = _flag(fields, "stream")
    return ChatRequest(
        model=_model(fields),
        messages=_messages(fields.get("messages")),
        sampling=_sampling(
            fields, logprobs=(top or 0) if wants_logprobs else None, max_tokens=_chat_limit(fields)
        ),
        stream=stream,
        include_usage=_include_usage(fields, stream=stream),
    )


def parse_completion(body: object) -> CompletionRequest:
    fields = _fields(body)
    stream = _flag(fields, "stream")
    echo = _flag(fields, "echo")
    prompts = _prompts(fields.get("prompt"))
    if stream and echo:
        raise bad_request("echo cannot be streamed; set stream to false.", "echo")
    limit = _integer(fields, "max_tokens", 0 if echo else 1, None)
    return CompletionRequest(
        model=_model(fields),
        prompts=prompts,
        sampling=_sampling(
            fields,
            logprobs=_integer(fields, "logprobs", 0, MAX_TOP_LOGPROBS),
            max_tokens=16 if limit is None else limit,
        ),
        stream=stream,
        include_usage=_include_usage(fields, stream=stream),
        echo=echo,
    )


def _fields(body: object) -> Json:
    if not isinstance(body, dict):
        raise bad_request("The request body must be a JSON object.", None, code="invalid_json")
    for name, harmless in _UNSUPPORTED.items():
        if name in body and not any(_same(body[name], value) for value in harmless):
            raise bad_request(f"{name} is not supported here.", name, code="unsupported_parameter")
    if body.get("n") not in (None, 1):
        raise bad_request("Only n = 1 is supported.", "n", code="unsupported_parameter")
    wanted = body.get("response_format")
    if wanted is not None and wanted != {"type": "text"}:
        raise bad_request(
            "Only response_format of type text is supported.",
            "response_format",
            code="unsupported_parameter",
        )
    return body


def _same(left: object, right: object) -> bool:
    """Equality that does not take True for 1."""
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _model(fields: Json) -> str:
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise bad_request("model must name a backbone or a delta.", "model")
    return model


def _flag(fields: Json, name: str) -> bool:
    value = fields.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise bad_request(f"{name} must be true or false.", name)
    return value


def _integer(fields: Json, name: str, low: int, high: int | None) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_request(f"{name} must be a whole number.", name)
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise bad_request(f"{name} must be {limits}.", name)
    return value


def _number(fields: Json, name: str, default: float, *, low: float, high: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad_request(f"{name} must be a number.", name)
    # Written so that NaN, which compares false with everything, is refused too.
    if not low <= value <= high:
        raise bad_request(f"{name} must be from {low:g} to {high:g}.", name)
    return float(value)


def _sampling(fields: Json, *, logprobs: int | None, max_tokens: int | None) -> Sampling:
    return Sampling(
        temperature=_number(fields, "temperature", 1.0, low=0.0, high=2.0),
        top_p=_number(fields, "top_p", 1.0, low=0.0, high=1.0),
        seed=_integer(fields, "seed", -(2**63), 2**63 - 1),
        max_tokens=max_tokens,
        stop=_stops(fields.get("stop")),
        logprobs=logprobs,
        presence_penalty=_number(fields, "presence_penalty", 0.0, low=-2.0, high=2.0),
        frequency_penalty=_number(fields, "frequency_penalty", 0.0, low=-2.0, high=2.0),
    )


def _chat_limit(fields: Json) -> int | None:
    new = _integer(fields, "max_completion_tokens", 1, None)
    old = _integer(fields, "max_tokens", 1, None)
    if new is not None and old is not None and new != old:
        raise bad_request("max_tokens and max_completion_tokens disagree.", "max_tokens")
    return new if new is not None else old


def _include_usage(fields: Json, *, stream: bool) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise bad_request("stream_options needs stream: true.", "stream_options")
    if not isinstance(options, dict):
        raise bad_request("stream_options must be an object.", "stream_options")
    return _flag(options, "include_usage")


def _stops(value: object) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise bad_request(f"stop must be a string or a list of at most {MAX_STOPS}.", "stop")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARS:
            raise bad_request(
                f"Each stop must be a string of 1 to {MAX_STOP_CHARS} characters.", "stop"
            )
    return tuple(stops)


def _messages(value: object) -> tuple[Json, ...]:
    if not isinstance(value, list) or not value:
        raise bad_request("messages must be a list with at least one message.", "messages")
    return tuple(_message(message, index) for index, message in enumerate(value))


def _message(message: object, index: int) -> Json:
    where = f"messages[{index}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise bad_request(f"{where} must be an object with a role.", where)
    if message["role"] not in {"system", "developer", "user", "assistant"}:
        raise bad_request(
            f"{where}.role must be system, developer, user or assistant.", f"{where}.role"
        )
    if message.get("tool_calls") or message.get("function_call"):
        raise bad_request(
            f"{where} calls a tool; tools are not supported here.",
            where,
            code="unsupported_parameter",
        )
    # Templates know no developer role; it is the newer name of the system role.
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, "content": _content(message.get("content"), f"{where}.content")}


def _content(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise bad_request(f"{where} must be text or a list of text parts.", where)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str) or part.get("type") != "text":
            raise bad_request(
                f"{where} may only hold parts of type text.", where, code="unsupported_parameter"
            )
        texts.append(text)
    return "".join(texts)


def _prompts(value: object) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if _is_token_list(value):
            return (tuple(value),)
        if len(value) > MAX_PROMPTS:
            raise bad_request(f"prompt may hold at most {MAX_PROMPTS} prompts.", "prompt")
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(isinstance(item, list) and item and _is_token_list(item) for item in value):
            return tuple(tuple(item) for item in value)
    raise bad_request(
        "prompt must be a string, a list of strings, a list of token ids or a list of such lists.",
        "prompt",
    )


def _is_token_list(value: list[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


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
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


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
