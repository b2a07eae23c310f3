"""Greedy decoding of many prompts at once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


@torch.no_grad()
def decode_greedily(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: frozenset[int] = frozenset(),
    batch_size: int = 16,
    is_finished: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continue each prompt with the most likely token, again and again.

    Prompts are padded on the left and masked, with positions that count real tokens only, so a
    prompt's answer does not depend on its neighbours beyond floating-point rounding.

    Args:
        model: a transformers causal language model.
        prompts: token ids, at least one each.
        max_new_tokens: length of the longest answer.
        stop_tokens: tokens that end an answer; they are not part of it.
        batch_size: prompts decoded side by side; neighbours have similar lengths.
        is_finished: told an answer so far; True ends it.

    Returns:
        The new token ids of each prompt, in the order of the prompts.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        decoded = _decode_batch(
            model,
            [prompts[i] for i in chosen],
            max_new_tokens=max_new_tokens,
            stop_tokens=stop_tokens,
            is_finished=is_finished,
        )
        for i, answer in zip(chosen, decoded, strict=True):
            answers[i] = answer
    return answers


def _decode_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    is_finished: Callable[[list[int]], bool] | None,
) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros((len(prompts), width), dtype=torch.int64)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    answers: list[list[int]] = [[] for _ in prompts]
    active = [True] * len(prompts)
    cache = None
    for _ in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        tokens = output.logits[:, -1].float().argmax(dim=-1)
        for row, token in enumerate(tokens.tolist()):
            active[row] = active[row] and token not in stop_tokens
            if active[row]:
                answers[row].append(token)
                active[row] = is_finished is None or not is_finished(answers[row])
        if not any(active):
            break
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], dim=1)
        positions = positions[:, -1:] + 1
    return answers


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Collect the tokens that end an answer, from the tokenizer and the generation config.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer.

    Returns:
        Token ids, possibly none.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*listed, tokenizer.eos_token_id] if isinstance(token, int))
