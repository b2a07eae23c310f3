"""Compare two models on texts: next-token distributions and greedy answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from deltacome_core.batches import cut_batches
from deltacome_core.generate import decode_greedily, end_tokens
from deltacome_core.models import running_on_text
from deltacome_core.texts import read_texts, refuse_text, render_text

MAX_PROMPTS_PER_FILE = 128
MAX_TOKENS_PER_PROMPT = 512
GREEDY_PROMPTS = 32
GREEDY_TOKENS = 32
# Of both models a row of the vocabulary is in memory for each of them.
BATCH_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How one model predicts beside the reference; means over the scored tokens."""

    kl: float
    kl_p99: float
    top1: float
    ppl_ratio: float
    n_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredText:
    """Tokens of prompt and answer; predictions of tokens from `first_scored` on are compared.

    opening is what a greedy answer is asked for.
    """

    tokens: list[int]
    first_scored: int
    opening: list[int]


def read_scored_texts(
    paths: Sequence[Path], tokenizer: Any, *, max_tokens: int = MAX_TOKENS_PER_PROMPT
) -> list[ScoredText]:
    """Read verification texts.

    Where there is a prompt only the answer is scored: a fine-tune is trained on answers, and what
    it would say in the middle of a prompt is nobody's business.

    Args:
        paths: .jsonl or .txt files; at most MAX_PROMPTS_PER_FILE items each, evenly spread.
        tokenizer: of the fine-tune.
        max_tokens: of longer texts only the end is kept, where the answer is.

    Returns:
        Texts with something to score.

    Raises:
        UserError: texts_invalid.
    """
    texts = []
    for path in paths:
        items = read_texts(path)
        step = -(-len(items) // MAX_PROMPTS_PER_FILE)
        for item in items[::step]:
            text = render_text(item, tokenizer)
            special = not text.has_special_tokens
            opening = tokenizer.encode(text.prompt, add_special_tokens=special)
            tokens = tokenizer.encode(text.prompt + text.answer, add_special_tokens=special)
            first_scored = len(opening) if text.prompt else 1
            if not text.prompt:
                opening = tokens[: max(1, len(tokens) // 2)]
            cut = max(0, len(tokens) - max_tokens)
            first_scored = max(1, first_scored - cut)
            if first_scored < len(tokens) - cut:
                texts.append(
                    ScoredText(
                        tokens=tokens[cut:],
                        first_scored=first_scored,
                        opening=opening[-max_tokens:],
                    )
                )
    if not texts:
        reason = "no text has an answer to score"
        raise refuse_text(paths[0].name, reason)
    return texts


@torch.no_grad()
def compare_models(reference: Any, other: Any, texts: Sequence[ScoredText]) -> Comparison:
    """Compare next-token distributions on texts.

    A vocabulary that grew is compared on the tokens both models know.

    Args:
        reference: transformers model whose distribution is the truth.
        other: transformers model to compare.
        texts: what to predict.

    Returns:
        KL(reference || other), agreement of the most likely token, ratio of perplexities.
    """
    divergences, agreements = [], []
    surprise = 0.0
    known = min(model.config.get_text_config().vocab_size for model in (reference, other))
    # Texts of like lengths side by side.
    order = sorted(range(len(texts)), key=lambda at: len(texts[at].tokens))
    for chosen in cut_batches(texts, order, max_rows=len(texts), max_tokens=BATCH_TOKENS):
        batch = [texts[at] for at in chosen]
        ids = _pad([text.tokens for text in batch]).to(reference.device)
        known_ids = ids.clamp_max(known - 1)
        both = _read_logits(reference, ids), _read_logits(other, known_ids)
        for row, text in enumerate(batch):
            scored = slice(text.first_scored - 1, len(text.tokens) - 1)
            truth, guess = (
                torch.log_softmax(logits[row, scored, :known].double(), dim=-1) for logits in both
            )
            divergences.append((truth.exp() * (truth - guess)).sum(dim=1))
            agreements.append(truth.argmax(dim=1) == guess.argmax(dim=1))
            following = known_ids[row, text.first_scored : len(text.tokens)][:, None]
            surprise += float((truth.gather(1, following) - guess.gather(1, following)).sum())
    kl, same = torch.cat(divergences), torch.cat(agreements)
    return Comparison(
        kl=float(kl.mean().clamp_min(0.0)),
        kl_p99=float(torch.quantile(kl, 0.99)),
        top1=float(same.double().mean()),
        ppl_ratio=math.exp(surprise / kl.numel()),
        n_tokens=kl.numel(),
    )


def _pad(rows: Sequence[list[int]]) -> torch.Tensor:
    """Pad on the right, where a causal model looks at nothing that is scored."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def _read_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with running_on_text():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def compare_answers(
    reference: Any, other: Any, tokenizer: Any, openings: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """Compare greedy answers of two models.

    Args:
        reference: transformers model.
        other: transformers model.
        tokenizer: tells where an answer ends.
        openings: token ids of prompts; at most GREEDY_PROMPTS, evenly spread, are asked.

    Returns:
        Mean share of an answer before the first difference, and share of identical answers.
    """
    step = max(1, -(-len(openings) // GREEDY_PROMPTS))
    asked = [opening for opening in openings[::step] if opening]
    if not asked:
        return 1.0, 1.0
    stop = end_tokens(reference, tokenizer)
    first, second = (
        decode_greedily(model, asked, max_new_tokens=GREEDY_TOKENS, stop_tokens=stop)
        for model in (reference, other)
    )
    shares = [agreed_share(a, b) for a, b in zip(first, second, strict=True)]
    same = [a == b for a, b in zip(first, second, strict=True)]
    return sum(shares) / len(shares), sum(same) / len(same)


def agreed_share(first: Sequence[int], second: Sequence[int]) -> float:
    """Return the share of the longer answer that precedes the first difference.

    Args:
        first: token ids.
        second: token ids.

    Returns:
        0 to 1; two empty answers agree.
    """
    longest = max(len(first), len(second))
    agreed = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        agreed += 1
    return agreed / longest if longest else 1.0
