"""Loading transformers models, whole or as a skeleton filled layer by layer."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from deltacome_core.checkpoint import Checkpoint, open_checkpoint
from deltacome_core.errors import UserError

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
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise UserError("device_unavailable", device=device)
    if resolved.type not in {"cpu", "cuda"}:
        raise UserError("device_unavailable", device=device)
    return resolved


def resolve_devices(device: str | Sequence[str]) -> tuple[torch.device, ...]:
    """Return one device or several of one type, checked to exist.

    Raises:
        UserError: device_unavailable.
    """
    names = (device,) if isinstance(device, str) else tuple(device)
    devices = tuple(resolve_device(name) for name in names)
    if any(each.type == "cuda" for each in devices):
        current = torch.cuda.current_device()
        devices = tuple(
            torch.device("cuda", current if each.index is None else each.index) for each in devices
        )
    if len({each.type for each in devices}) != 1:
        raise UserError("device_unavailable", device=", ".join(names) or "none")
    return devices


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


def _auto_class(config: Any) -> Any:
    """Choose the class that answers with text: a language model, or one that also sees images."""
    for mapping, auto_class in (
        (_library.MODEL_FOR_CAUSAL_LM_MAPPING, _library.AutoModelForCausalLM),
        (_library.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, _library.AutoModelForImageTextToText),
    ):
        if type(config) in mapping:
            return auto_class
    raise ValueError(f"{config.model_type} is no language model")


def load_config(directory: Path) -> Any:
    """Read a model's configuration, never running its own code.

    Args:
        directory: a folder with config.json.

    Returns:
        A transformers configuration.

    Raises:
        UserError: architecture_unknown when transformers has no such.
    """
    try:
        return _library.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise UserError("architecture_unknown", reason=str(error)[:200]) from error


def load_model(directory: Path, *, device: str | torch.device = "cpu") -> Any:
    """Load a language model from safetensors files only, never running its own code.

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
        config = _library.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        model, info = _auto_class(config).from_pretrained(
            directory,
            config=config,
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
            model = _auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise UserError("architecture_unknown", reason=str(error)[:200]) from error
    finally:
        hook.remove()
    return model.eval()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The part of a model that reads tokens, and the list of layers inside it.

    name and layers_name are dotted names in the model; name is empty when it is all of the model.
    """

    name: str
    module: Any
    layers_name: str
    layers: nn.ModuleList


def find_decoder(model: Any) -> Decoder:
    """Find the decoder layers of a language model, or of the language part of a larger one.

    Args:
        model: a transformers model; of its decoder the outermost list of modules of one class is
            taken, of several the longest.

    Returns:
        The decoder and its layers.

    Raises:
        UserError: architecture_unknown when there is no such list.
    """
    root = model.get_decoder()
    names = {module: name for name, module in model.named_modules()}
    lists = [
        module
        for module in root.modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    ]
    if not lists:
        raise UserError("architecture_unknown", reason="it has no list of decoder layers")
    layers = min(lists, key=lambda module: (names[module].count("."), -len(module)))
    return Decoder(name=names[root], module=root, layers_name=names[layers], layers=layers)


@contextmanager
def running_on_text() -> Iterator[None]:
    """Report what a model's own code raises on token ids alone, for example for want of an image.

    Raises:
        UserError: model_not_runnable.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError("model_not_runnable", reason=reason) from error
