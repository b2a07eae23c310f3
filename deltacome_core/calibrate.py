"""Second moments of the inputs of every linear layer, one decoder layer at a time."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.errors import UserError
from deltacome_core.manifest import CalibrationRecord
from deltacome_core.models import (
    build_skeleton,
    compute_dtype,
    empty_module,
    fill_module,
    fill_parameter,
    find_decoder_layers,
    load_model,
    match_checkpoint_names,
    read_parameter,
)
from deltacome_core.texts import read_texts, render_text

# 128 sequences of 2048 tokens, as published (thunlp/Delta-CoMe, run.sh).
MAX_SEQUENCES = 128
SEQUENCE_TOKENS = 2048
# Below this a Hessian of a few hundred columns is mostly damping.
MIN_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationTokens:
    """Token sequences int64 [n, length], n >= 2, and the text they come from."""

    source: str
    sha256: str
    sequences: torch.Tensor

    @property
    def n_tokens(self) -> int:
        return self.sequences.numel()

    @property
    def digest(self) -> str:
        """sha256 of the token ids: another tokenizer or length gives another one."""
        shape = repr(tuple(self.sequences.shape)).encode()
        return hashlib.sha256(shape + self.sequences.numpy().tobytes()).hexdigest()

    @property
    def record(self) -> CalibrationRecord:
        return CalibrationRecord(source=self.source, n_tokens=self.n_tokens, sha256=self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedHessian:
    """Mean of x x^T over all tokens, float32 [in, in], for the weights that read the same x."""

    weights: tuple[str, ...]
    hessian: torch.Tensor


def read_calibration(path: Path, tokenizer: Any, *, max_positions: int) -> CalibrationTokens:
    """Tokenise a calibration file into sequences of one length, using as many tokens as fit.

    Args:
        path: .txt or .jsonl file.
        tokenizer: of the fine-tune.
        max_positions: longest sequence that the model takes.

    Returns:
        At most MAX_SEQUENCES sequences of at most SEQUENCE_TOKENS tokens.

    Raises:
        UserError: calibration_too_short, texts_invalid.
    """
    stream: list[int] = []
    limit = MAX_SEQUENCES * SEQUENCE_TOKENS
    for item in read_texts(path):
        text = render_text(item, tokenizer)
        stream += tokenizer.encode(
            text.prompt + text.answer,
            add_special_tokens=not text.has_special_tokens,
            verbose=False,
        )
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        if len(stream) >= limit:
            break
    stream = stream[:limit]
    if len(stream) < MIN_TOKENS:
        raise UserError("calibration_too_short", n_tokens=len(stream), needed=MIN_TOKENS)
    longest = min(SEQUENCE_TOKENS, max_positions)
    n_sequences = max(2, -(-len(stream) // longest))
    length = len(stream) // n_sequences
    tokens = torch.tensor(stream[: n_sequences * length], dtype=torch.int64)
    return CalibrationTokens(
        source=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        sequences=tokens.view(n_sequences, length),
    )


class _StopForwardError(Exception):
    """Ends the capture pass at the last decoder layer."""


class _LayerInputs:
    """Stands in for the decoder layers and keeps what they are called with.

    All sequences have one length, so masks and positions of the first serve for all. Each layer's
    options are kept, since models that mix full and sliding attention vary them.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self.hidden: list[torch.Tensor] = []
        self.options: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __enter__(self) -> Self:
        for index, layer in enumerate(self._layers):
            layer.forward = self._stand_in(index)
        return self

    def __exit__(self, *_error: object) -> None:
        for layer in self._layers:
            del layer.forward

    def _stand_in(self, index: int) -> Callable[..., torch.Tensor]:
        def forward(states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            if index == 0:
                self.hidden.append(states)
            if len(self.options) == index:
                self.options.append((args, options))
            if len(self.options) == len(self._layers):
                raise _StopForwardError
            return states

        return forward


class LayerCalibrator:
    """Walks the fine-tuned model layer by layer; one layer's weights are in memory at a time."""

    def __init__(self, directory: Path, tokens: CalibrationTokens, device: torch.device) -> None:
        checkpoint = open_checkpoint(directory)
        self._device = device
        model = build_skeleton(directory, compute_dtype(checkpoint, device))
        names = match_checkpoint_names(model, checkpoint)
        inner = {name for name, _ in model.base_model.named_parameters(model.base_model_prefix)}
        # Fused parameters (batched experts) are absent from the files: the library then converts.
        self._streams = inner <= names.keys()
        self._read = read_parameter(checkpoint, names)
        self._layers_name, self._layers = find_decoder_layers(model)
        if self._streams:
            self._fill_around_layers(model)
        else:
            model = load_model(directory, device=device)
            self._layers_name, self._layers = find_decoder_layers(model)
            names = match_checkpoint_names(model, checkpoint)
        self._names = names
        with torch.no_grad(), _LayerInputs(self._layers) as inputs:
            for sequence in tokens.sequences.to(device):
                with suppress(_StopForwardError):
                    model.base_model(input_ids=sequence[None], use_cache=False)
        self._hidden, self._options = inputs.hidden, inputs.options

    def _fill_around_layers(self, model: Any) -> None:
        for name, _ in list(model.base_model.named_parameters(model.base_model_prefix)):
            if not name.startswith(self._layers_name + "."):
                fill_parameter(model, name, self._read(name), device=self._device)
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(self._device))

    def __len__(self) -> int:
        return len(self._layers)

    def layers(self, wanted: Callable[[set[str]], bool]) -> Iterator[tuple[SharedHessian, ...]]:
        """Yield the Hessians of each decoder layer in order.

        Args:
            wanted: told the checkpoint names of a layer's weights; a layer that is not wanted is
                only passed through, and yields nothing in its tuple.

        Returns:
            An iterator of one tuple per decoder layer.

        Raises:
            UserError: activations_not_finite.
        """
        for index, layer in enumerate(self._layers):
            prefix = f"{self._layers_name}.{index}"
            if self._streams:
                fill_module(layer, prefix, self._read, device=self._device)
            weights = {
                module: self._names[f"{prefix}.{name}.weight"]
                for name, module in layer.named_modules()
                if isinstance(module, nn.Linear) and f"{prefix}.{name}.weight" in self._names
            }
            collector = _Collector(weights) if wanted(set(weights.values())) else None
            self._advance(layer, index)
            if not all(bool(torch.isfinite(states).all()) for states in self._hidden):
                raise UserError("activations_not_finite", layer=prefix)
            yield collector.finish() if collector else ()
            if self._streams:
                empty_module(layer)

    @torch.no_grad()
    def _advance(self, layer: nn.Module, index: int) -> None:
        args, options = self._options[index]
        for number, states in enumerate(self._hidden):
            output = layer(states, *args, **options)
            self._hidden[number] = output[0] if isinstance(output, tuple) else output


