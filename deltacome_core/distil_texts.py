"""Texts as rows of tokens for distillation: answers, prompts and general text apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltacome_core.texts import read_texts, render_text

ANSWERS, PROMPTS, GENERAL = PARTS = ("answers", "prompts", "general")
# Text without a prompt is cut so; a prompt and its answer stay together up to MAX_ROW_TOKENS.
ROW_TOKENS = 128
MAX_ROW_TOKENS = 512
_PAD_TO = 8
_JUDGE_EVERY = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Some tokens; those before first_answer are a prompt."""

    tokens: tuple[int, ...]
    first_answer: int = 0
    is_general: bool = False

    def places(self, part: str) -> range:
        """Say which states predict a token of a part; that of the last token predicts none."""
        last = len(self.tokens) - 1
        if self.is_general:
            return range(last if part == GENERAL else 0)
        first = min(max(self.first_answer - 1, 0), last)
        return {ANSWERS: range(first, last), PROMPTS: range(first)}.get(part, range(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows padded on the right, which a causal model needs no mask for.

    ids int64 [rows, width]; places int64 [n] by part, flat places in it; targets int64 [n] by part,
    where the same tokens lie when all rows follow each other without padding.
    """

    ids: torch.Tensor
    places: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]


def read_rows(
    path: Path, tokenizer: Any, *, max_tokens: int, longest: int, is_general: bool = False
) -> list[Row]:
    """Read a text file as rows of tokens.

    Args:
        path: .txt or .jsonl file.
        tokenizer: of the fine-tune.
        max_tokens: about how many to read; what comes later in the file is left out.
        longest: tokens that the model takes.
        is_general: what the rows will say of themselves.

    Returns:
        Rows; a prompt and its answer are cut at MAX_ROW_TOKENS, other text into pieces of
        ROW_TOKENS.

    Raises:
        UserError: texts_invalid.
    """
    rows: list[Row] = []
    left = max_tokens
    for item in read_texts(path):
        text = render_text(item, tokenizer)
        special = not text.has_special_tokens
        prompt = tokenizer.encode(text.prompt, add_special_tokens=special, verbose=False)
        answer = tokenizer.encode(text.answer, add_special_tokens=False, verbose=False)
        if text.prompt:
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            pieces = [(prompt + answer + end)[: min(MAX_ROW_TOKENS, longest)]]
        else:
            size = min(ROW_TOKENS, longest)
            answer = answer[:left]
            pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
        for tokens in pieces:
            if len(tokens) > 1:
                first = len(prompt) if text.prompt else 0
                rows.append(Row(tokens=tuple(tokens), first_answer=first, is_general=is_general))
                left -= len(tokens)
        if left <= 0:
            break
    return rows


def split_judge(rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """Hold every tenth out; of fewer than ten the last, a lone one is used for both.

    Args:
        rows: any numbers.

    Returns:
        Those to train on, and those to judge by.
    """
    rest = min(_JUDGE_EVERY, len(rows)) - 1
    judge = [row for at, row in enumerate(rows) if at % _JUDGE_EVERY == rest]
    train = [row for at, row in enumerate(rows) if at % _JUDGE_EVERY != rest]
    return train or judge, judge


def make_batch(rows: Sequence[Row], starts: Sequence[int], device: torch.device) -> Batch:
    """Put rows side by side.

    Args:
        rows: at least one.
        starts: where each begins when all rows follow each other.
        device: where the batch goes.

    Returns:
        The batch; parts without places are absent.
    """
    width = -(-max(len(row.tokens) for row in rows) // _PAD_TO) * _PAD_TO
    ids = torch.zeros((len(rows), width), dtype=torch.int64)
    places: dict[str, list[int]] = {}
    targets: dict[str, list[int]] = {}
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[number, : len(row.tokens)] = torch.tensor(row.tokens)
        for part in PARTS:
            for place in row.places(part):
                places.setdefault(part, []).append(number * width + place)
                targets.setdefault(part, []).append(start + place)
    return Batch(
        ids=ids.to(device),
        places={part: torch.tensor(found) for part, found in places.items()},
        targets={part: torch.tensor(found) for part, found in targets.items()},
    )
