"""Second moments of the inputs of every linear layer, one decoder layer at a time."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.errors import InternalError, UserError
from deltacome_core.manifest import CalibrationRecord
from deltacome_core.models import (
    build_skeleton,
    compute_dtype,
    find_decoder,
    load_model,
    running_on_text,
)
from deltacome_core.moments import LayerMoments, SharedHessian, add_moment
from deltacome_core.parameters import empty_module, fill_parameters, locate_parameters
from deltacome_core.texts import read_texts, render_text

# 128 sequences of 2048 tokens, as published (thunlp/Delta-CoMe, run.sh).
MAX_SEQUENCES = 128
SEQUENCE_TOKENS = 2048
# A CPU takes minutes for what a GPU does in seconds; 16,384 tokens are ten times the widest input
# of a model that is compressed on one.
CPU_SEQUENCES = 8
# Below this a Hessian of a few hundred columns is mostly damping.
MIN_TOKENS = 512
# States stay on the device up to this size, those of further sequences in host memory: 128 x 2048
# tokens take 2 GiB at a width of 4096; at 8192 half of their 4 GiB would not fit beside Hessians.
_RESIDENT_BYTES = 2 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationTokens:
    """Token sequences int64 [n, length], n >= 2, and the text they come from.

    source: names of the files; sha256: of their bytes, one after the other.
    """

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

    def count(self, n_rows: int) -> torch.Tensor:
        """Count each token of a vocabulary: float32 [n_rows]."""
        return torch.bincount(self.sequences.flatten(), minlength=n_rows)[:n_rows].float()

    def record(self, *, n_matrices: int) -> CalibrationRecord:
        """Describe the text and the matrices it was used for."""
        return CalibrationRecord(
            source=self.source,
            n_tokens=self.n_tokens,
            sha256=self.sha256,
            n_matrices=n_matrices,
        )


def read_calibration(
    path: Path,
    tokenizer: Any,
    *,
    max_positions: int,
    max_sequences: int = MAX_SEQUENCES,
    general: Path | None = None,
) -> CalibrationTokens:
    """Tokenise a calibration file into sequences of one length, using as many tokens as fit.

    Args:
        path: .txt or .jsonl file.
        tokenizer: of the fine-tune.
        max_positions: longest sequence that the model takes.
        max_sequences: of SEQUENCE_TOKENS tokens, or as many tokens in shorter ones.
        general: file of which as many tokens are used besides, read again from its beginning where
            it is shorter; both share max_sequences.

    Returns:
        At most max_sequences sequences of at most SEQUENCE_TOKENS tokens.

    Raises:
        UserError: calibration_too_short, texts_invalid.
    """
    limit = max_sequences * SEQUENCE_TOKENS
    stream = _read_stream(path, tokenizer, limit if general is None else limit // 2)
    if len(stream) < MIN_TOKENS:
        raise UserError("calibration_too_short", n_tokens=len(stream), needed=MIN_TOKENS)
    streams, files = [stream], [path]
    if general is not None:
        other = _read_stream(general, tokenizer, len(stream))
        streams.append((other * -(-len(stream) // len(other)))[: len(stream)])
        files.append(general)
    longest = min(SEQUENCE_TOKENS, max_positions)
    n_sequences = max(2, -(-len(stream) // longest))
    length = len(stream) // n_sequences
    tokens = torch.tensor([each[: n_sequences * length] for each in streams], dtype=torch.int64)
    return CalibrationTokens(
        source=" + ".join(file.name for file in files),
        sha256=hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
        sequences=tokens.view(-1, length),
    )


def _read_stream(path: Path, tokenizer: Any, limit: int) -> list[int]:
    """Read the first tokens of a text, its items one after the other."""
    stream: list[int] = []
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
    return stream[:limit]


class _StopForwardError(Exception):
    """Ends the capture pass at the last decoder layer."""


class _LayerInputs:
    """Stands in for the decoder layers and keeps what they are called with.

    All sequences have one length, so masks and positions of the first serve for all. Each layer's
    options are kept, since models that mix full and sliding attention vary them.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self._resident_bytes = 0
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
                self.hidden.append(self._place(states))
            if len(self.options) == index:
                self.options.append((args, options))
            if len(self.options) == len(self._layers):
                raise _StopForwardError
            return states

        return forward

    def _place(self, states: torch.Tensor) -> torch.Tensor:
        if self._resident_bytes + states.nbytes > _RESIDENT_BYTES:
            return states.cpu()
        self._resident_bytes += states.nbytes
        return states