class _Collector:
    """Sums x^T x per distinct input; linears that are handed the same tensor share one sum."""

    def __init__(self, weights: dict[nn.Linear, str]) -> None:
        self._weights = weights
        self._leader: dict[nn.Module, nn.Module] = {}
        self._sums: dict[nn.Module, torch.Tensor] = {}
        self._tokens: dict[nn.Module, int] = {}
        self._last: tuple[nn.Module, torch.Tensor] | None = None
        self._hooks = [module.register_forward_pre_hook(self._see) for module in weights]

    def _see(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        states = inputs[0]
        if module not in self._leader:
            # Held until the next distinct input, so the identity cannot be reused.
            shared = self._last is not None and self._last[1] is states
            self._leader[module] = self._last[0] if shared and self._last else module
            if not shared:
                self._last = (module, states)
        if self._leader[module] is not module:
            return
        rows = states.detach().reshape(-1, states.shape[-1]).float()
        if module not in self._sums:
            self._sums[module] = rows.new_zeros((rows.shape[1], rows.shape[1]))
            self._tokens[module] = 0
        self._sums[module].addmm_(rows.T, rows)
        self._tokens[module] += rows.shape[0]

    def finish(self) -> tuple[SharedHessian, ...]:
        for hook in self._hooks:
            hook.remove()
        self._last = None
        return tuple(
            SharedHessian(
                weights=tuple(
                    self._weights[module]
                    for module in self._weights
                    if self._leader.get(module) is leader
                ),
                hessian=total.div_(max(self._tokens[leader], 1)),
            )
            for leader, total in self._sums.items()
        )
