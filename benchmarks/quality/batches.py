"""Items as padded rows: batches for training, and all answers at once for scoring."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltacome_core.texts import TextItem, render_text

PAD_TO = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedItem:
    """Prompt, answer and end of turn; tokens from first_answer on are learned."""

    tokens: tuple[int, ...]
    first_answer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows padded on the right, which a causal model needs no mask for.

    ids int64 [rows, width]; places int64 [n], flat places of the hidden states that predict the
    answers; targets int64 [n].
    """

    ids: Tensor
    places: Tensor
    targets: Tensor

    def to(self, device: str) -> "Batch":
        moved = [
            (part.pin_memory() if device != "cpu" else part).to(device, non_blocking=True)
            for part in (self.ids, self.places, self.targets)
        ]
        return Batch(ids=moved[0], places=moved[1], targets=moved[2])


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def encode_items(
    tokenizer: Any, items: Sequence[TextItem], *, longest: int = 256
) -> list[EncodedItem]:
    """Tokenise prompt and answer apart, so that the prompt is the same with and without answer."""
    texts = [render_text(item, tokenizer) for item in items]
    prompts = tokenizer([text.prompt for text in texts], verbose=False)["input_ids"]
    answers = tokenizer([text.answer for text in texts], add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    encoded = []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = (*prompt, *answer, tokenizer.eos_token_id)
        if len(tokens) > longest:
            raise ValueError(f"an item has {len(tokens)} tokens, more than {longest}")
        encoded.append(EncodedItem(tokens=tokens, first_answer=len(prompt)))
    return encoded


def collate(rows: Sequence[EncodedItem], *, pad_token: int) -> Batch:
    width = round_up(max(len(row.tokens) for row in rows), PAD_TO)
    ids = torch.full((len(rows), width), pad_token)
    places, targets = [], []
    for number, row in enumerate(rows):
        ids[number, : len(row.tokens)] = torch.tensor(row.tokens)
        places.append(torch.arange(row.first_answer - 1, len(row.tokens) - 1) + number * width)
        targets.append(torch.tensor(row.tokens[row.first_answer :]))
    return Batch(ids=ids, places=torch.cat(places), targets=torch.cat(targets))


def draw_batches(
    rows: Sequence[EncodedItem], *, steps: int, size: int, seed: int, pad_token: int, device: str
) -> Iterator[Batch]:
    """Go through shuffled rows again and again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(len(rows), generator=generator).tolist()
        chosen, order = order[:size], order[size:]
        yield collate([rows[i] for i in chosen], pad_token=pad_token).to(device)
