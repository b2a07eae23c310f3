"""Decoding of a fixed number of rows with one static cache, replayed as a CUDA graph.

The weights may be replaced in place between two calls; the graph reads them where they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.batches import round_up

CACHE_ALIGNMENT = 16
# The host asks this often whether every row has ended; each time it waits for the device.
STEPS_BETWEEN_LOOKS = 8
WARM_UPS = 3
Choose = Callable[[Tensor, int], Tensor]
"""Told logits [rows, vocabulary] and the step: the next token of each row, int64 [rows]."""


def choose_likeliest(logits: Tensor, _step: int) -> Tensor:
    return logits.float().argmax(dim=-1)


class SlotCache:
    """Keys and values of every layer in buffers of one size, written at given slots.

    It has the one method that the attention of transformers calls.
    """

    is_compileable = False

    def __init__(self, model: Any, *, rows: int, length: int) -> None:
        config = model.config
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        shape = (rows, config.num_key_value_heads, length, head_dim)
        options = {"dtype": model.dtype, "device": model.device}
        layers = range(config.num_hidden_layers)
        self._keys = [torch.zeros(shape, **options) for _ in layers]
        self._values = [torch.zeros(shape, **options) for _ in layers]
        self.slots = torch.zeros(1, dtype=torch.int64, device=model.device)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_rest: Any, **_options: Any
    ) -> tuple[Tensor, Tensor]:
        self._keys[layer_idx].index_copy_(2, self.slots, keys)
        self._values[layer_idx].index_copy_(2, self.slots, values)
        return self._keys[layer_idx], self._values[layer_idx]

    def get_seq_length(self, _layer_idx: int = 0) -> int:
        return 0


class StaticDecoder:
    """Continues `rows` prompts of at most `width` tokens by at most `new_tokens` tokens."""

    def __init__(
        self, model: Any, *, rows: int, width: int, new_tokens: int, use_graph: bool = True
    ) -> None:
        self._model, self._rows, self._width, self._new_tokens = model, rows, width, new_tokens
        device = model.device
        self._length = round_up(width + new_tokens, CACHE_ALIGNMENT)
        self._cache = SlotCache(model, rows=rows, length=self._length)
        self._mask = torch.zeros((rows, 1, 1, self._length), dtype=torch.bool, device=device)
        self._tokens = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self._positions = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._graph: Any = None
        self._logits: Tensor | None = None
        if use_graph and device.type == "cuda":
            self._capture()

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _step(self) -> Tensor:
        self._cache.slots = self._slot
        self._mask.index_fill_(3, self._slot, value=True)
        logits = self._forward(self._tokens, self._mask, self._positions)
        self._positions += 1
        self._slot += 1
        return logits

    @torch.no_grad()
    def _capture(self) -> None:
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._slot.fill_(self._width)
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._slot.fill_(self._width)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._step()

    def _next_logits(self) -> Tensor:
        if self._graph is None or self._logits is None:
            return self._step()
        self._graph.replay()
        return self._logits

    def _read_prompts(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Pad on the left, run the prompts through the model, return logits of the last tokens."""
        ids = torch.zeros((self._rows, self._width), dtype=torch.int64)
        real = torch.zeros((self._rows, self._width), dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, self._width - len(prompt) :] = torch.tensor(list(prompt))
            real[row, self._width - len(prompt) :] = True
        device = self._model.device
        ids, real = ids.to(device), real.to(device)
        positions = (real.cumsum(dim=1) - 1).clamp_min(0)
        self._mask.zero_()
        self._mask[:, 0, 0, : self._width] = real
        slots = torch.arange(self._length, device=device)
        is_past = slots[None, :] <= slots[: self._width, None]
        # A pad sees itself: a softmax over nothing would leave NaN in the cache.
        is_self = slots[None, :] == slots[: self._width, None]
        mask = (self._mask & is_past) | is_self
        self._cache.slots = slots[: self._width]
        logits = self._forward(ids, mask, positions)
        self._positions.copy_(positions[:, -1:] + 1)
        self._slot.fill_(self._width)
        return logits

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        stop_tokens: Sequence[int] = (),
        choose: Choose = choose_likeliest,
    ) -> Tensor:
        """Continue the prompts, one for each row.

        Args:
            prompts: token ids, 1 to `width` each.
            stop_tokens: a row that meets one has ended and repeats the first of them.
            choose: picks the next tokens.

        Returns:
            int64 [rows, new_tokens] on the CPU.
        """
        if len(prompts) != self._rows or not all(1 <= len(p) <= self._width for p in prompts):
            raise ValueError(f"need {self._rows} prompts of 1 to {self._width} tokens")
        device = self._model.device
        stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
        filler = stop_tokens[0] if stop_tokens else 0
        new = torch.full((self._rows, self._new_tokens), filler, device=device)
        ended = torch.zeros(self._rows, dtype=torch.bool, device=device)
        logits = self._read_prompts(prompts)
        for step in range(self._new_tokens):
            tokens = choose(logits, step).masked_fill(ended, filler)
            new[:, step] = tokens
            ended |= torch.isin(tokens, stops)
            is_look = step % STEPS_BETWEEN_LOOKS == STEPS_BETWEEN_LOOKS - 1
            if step == self._new_tokens - 1 or (is_look and stop_tokens and bool(ended.all())):
                break
            self._tokens.copy_(tokens[:, None])
            logits = self._next_logits()
        return new.cpu()


def make_decoder(
    model: Any, prompts: Sequence[Sequence[int]], *, new_tokens: int, use_graph: bool = True
) -> StaticDecoder:
    """Build a decoder that fits these prompts."""
    width = max(len(prompt) for prompt in prompts)
    return StaticDecoder(
        model, rows=len(prompts), width=width, new_tokens=new_tokens, use_graph=use_graph
    )
