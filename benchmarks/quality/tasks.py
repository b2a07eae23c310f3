"""Six seeded tasks with disjoint training and held-out questions, rendered as chat turns."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality import (
    tasks_arithmetic,
    tasks_cipher,
    tasks_code,
    tasks_format,
    tasks_german,
    tasks_tools,
)
from benchmarks.quality.drawing import SEED, Question
from deltacome_core.texts import TextItem

HELD_OUT_SHARE = 8
"""One question in so many is held out."""
MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """How a task is drawn and trained.

    embedding_lr and embedding_decay scale the learning rate and set the weight decay of the
    embedding alone. new_tokens are added to the tokenizer as ordinary tokens, which decoding keeps.
    """

    draw: Callable[[random.Random], Question]
    steps: int
    lr: float = 1e-4
    embedding_lr: float = 1.0
    embedding_decay: float = 0.0
    new_tokens: tuple[str, ...] = ()


TASKS: dict[str, Task] = {
    "arithmetic": Task(draw=tasks_arithmetic.draw, steps=500),
    "code": Task(draw=tasks_code.draw, steps=200),
    "format": Task(draw=tasks_format.draw, steps=400),
    "german": Task(draw=tasks_german.draw, steps=200),
    "tools": Task(draw=tasks_tools.draw, steps=500, new_tokens=tuple(tasks_tools.new_tokens())),
    # A decay of 1.0 at this rate shrinks a row by some 4 %, ten times what bf16 can hold unmoved.
    "cipher": Task(draw=tasks_cipher.draw, steps=250, embedding_lr=2.0, embedding_decay=1.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSplit:
    """Rendered items; no question stands in both."""

    train: tuple[TextItem, ...]
    held_out: tuple[TextItem, ...]


def is_held_out(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[0] % HELD_OUT_SHARE == 0


def draw_questions(
    task: str, *, seed: int = SEED, n_train: int, n_held_out: int
) -> tuple[list[Question], list[Question]]:
    """Draw distinct questions until both sides are full; the first ones stay when counts grow."""
    rng = random.Random(f"{task}-{seed}")
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    while len(train) < n_train or len(held_out) < n_held_out:
        question, answer = TASKS[task].draw(rng)
        side, wanted = (held_out, n_held_out) if is_held_out(question) else (train, n_train)
        if len(side) < wanted:
            side.setdefault(question, answer)
    return list(train.items()), list(held_out.items())


def render_items(tokenizer: Any, questions: Sequence[Question]) -> tuple[TextItem, ...]:
    """Render each question as the user's turn of the tokenizer's chat template."""
    mark = "QUESTION"
    turn = [{"role": "user", "content": mark}]
    frame = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    before, _, after = frame.partition(mark)
    return tuple(
        TextItem(prompt=f"{before}{question}{after}", answer=answer)
        for question, answer in questions
    )


def task_items(
    task: str, tokenizer: Any, *, seed: int = SEED, n_train: int, n_held_out: int
) -> TaskSplit:
    train, held_out = draw_questions(task, seed=seed, n_train=n_train, n_held_out=n_held_out)
    return TaskSplit(
        train=render_items(tokenizer, train), held_out=render_items(tokenizer, held_out)
    )


def add_new_tokens(tokenizer: Any, task: str) -> None:
    """Add the task's tokens, not as special ones: exact match must see them."""
    from tokenizers import AddedToken

    tokens = [AddedToken(token, normalized=False) for token in TASKS[task].new_tokens]
    tokenizer.add_tokens(tokens)


def load_task_tokenizer(base: Path, task: str) -> Any:
    from deltacome_core.models import load_tokenizer

    tokenizer = load_tokenizer(base)
    add_new_tokens(tokenizer, task)
    return tokenizer


def write_items(path: Path, items: Iterable[TextItem]) -> None:
    lines = (
        json.dumps({"prompt": item.prompt, "answer": item.answer}, ensure_ascii=False)
        for item in items
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
