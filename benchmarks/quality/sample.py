"""Calibration text that a fine-tune writes itself: no data needed, only its chat template.

python -m benchmarks.quality.sample --tuned TUNED_DIR --out self.jsonl --n 512
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.quality.decode import StaticDecoder
from benchmarks.quality.drawing import SEED
from benchmarks.quality.models import load_causal_model, serving_dtype
from benchmarks.quality.tasks import write_items
from deltacome_core.models import load_tokenizer
from deltacome_core.texts import TextItem

Start = Literal["chat", "bos"]
MARK = "QUESTION"
N_SAMPLES = 512
SAMPLE_TOKENS = 256
MAX_USER_TOKENS = 96
"""A user turn still going on by then is ended, so that there is room for an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFrame:
    """Tokens before the user's words; the one that ends them; those up to the answer."""

    opening: tuple[int, ...]
    turn_end: int
    turn_tail: tuple[int, ...]


def read_frame(tokenizer: Any) -> ChatFrame:
    turn = [{"role": "user", "content": MARK}]
    frame = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    before, _, after = frame.partition(MARK)
    tail = tokenizer.encode(after, add_special_tokens=False)
    opening = tokenizer.encode(before, add_special_tokens=False)
    return ChatFrame(opening=tuple(opening), turn_end=tail[0], turn_tail=tuple(tail[1:]))


class TurnSampler:
    """Draws a user turn, then the template's own tokens, then an answer, row by row.

    A row's stage is -1 in the user turn, then the place in the tail, then that of the answer.
    """

    def __init__(
        self, frame: ChatFrame, *, rows: int, temperature: float, generator: torch.Generator
    ) -> None:
        self._frame, self._temperature, self._generator = frame, temperature, generator
        device = generator.device
        self._tail = torch.tensor([*frame.turn_tail, frame.turn_end], device=device)
        self._n_tail = len(frame.turn_tail)
        self._stage = torch.full((rows,), -1, device=device)

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        tokens = draw_tokens(logits, self._temperature, self._generator)
        is_user = self._stage < 0
        if step >= MAX_USER_TOKENS:
            tokens = tokens.masked_fill(is_user, self._frame.turn_end)
        is_tail = ~is_user & (self._stage < self._n_tail)
        forced = self._tail[self._stage.clamp(0, self._n_tail)]
        tokens = torch.where(is_tail, forced, tokens)
        ends = is_user & (tokens == self._frame.turn_end)
        self._stage = self._stage + (ends | is_tail).long()
        return tokens


def draw_tokens(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    shares = (logits.float() / temperature).softmax(dim=-1)
    return torch.multinomial(shares, 1, generator=generator)[:, 0]


def split_turns(tokens: list[int], frame: ChatFrame, end_token: int) -> tuple[list[int], list[int]]:
    """Cut a sampled row into the rest of the prompt and the answer without its end."""
    end_of_user = tokens.index(frame.turn_end)
    start = end_of_user + 1 + len(frame.turn_tail)
    answer = tokens[start:]
    if end_token in answer:
        answer = answer[: answer.index(end_token)]
    return tokens[:start], answer


@torch.no_grad()
def sample_tokens(
    model: Any, prompt: list[int], *, n: int, length: int, choose: Any, rows_at_once: int = 128
) -> list[list[int]]:
    """Draw n continuations of one prompt, `length` tokens each."""
    rows = min(n, rows_at_once)
    decoder = StaticDecoder(model, rows=rows, width=len(prompt), new_tokens=length)
    drawn: list[list[int]] = []
    while len(drawn) < n:
        drawn += decoder.decode([prompt] * rows, choose=choose(rows)).tolist()
    return drawn[:n]


def sample_texts(
    model: Any,
    tokenizer: Any,
    *,
    n: int = N_SAMPLES,
    length: int = SAMPLE_TOKENS,
    start: Start = "chat",
    temperature: float = 1.0,
    seed: int = SEED,
) -> list[TextItem]:
    """Let a model write its own calibration text.

    Args:
        model: the fine-tune.
        tokenizer: its tokenizer.
        n: texts.
        length: tokens sampled for each, the template's own not counted.
        start: "chat" draws a user's turn and an answer; "bos" continues the first token alone.
        temperature: of the draws.
        seed: the same on one kind of device gives the same texts.

    Returns:
        Prompt and answer each for "chat"; only answers for "bos".
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    if start == "bos":
        first = tokenizer.bos_token_id

        def plainly(_rows: int) -> Any:
            return lambda logits, _step: draw_tokens(logits, temperature, generator)

        drawn = sample_tokens(model, [first], n=n, length=length, choose=plainly)
        return [TextItem(answer=tokenizer.decode([first, *tokens])) for tokens in drawn]

    frame = read_frame(tokenizer)

    def in_turns(rows: int) -> TurnSampler:
        return TurnSampler(frame, rows=rows, temperature=temperature, generator=generator)

    if length <= MAX_USER_TOKENS + len(frame.turn_tail):
        raise ValueError(f"{length} tokens leave no room for an answer")
    drawn = sample_tokens(model, list(frame.opening), n=n, length=length, choose=in_turns)
    items = []
    for tokens in drawn:
        prompt, answer = split_turns(tokens, frame, tokenizer.eos_token_id)
        items.append(
            TextItem(
                prompt=tokenizer.decode([*frame.opening, *prompt]),
                answer=tokenizer.decode(answer),
            )
        )
    return items


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tuned", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=N_SAMPLES)
    parser.add_argument("--length", type=int, default=SAMPLE_TOKENS)
    parser.add_argument("--start", choices=("chat", "bos"), default="chat")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    model = load_causal_model(args.tuned, dtype=serving_dtype(args.device), device=args.device)
    items = sample_texts(
        model,
        load_tokenizer(args.tuned),
        n=args.n,
        length=args.length,
        start=args.start,
        temperature=args.temperature,
        seed=args.seed,
    )
    write_items(args.out, items)


if __name__ == "__main__":
    main()
