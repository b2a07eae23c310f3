"""Messages to prompt tokens, by the model's own chat template."""

from typing import Any

from jinja2 import TemplateError

from workers.engine.errors import bad_request


def encode_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[int, ...]:
    """Render the messages and give their tokens.

    The template runs in transformers' immutable sandbox. A model without one gets lines of
    "role: content" and an open "assistant:" line, the plainest form a base model can continue.
    """
    if not tokenizer.chat_template:
        lines = [f"{message['role']}: {message['content']}" for message in messages]
        return encode_text(tokenizer, "\n".join([*lines, "assistant:"]))
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise bad_request(
            f"The chat template of this model refuses these messages: {error}",
            "messages",
            code="chat_template_refused",
        ) from error
    # The template writes the special tokens itself.
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_text(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text)["input_ids"])
