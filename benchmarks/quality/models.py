"""Checkpoint folders as models and as plain state dictionaries."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]


VOCABULARY_NAMES = ("embed_tokens.weight", "lm_head.weight")


def read_state(folder: Path) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint folder, sharded or not."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state


def load_causal_model(folder: Path, *, dtype: torch.dtype, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )
    return model.to(device)


def serving_dtype(device: str) -> torch.dtype:
    """bf16 on a GPU, as served; fp32 on a CPU, which is slow at bf16."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def grow_vocabulary(rows: Tensor, n_rows: int) -> Tensor:
    """Append copies of the mean row, which is what an untrained new token gets."""
    n_new = n_rows - rows.shape[0]
    if n_new <= 0:
        return rows
    mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
    return torch.cat([rows, mean.expand(n_new, -1)])


@torch.no_grad()
def grow_embedding(model: Any, n_tokens: int) -> None:
    """Grow a model's embedding (and head) to n_tokens rows; a larger one stays as it is."""
    old = model.get_input_embeddings().weight.shape[0]
    if n_tokens <= old:
        return
    model.resize_token_embeddings(n_tokens, mean_resizing=False)
    for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
        module.weight.copy_(grow_vocabulary(module.weight[:old].clone(), n_tokens))


@torch.no_grad()
def load_in_place(model: Any, state: State) -> None:
    """Copy a state into a model's own memory, so that captured graphs stay valid.

    A state with fewer vocabulary rows is grown; a tied head may be missing from it.

    Raises:
        KeyError: the state lacks a parameter.
        ValueError: a shape does not fit.
    """
    for name, parameter in model.named_parameters():
        value = state[name]
        if name.endswith(VOCABULARY_NAMES):
            value = grow_vocabulary(value, parameter.shape[0])
        if value.shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(value.shape)}, expected {tuple(parameter.shape)}")
        parameter.copy_(value)


def half_state(model: Any) -> dict[str, Tensor]:
    """Return a model's weights in bf16 by checkpoint name; a tied head is not there twice."""
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return {
        name: value.to(torch.bfloat16)
        for name, value in model.state_dict().items()
        if not (is_tied and name == "lm_head.weight")
    }


def save_checkpoint(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a bf16 checkpoint folder; the model itself keeps its precision."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder, state_dict=half_state(model))
    tokenizer.save_pretrained(folder)
