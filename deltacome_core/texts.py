"""Calibration, verification and evaluation texts: one reader for .txt and .jsonl."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deltacome_core.errors import UserError

DATA_DIR = Path(__file__).parent / "data"
DEFAULT_CALIBRATION = DATA_DIR / "calibration.txt"
DEFAULT_PROMPTS = DATA_DIR / "prompts.jsonl"


class ChatTokenizer(Protocol):
    """The one thing of a tokenizer that rendering needs."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TextItem:
    """One text; `prompt` may be empty, `messages` are set instead for a chat."""

    prompt: str = ""
    answer: str = ""
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedText:
    """The exact characters a model sees; a chat template writes its own special tokens."""

    prompt: str
    answer: str
    has_special_tokens: bool


def read_texts(path: Path) -> tuple[TextItem, ...]:
    """Read a .txt file as one text, or a .jsonl file of text, prompt + answer or messages lines.

    Args:
        path: UTF-8 file.

    Returns:
        The items in file order, at least one.

    Raises:
        UserError: texts_invalid, naming the line.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise refuse_text(str(path), error.strerror or "it cannot be opened") from error
    except UnicodeDecodeError as error:
        raise refuse_text(str(path), f"byte {error.start} is not UTF-8") from error
    if path.suffix != ".jsonl":
        items = [TextItem(answer=content)] if content.strip() else []
    else:
        items = [
            _parse_line(line, path=path, number=number)
            for number, line in enumerate(content.splitlines(), start=1)
            if line.strip()
        ]
    if not items:
        raise refuse_text(str(path), "the file is empty")
    return tuple(items)


def refuse_text(file: str, reason: str, *, line: int = 0) -> UserError:
    """texts_invalid for a file, or one of its lines.

    Args:
        file: as people are told it.
        reason: what is wrong, without a full stop.
        line: from 1; 0 is the file.

    Returns:
        The error, to be raised.
    """
    place = f"{file}, line {line}" if line else file
    return UserError("texts_invalid", file=file, line=line, place=place, reason=reason)


def _parse_line(line: str, *, path: Path, number: int) -> TextItem:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise refuse_text(str(path), f"this is not JSON: {error}", line=number) from error
    try:
        return _parse_row(row)
    except KeyError as error:
        raise refuse_text(str(path), f"{error.args[0]} is missing", line=number) from error
    except (ValueError, TypeError) as error:
        raise refuse_text(str(path), str(error), line=number) from error


def _parse_row(row: Any) -> TextItem:
    if not isinstance(row, Mapping):
        raise TypeError("a line is not a JSON object")
    if "messages" in row:
        messages = tuple((str(turn["role"]), str(turn["content"])) for turn in row["messages"])
        if not messages:
            raise ValueError("messages is empty")
        return TextItem(messages=messages)
    if "prompt" in row:
        return TextItem(prompt=str(row["prompt"]), answer=str(row.get("answer", "")))
    return TextItem(answer=str(row["text"]))


def render_text(item: TextItem, tokenizer: ChatTokenizer) -> RenderedText:
    """Render an item to the characters a model sees; a chat goes through its chat template.

    Prompt and answer are joined by one space unless either brings its own white space.

    Args:
        item: what was read.
        tokenizer: of the fine-tune.

    Returns:
        Prompt and answer; of a chat the last turn is the answer.
    """
    if not item.messages:
        bare = bool(item.prompt) and bool(item.answer)
        joined = not bare or item.prompt[-1].isspace() or item.answer[0].isspace()
        answer = item.answer if joined else f" {item.answer}"
        return RenderedText(prompt=item.prompt, answer=answer, has_special_tokens=False)
    if not tokenizer.chat_template:
        *earlier, last = [f"{role}: {content}\n" for role, content in item.messages]
        return RenderedText(prompt="".join(earlier), answer=last, has_special_tokens=False)
    turns = [{"role": role, "content": content} for role, content in item.messages]
    whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    prompt = ""
    if len(turns) > 1:
        prompt = str(
            tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        )
    if not whole.startswith(prompt):
        prompt = ""
    return RenderedText(prompt=prompt, answer=whole[len(prompt) :], has_special_tokens=True)
