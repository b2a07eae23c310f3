"""Requests of the OpenAI API and of its usual companions: what is understood, what is refused."""

from dataclasses import dataclass

from workers.engine.errors import bad_request
from workers.engine.fields import (
    Json,
    check_fields,
    is_token_list,
    read_flag,
    read_integer,
    read_name,
    read_number,
    read_object,
)
from workers.engine.generate import Sampling

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_PROMPTS = 64
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20

# `return_token_ids` is vLLM's: each choice then carries the ids of its tokens.
_SAMPLING = frozenset(
    {
        *("model", "n", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs"),
        *("presence_penalty", "frequency_penalty", "stream", "stream_options"),
        "return_token_ids",
    }
)
_CHAT = _SAMPLING | {"messages", "max_completion_tokens", "top_logprobs"}
_COMPLETION = _SAMPLING | {"prompt", "echo", "best_of"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How the answer is sent."""

    stream: bool
    include_usage: bool
    token_ids: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    model: str
    messages: tuple[Json, ...]
    sampling: Sampling
    delivery: Delivery


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    sampling: Sampling
    delivery: Delivery
    echo: bool

    @property
    def scores_prompt(self) -> bool:
        return self.echo and self.sampling.logprobs is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeRequest:
    """Either a prompt or messages; the other one is None."""

    prompt: str | None
    messages: tuple[Json, ...] | None
    special_tokens: bool
    token_texts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareRequest:
    """A text along which two models are compared; one of `prompt` and `messages` is None."""

    model: str
    reference: str
    prompt: str | tuple[int, ...] | None
    messages: tuple[Json, ...] | None
    completion: str | tuple[int, ...]


def parse_chat(body: object) -> ChatRequest:
    fields = read_object(body)
    check_fields(fields, _CHAT)
    wants_logprobs = read_flag(fields, "logprobs")
    top = read_integer(fields, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top is not None and not wants_logprobs:
        raise bad_request("top_logprobs needs logprobs: true.", "top_logprobs")
    return ChatRequest(
        model=read_name(fields, "model"),
        messages=_messages(fields.get("messages")),
        sampling=_sampling(
            fields, logprobs=(top or 0) if wants_logprobs else None, max_tokens=_chat_limit(fields)
        ),
        delivery=_delivery(fields),
    )


def parse_completion(body: object) -> CompletionRequest:
    fields = read_object(body)
    check_fields(fields, _COMPLETION)
    echo = read_flag(fields, "echo")
    limit = read_integer(fields, "max_tokens", 0 if echo else 1, None)
    sampling = _sampling(
        fields,
        logprobs=read_integer(fields, "logprobs", 0, MAX_TOP_LOGPROBS),
        max_tokens=16 if limit is None else limit,
    )
    best_of = read_integer(fields, "best_of", 1, None)
    if best_of is not None and best_of != sampling.n:
        raise bad_request("best_of must be equal to n.", "best_of", code="unsupported_parameter")
    prompts = _prompts(fields.get("prompt"))
    if len(prompts) * sampling.n > MAX_PROMPTS:
        raise bad_request(f"A request may ask for at most {MAX_PROMPTS} answers.", "n")
    return CompletionRequest(
        model=read_name(fields, "model"),
        prompts=prompts,
        sampling=sampling,
        delivery=_delivery(fields),
        echo=echo,
    )


def parse_tokenize(body: object) -> TokenizeRequest:
    fields = read_object(body)
    understood = {"model", "prompt", "messages", "add_special_tokens", "return_token_strs"}
    check_fields(fields, understood)
    prompt, messages = _text_or_messages(fields)
    if prompt is not None and not isinstance(prompt, str):
        raise bad_request("prompt must be a string.", "prompt")
    return TokenizeRequest(
        prompt=prompt,
        messages=messages,
        special_tokens=read_flag(fields, "add_special_tokens", default=True),
        token_texts=read_flag(fields, "return_token_strs"),
    )


def parse_detokenize(body: object) -> tuple[int, ...]:
    fields = read_object(body)
    check_fields(fields, {"model", "tokens"})
    return _token_ids(fields, "tokens")


def parse_compare(body: object) -> CompareRequest:
    fields = read_object(body)
    check_fields(fields, {"model", "reference", "prompt", "messages", "completion"})
    prompt, messages = _text_or_messages(fields)
    completion = fields.get("completion")
    return CompareRequest(
        model=read_name(fields, "model"),
        reference=read_name(fields, "reference"),
        prompt=prompt
        if prompt is None or isinstance(prompt, str)
        else _token_ids(fields, "prompt"),
        messages=messages,
        completion=completion if isinstance(completion, str) else _token_ids(fields, "completion"),
    )


def _text_or_messages(fields: Json) -> tuple[object, tuple[Json, ...] | None]:
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if (prompt is None) == (messages is None):
        raise bad_request("Give either prompt or messages.", "prompt")
    return prompt, None if messages is None else _messages(messages)


def _token_ids(fields: Json, name: str) -> tuple[int, ...]:
    value = fields.get(name)
    if not isinstance(value, list) or not is_token_list(value):
        raise bad_request(f"{name} must be a list of token ids.", name)
    return tuple(value)


def _sampling(fields: Json, *, logprobs: int | None, max_tokens: int | None) -> Sampling:
    return Sampling(
        n=read_integer(fields, "n", 1, MAX_CHOICES) or 1,
        temperature=read_number(fields, "temperature", 1.0, low=0.0, high=2.0),
        top_p=read_number(fields, "top_p", 1.0, low=0.0, high=1.0),
        seed=read_integer(fields, "seed", -(2**63), 2**63 - 1),
        max_tokens=max_tokens,
        stop=_stops(fields.get("stop")),
        logprobs=logprobs,
        presence_penalty=read_number(fields, "presence_penalty", 0.0, low=-2.0, high=2.0),
        frequency_penalty=read_number(fields, "frequency_penalty", 0.0, low=-2.0, high=2.0),
    )


def _chat_limit(fields: Json) -> int | None:
    new = read_integer(fields, "max_completion_tokens", 1, None)
    old = read_integer(fields, "max_tokens", 1, None)
    if new is not None and old is not None and new != old:
        raise bad_request("max_tokens and max_completion_tokens disagree.", "max_tokens")
    return new if new is not None else old


def _delivery(fields: Json) -> Delivery:
    stream = read_flag(fields, "stream")
    options = fields.get("stream_options")
    if options is not None:
        if not stream:
            raise bad_request("stream_options needs stream: true.", "stream_options")
        if not isinstance(options, dict):
            raise bad_request("stream_options must be an object.", "stream_options")
        # Padding against eavesdroppers changes no content.
        check_fields(options, {"include_usage", "include_obfuscation"})
    return Delivery(
        stream=stream,
        include_usage=read_flag(options or {}, "include_usage"),
        token_ids=read_flag(fields, "return_token_ids"),
    )


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
        if is_token_list(value):
            return (tuple(value),)
        if len(value) > MAX_PROMPTS:
            raise bad_request(f"prompt may hold at most {MAX_PROMPTS} prompts.", "prompt")
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(item and is_token_list(item) for item in value):
            return tuple(tuple(item) for item in value)
    raise bad_request(
        "prompt must be a string, a list of strings, a list of token ids or a list of such lists.",
        "prompt",
    )
