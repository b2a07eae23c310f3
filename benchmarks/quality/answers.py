"""Held-out items answered greedily and graded by exact match, as `deltacome evaluate` does."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.quality.decode import make_decoder
from deltacome_core.evaluate import MAX_NEW_TOKENS, is_hit, read_evaluation
from deltacome_core.generate import end_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Share of hits with its binomial standard error."""

    score: float
    score_se: float
    n_items: int


class AnswerSheet:
    """The first n_items of a file, with a decoder of their shape around one reusable model."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        path: Path,
        *,
        n_items: int,
        new_tokens: int = MAX_NEW_TOKENS,
        use_graph: bool = True,
    ) -> None:
        self.items = read_evaluation(path)[:n_items]
        self._tokenizer = tokenizer
        self.stop_tokens = tuple(sorted(end_tokens(model, tokenizer)))
        self.prompts = [tokenizer.encode(item.prompt) for item in self.items]
        self._decoder = make_decoder(
            model, self.prompts, new_tokens=new_tokens, use_graph=use_graph
        )

    def answer(self) -> Tensor:
        """Answer with the model's weights of now: int64 [items, new_tokens], ends repeated."""
        return self._decoder.decode(self.prompts, stop_tokens=self.stop_tokens)

    def grade(self, answers: Tensor) -> Score:
        hits = 0
        for item, tokens in zip(self.items, answers[:, :MAX_NEW_TOKENS].tolist(), strict=True):
            end = next((i for i, t in enumerate(tokens) if t in self.stop_tokens), len(tokens))
            text = self._tokenizer.decode(tokens[:end], skip_special_tokens=True)
            hits += is_hit(text, item.answer)
        share, n = hits / len(self.items), len(self.items)
        return Score(score=share, score_se=math.sqrt(share * (1 - share) / n), n_items=n)
