"""Loading transformers models, whole or as a skeleton filled layer by layer."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from deltacome_core.checkpoint import Checkpoint, open_checkpoint
from deltacome_core.errors import UserError
from deltacome_core.tensors import load_tensor

# The library's classes are only partly typed.
_library: Any = transformers
# Its progress bars and advice would end up between our own lines.
_library.utils.logging.set_verbosity_error()
_library.utils.logging.disable_progress_bar()


def resolve_device(device: str) -> torch.device:
    """Return the device of that name, checked to exist.

    Raises:
        UserError: device_unavailable.
    """
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise UserError("device_unavailable", device=device) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device_unavailable", device=device)
    if resolved.type not in {"cpu", "cuda"}:
        raise UserError("device_unavailable", device=device)
    return resolved


def parse_dtype(name: str) -> torch.dtype:
    """Return the float dtype of that name.

    Raises:
        UserError: dtype_unknown.
    """
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in known:
        raise UserError("dtype_unknown", name=name, known=sorted(known))
    return known[name]


def compute_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Return the dtype a checkpoint runs in: its own on a GPU, fp32 on a CPU.

    A CPU multiplies bf16 matrices some hundred times slower than fp32 ones.
    """
    if device.type == "cpu":
        return torch.float32
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(checkpoint.dtype, torch.float32)


def find_max_positions(config: dict[str, Any], *, default: int) -> int:
    """Return the longest sequence a model takes, by its config.json.

    Args:
        config: parsed config.json; multimodal ones nest the language model's part.
        default: for a model that sets no limit.

    Returns:
        Tokens, at least 1.
    """
    nested = config.get("text_config")
    settings = nested if isinstance(nested, dict) else config
    found = [settings.get(key) for key in ("max_position_embeddings", "n_positions")]
    limits = [limit for limit in found if isinstance(limit, int) and limit > 0]
    return limits[0] if limits else default


def load_model(directory: Path, *, device: str | torch.device = "cpu") -> Any:
    """Load a causal language model from safetensors files only, never running its own code.

    Args:
        directory: a checkpoint folder with config.json.
        device: where the weights go.

    Returns:
        A transformers model in eval mode without gradients.

    Raises:
        UserError: not_a_checkpoint and kin from opening it, tensor_missing when the architecture
            needs a tensor that the files lack, architecture_unknown when transformers has no such.
    """
    target = resolve_device(str(device))
    checkpoint = open_checkpoint(directory)
    try:
        model, info = _library.AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=compute_dtype(checkpoint, target),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, KeyError) as error:
        raise UserError("architecture_unknown", reason=str(error)[:200]) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError("tensor_missing", tensors=missing[:10])
    return model.to(target).eval().requires_grad_(requires_grad=False)


def load_tokenizer(*directories: Path) -> Any:
    """Load the tokenizer of the first folder that has one.

    Raises:
        UserError: tokenizer_missing.
    """
    for directory in directories:
        if not any(directory.glob("tokenizer*")):
            continue
        try:
            return _library.AutoTokenizer.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
        except (ValueError, OSError, KeyError):
            continue
    raise UserError("tokenizer_missing", directories=[path.name for path in directories])


def build_skeleton(directory: Path, dtype: torch.dtype) -> Any:
    """Build a model whose parameters hold no memory yet; buffers are real.

    Args:
        directory: a checkpoint folder with config.json.
        dtype: of the parameters to come.

    Returns:
        A transformers model with every parameter on the meta device.

    Raises:
        UserError: architecture_unknown.
    """

    def drop_storage(_module: nn.Module, _name: str, parameter: Any) -> Any:
        if not isinstance(parameter, nn.Parameter):
            return parameter
        return nn.Parameter(parameter.data.to("meta"), requires_grad=False)

    hook = nn.modules.module.register_module_parameter_registration_hook(drop_storage)
    try:
        config = _library.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = _library.AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False
            )
    except (ValueError, KeyError) as error:
        raise UserError("architecture_unknown", reason=str(error)[:200]) from error
    finally:
        hook.remove()
    return model.eval()


def find_decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder layers and its name inside the model.

    Args:
        model: a transformers model; `base_model.layers` is taken when there is one, else the
            longest list of modules of one class.

    Returns:
        The dotted name and the list.

    Raises:
        UserError: architecture_unknown when there is no such list.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    }
    for name, module in lists.items():
        if module is getattr(model.base_model, "layers", None):
            return name, module
    if not lists:
        raise UserError("architecture_unknown", reason="it has no list of decoder layers")
    name = max(lists, key=lambda key: len(lists[key]))
    return name, lists[name]


def match_checkpoint_names(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Map parameter names to checkpoint names, with or without the base model's prefix.

    Args:
        model: a transformers model.
        checkpoint: whose tensors are looked up.

    Returns:
        The parameters that were found; tied and fused parameters may be absent.
    """
    prefix = f"{model.base_model_prefix}."
    names: dict[str, str] = {}
    for name, _parameter in model.named_parameters():
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in checkpoint.tensors:
                names[name] = candidate
                break
    return names


def fill_parameter(
    module: nn.Module, name: str, values: torch.Tensor, *, device: torch.device
) -> None:
    """Replace one parameter, cast to its dtype.

    Args:
        module: changed in place.
        name: dotted name of the parameter inside the module.
        values: any float dtype, the parameter's shape.
        device: where they go.
    """
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    dtype = owner.get_parameter(leaf).dtype
    values = values.to(device=device, dtype=dtype)
    setattr(owner, leaf, nn.Parameter(values, requires_grad=False))


def fill_module(
    module: nn.Module, prefix: str, read: Callable[[str], torch.Tensor], *, device: torch.device
) -> None:
    """Give each parameter of a module its values.

    Args:
        module: changed in place.
        prefix: dotted name of the module in the model.
        read: returns the values of a parameter by its name in the model.
        device: where they go.
    """
    for name, _ in list(module.named_parameters()):
        fill_parameter(module, name, read(f"{prefix}.{name}"), device=device)


def empty_module(module: nn.Module) -> None:
    """Drop the values of each parameter of a module, in place."""
    module.to("meta")


def read_parameter(checkpoint: Checkpoint, names: dict[str, str]) -> Callable[[str], torch.Tensor]:
    """Return a reader of parameters by their name in the model."""
    return lambda name: load_tensor(checkpoint, names[name])
