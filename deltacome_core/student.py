"""A language model whose matrices are applied as a delta is served: backbone and factors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from deltacome_core.checkpoint import Checkpoint
from deltacome_core.container import Delta
from deltacome_core.errors import UserError
from deltacome_core.models import build_skeleton, find_decoder, running_on_text
from deltacome_core.packed import ExactTensor, PackedMatrix, PackedRows, PackedTensor
from deltacome_core.parameters import Piece, locate_parameters, read_parameter
from deltacome_core.reconstruct import rebuild_tensor
from deltacome_core.tensors import load_tensor
from deltacome_core.trainable import (
    HeldLinear,
    MovingLinear,
    MovingNorm,
    MovingRows,
    RowsHead,
    Trainable,
)


class Weights(Protocol):
    """Where a model's tensors come from."""

    def packed(self, name: str, /) -> PackedTensor | None:
        """Give the delta of a tensor, if it may be trained."""

    def base(self, name: str, /) -> torch.Tensor:
        """Give the tensor that a delta is added to, on the CPU."""

    def whole(self, name: str, /) -> torch.Tensor:
        """Give a tensor as the model has it, on the CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWeights:
    """The weights of a checkpoint; nothing can be trained."""

    checkpoint: Checkpoint

    def packed(self, _name: str) -> PackedTensor | None:
        return None

    def base(self, name: str) -> torch.Tensor:
        return self.whole(name)

    def whole(self, name: str) -> torch.Tensor:
        return load_tensor(self.checkpoint, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaWeights:
    """The weights of a backbone and a delta; device: where tensors are rebuilt."""

    backbone: Checkpoint
    delta: Delta
    device: torch.device

    def packed(self, name: str) -> PackedTensor | None:
        return self.delta.load(name)

    def base(self, name: str) -> torch.Tensor:
        return load_tensor(self.backbone, name)

    def whole(self, name: str) -> torch.Tensor:
        return rebuild_tensor(
            self.backbone, self.delta, name, dtype=torch.float32, device=self.device
        )


class TextModel:
    """The decoder and the output head of a model, each weight on the device once.

    Matrices stay in the type `held` and are widened while they are used; activations are float32.
    What no module here can train is filled in whole. trainable: by tensor name.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: Weights,
        *,
        held: torch.dtype,
        device: torch.device,
        saves_memory: bool,
    ) -> None:
        """Read the weights.

        Args:
            checkpoint: of the fine-tune; gives the architecture and the names of its tensors.
            weights: the numbers.
            held: type of the matrices.
            device: where the model goes.
            saves_memory: whether gradients run each layer again instead of keeping its states.

        Raises:
            UserError: architecture_unknown, also where a parameter of the decoder is kept in a form
                that only the library can read.
        """
        self._weights, self._held, self._device = weights, held, device
        # What the decoder answers with; a class of its own in mixtures of experts.
        self._output: Any = BaseModelOutputWithPast
        self._layout = checkpoint.layout
        self._model = build_skeleton(checkpoint.path, torch.float32)
        self._model.set_experts_implementation("eager")
        self._located = locate_parameters(self._model, checkpoint.layout)
        self._decoder = find_decoder(self._model)
        self.trainable: dict[str, Trainable] = {}
        self._fill_vocabulary()
        self._fill_decoder()
        if saves_memory:
            for layer in self._decoder.layers:
                layer.forward = partial(_run_twice, layer.forward)

    def _pieces(self, name: str) -> tuple[Piece, ...]:
        if name not in self._located:
            raise UserError("architecture_unknown", reason=f"{name} is not among its tensors")
        return self._located[name]

    def _packed(self, name: str, shape: tuple[int, ...]) -> PackedTensor | None:
        """Give the delta of a parameter that is one tensor of the checkpoint, as it is there."""
        first, *others = self._pieces(name)
        is_plain = not others and not first.transposed and self._layout[first.tensor][1] == shape
        return self._weights.packed(first.tensor) if is_plain else None

    def _whole(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        values = read_parameter(self._weights.whole, self._pieces(name), shape)
        return values.to(device=self._device, dtype=dtype)

    def _base(self, name: str) -> torch.Tensor:
        return self._weights.base(name).to(device=self._device, dtype=self._held)

    def _name(self, module: nn.Module) -> str:
        names: dict[nn.Module, str] = {each: own for own, each in self._model.named_modules()}
        return names[module]

    def _fill_vocabulary(self) -> None:
        """Replace the embedding and the output head, which may be one table."""
        table, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        if head is None:
            raise UserError("architecture_unknown", reason="it has no output head")
        source = f"{self._name(table)}.weight"
        is_plain_head = type(head) is nn.Linear and head.bias is None
        head_source = f"{self._name(head)}.weight"
        # Configurations of nested models contradict each other; the tensors do not.
        is_tied = head_source not in self._located
        if is_tied:
            head_source = source
        rows = None
        if type(table) is nn.Embedding and (is_plain_head or not is_tied):
            rows = self._moving_rows(source, tuple(table.weight.shape))
        if rows is not None:
            self._model.set_input_embeddings(rows)
        own = (
            rows
            if is_tied
            else self._moving_rows(head_source, tuple(head.weight.shape))
            if is_plain_head
            else None
        )
        if own is not None:
            self._model.set_output_embeddings(RowsHead(own))
            return
        weight = self._whole(head_source, tuple(head.weight.shape), self._held)
        bias = None
        if getattr(head, "bias", None) is not None:
            bias = self._whole(f"{self._name(head)}.bias", tuple(head.bias.shape), torch.float32)
        self._model.set_output_embeddings(HeldLinear(weight, bias))

    def _moving_rows(self, name: str, shape: tuple[int, ...]) -> MovingRows | None:
        packed = self._packed(name, shape)
        if not isinstance(packed, PackedRows) or packed.basis is None:
            return None
        rows = MovingRows(packed, packed.basis, self._base(packed.name))
        self.trainable[packed.name] = rows
        return rows

    def _fill_decoder(self) -> None:
        decoder = self._decoder.module
        for own, module in list(decoder.named_modules()):
            name = f"{self._decoder.name}.{own}".strip(".")
            if type(module) is nn.Linear:
                owner, _, leaf = own.rpartition(".")
                setattr(decoder.get_submodule(owner), leaf, self._linear(name, module))
            elif not isinstance(module, HeldLinear | MovingRows | RowsHead):
                self._fill(name, module)

    def _linear(self, name: str, module: nn.Linear) -> HeldLinear:
        bias = None
        if module.bias is not None:
            bias = self._whole(f"{name}.bias", tuple(module.bias.shape), torch.float32)
        shape = tuple(module.weight.shape)
        packed = self._packed(f"{name}.weight", shape)
        if isinstance(packed, PackedMatrix):
            moving = MovingLinear(packed, self._base(packed.name), bias)
            self.trainable[packed.name] = moving
            return moving
        weight = self._whole(f"{name}.weight", shape, self._held)
        return HeldLinear(weight, bias)

    def _fill(self, name: str, module: nn.Module) -> None:
        """Fill a module's own parameters; the weight of a norm may move."""
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            full = f"{name}.{leaf}".strip(".")
            is_norm = leaf == "weight" and "Norm" in type(module).__name__
            packed = self._packed(full, tuple(parameter.shape)) if is_norm else None
            if isinstance(packed, ExactTensor) and packed.value.ndim == 1:
                self.trainable[packed.name] = MovingNorm(packed, module, self._device)
                continue
            values = self._whole(full, tuple(parameter.shape), torch.float32)
            setattr(module, leaf, nn.Parameter(values, requires_grad=False))
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, leaf, buffer.to(self._device))

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """Run the decoder: int64 [rows, width] to float32 [rows, width, hidden].

        Raises:
            UserError: model_not_runnable.
        """
        with running_on_text():
            output = self._decoder.module(input_ids=ids, use_cache=False)
            found: torch.Tensor = output.last_hidden_state
        self._output = type(output)
        return found

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Give the logits of states, [n, hidden] to [n, vocabulary], scaled as the model does.

        Raises:
            UserError: model_not_runnable.
        """
        ids = torch.zeros((1, len(states)), dtype=torch.int64, device=self._device)
        with running_on_text(), self._giving(states[None]):
            found: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        return found[0]

    @contextmanager
    def _giving(self, states: torch.Tensor) -> Iterator[None]:
        """Let the decoder answer with these states, whatever it is asked."""
        output = self._output(last_hidden_state=states)
        self._decoder.module.forward = lambda *_args, **_options: output
        try:
            yield
        finally:
            del self._decoder.module.forward

    def drop_layers(self) -> None:
        """Free the decoder's layers; logits of known states can still be had."""
        # Whoever refers to a layer, for example its own forward, keeps no memory with it.
        self._decoder.layers.to("meta")
        while len(self._decoder.layers):
            del self._decoder.layers[-1]


def _run_twice(forward: Any, *args: Any, **options: Any) -> Any:
    """Run a layer without keeping its states; gradients run it again."""
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)