class _LayerOutputs:
    """Stands in for the decoder layers once all of them ran: the first gives what the last gave."""

    def __init__(self, layers: nn.ModuleList, states: torch.Tensor) -> None:
        self._layers, self._states = layers, states

    def __enter__(self) -> Self:
        for layer in self._layers:
            layer.forward = lambda *_args, **_options: self._states
        return self

    def __exit__(self, *_error: object) -> None:
        for layer in self._layers:
            del layer.forward


class LayerCalibrator:
    """Walks the fine-tuned model layer by layer; one layer's weights are in memory at a time.

    Of a model that also sees images only the language part runs.
    """

    def __init__(self, directory: Path, tokens: CalibrationTokens, device: torch.device) -> None:
        self._checkpoint = open_checkpoint(directory)
        self._device = device
        model = build_skeleton(directory, compute_dtype(self._checkpoint, device))
        self._located = locate_parameters(model, self._checkpoint.layout)
        self._decoder = find_decoder(model)
        own = {id(parameter) for parameter in self._decoder.module.parameters()}
        # Parameters that only the library can read mean that it reads the whole model.
        self._streams = all(
            name in self._located
            for name, parameter in model.named_parameters()
            if id(parameter) in own
        )
        if self._streams:
            self._fill(self._decoder.module, self._decoder.name, skip=self._decoder.layers_name)
        else:
            model = load_model(directory, device=device)
            self._decoder = find_decoder(model)
        # A loop over experts, whose products can be seen one by one.
        model.set_experts_implementation("eager")
        self._layers = self._decoder.layers
        with (
            torch.no_grad(),
            _LayerInputs(self._layers) as inputs,
            running_on_text(),
        ):
            for sequence in tokens.sequences.to(device):
                with suppress(_StopForwardError):
                    self._decoder.module(input_ids=sequence[None], use_cache=False)
        self._hidden, self._options = inputs.hidden, inputs.options
        self._sequences = tokens.sequences

    def _fill(self, module: nn.Module, prefix: str, *, skip: str | None = None) -> None:
        fill_parameters(
            module, prefix, self._checkpoint, self._located, device=self._device, skip=skip
        )

    def __len__(self) -> int:
        return len(self._layers)

    def layers(self, wanted: Callable[[set[str]], bool]) -> Iterator[list[SharedHessian]]:
        """Yield the Hessians of each decoder layer in order.

        Args:
            wanted: told the checkpoint names of a layer's weights; a layer that is not wanted is
                only passed through, and yields nothing in its list.

        Returns:
            An iterator of one list per decoder layer, which the caller may empty as it goes.

        Raises:
            UserError: activations_not_finite, model_not_runnable.
        """
        for index, layer in enumerate(self._layers):
            prefix = f"{self._decoder.layers_name}.{index}"
            if self._streams:
                self._fill(layer, prefix)
            pieces = {
                own: self._located[f"{prefix}.{own}"]
                for own, _ in layer.named_parameters()
                if f"{prefix}.{own}" in self._located
            }
            names = {piece.tensor for found in pieces.values() for piece in found}
            moments = LayerMoments(layer, pieces) if wanted(names) else None
            with running_on_text(), moments or nullcontext():
                is_finite = self._advance(layer, index)
            if not is_finite:
                raise UserError("activations_not_finite", layer=prefix)
            found = moments.finish() if moments else []
            if self._streams:
                empty_module(layer)
            yield found
            # The caller may have dropped them: two layers' would not fit beside each other.
            del found

    @torch.no_grad()
    def _advance(self, layer: nn.Module, index: int) -> bool:
        """Replace the states by the layer's outputs; tell whether these are finite."""
        args, options = self._options[index]
        is_finite = torch.ones((), dtype=torch.bool, device=self._device)
        for number, states in enumerate(self._hidden):
            output = layer(states.to(self._device), *args, **options)
            output = output[0] if isinstance(output, tuple) else output
            is_finite &= torch.isfinite(output).all()
            self._hidden[number] = output.to(states.device)
        return bool(is_finite)

    @torch.no_grad()
    def head_hessian(self) -> torch.Tensor:
        """Give the second moments of what the output head reads, once all layers ran.

        Returns:
            float32 [hidden, hidden], mean of x x^T over all tokens, x the decoder's last states.

        Raises:
            UserError: model_not_runnable.
        """
        total: torch.Tensor | None = None
        for states, sequence in zip(self._hidden, self._sequences, strict=True):
            given = states.to(self._device)
            with running_on_text(), _LayerOutputs(self._layers, given):
                ids = sequence[None].to(self._device)
                last = self._decoder.module(input_ids=ids, use_cache=False).last_hidden_state
            rows = last.flatten(0, 1)
            if total is None:
                total = torch.zeros((rows.shape[1],) * 2, device=self._device)
            add_moment(total, rows)
        if total is None:
            raise InternalError("there is no calibration text")
        return total / self._sequences.numel()
