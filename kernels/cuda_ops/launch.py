"""Launches of the kernels of stream.cu, and where they can take the place of their Triton twins."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Final

import torch

from kernels.config import SHARED_LIMIT_BYTES
from kernels.cuda_ops.nvrtc import Kernel, compile_cubin, load_kernels
from kernels.plan import StepPlan
from kernels.triton_ops.launch_batch import current_arch, overlaps

SHRINK_BYTES: Final = 152 * 1024
EXPAND_BYTES: Final = 88 * 1024
# Of a launch, as in stream.cu.
MAX_GROUPS: Final = 256
_WARPS: Final = 16
_FOLDER: Final = Path(__file__).parent
_DTYPES: Final = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class StreamArguments(ctypes.Structure):
    """Args of stream.cu."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("directory", ctypes.c_void_p),
        ("slot_stride", ctypes.c_longlong),
        ("site_offset", ctypes.c_longlong),
        ("group_slots", ctypes.c_void_p),
        ("group_counts", ctypes.c_void_p),
        ("group_tokens", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("y_stride", ctypes.c_longlong),
        ("x_steps", ctypes.c_int),
        ("h_steps", ctypes.c_int),
        ("n_groups", ctypes.c_int),
        ("planes", ctypes.c_int),
        ("dtype", ctypes.c_int),
    )


def read_source() -> str:
    """The program: its primitives, then its kernels."""
    return "\n".join((_FOLDER / name).read_text() for name in ("primitives.cuh", "stream.cu"))


@cache
def _load(device: int) -> dict[str, Kernel]:
    del device
    defines = {"SHRINK_BYTES": SHRINK_BYTES, "EXPAND_BYTES": EXPAND_BYTES, "WARPS": _WARPS}
    code = compile_cubin(read_source(), arch=current_arch(), defines=defines)
    names = {"shrink": SHRINK_BYTES, "expand": EXPAND_BYTES}
    return load_kernels(code, names, threads=32 * _WARPS)


@cache
def _n_multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def can_stream(plan: StepPlan, site: int) -> bool:
    """Whether these kernels know all that a site may ask, and the device has room for them.

    Args:
        plan: of the step.
        site: number of the site.

    Returns:
        False where their Triton twins have to run.
    """
    spec = plan.arena.spec
    return (
        plan.is_streamed
        and plan.arena.device.type == "cuda"
        and SHARED_LIMIT_BYTES.get(current_arch(), 0) >= SHRINK_BYTES
        and plan.units_per_group == 1
        and 1 < plan.n_tokens <= MAX_GROUPS
        and spec.grouping(site) == 0
        and not spec.has_direct(site)
        and not spec.has_factors(site)
    )


def make_arguments(plan: StepPlan, site: int, y: torch.Tensor | None) -> StreamArguments:
    """What both kernels are told.

    Args:
        plan: of the step.
        site: number of the site.
        y: outputs of an expand.

    Returns:
        The arguments.
    """
    arena = plan.arena
    return StreamArguments(
        x=plan.x_planes.data_ptr(),
        step=plan.x_step.data_ptr(),
        norm=plan.x_norm.data_ptr(),
        hidden=plan.h_planes.data_ptr(),
        table=arena.table.data_ptr(),
        directory=arena.directory.data_ptr(),
        slot_stride=arena.directory.stride(0),
        site_offset=site * arena.directory.stride(1),
        group_slots=plan.group_slots.data_ptr(),
        group_counts=plan.group_counts.data_ptr(),
        group_tokens=plan.group_tokens.data_ptr(),
        y=0 if y is None else y.data_ptr(),
        y_stride=0 if y is None else y.stride(0),
        x_steps=arena.spec.sites[site].input_steps,
        h_steps=arena.spec.hidden_steps(site),
        n_groups=plan.n_tokens,
        planes=plan.planes,
        dtype=0 if y is None else _DTYPES[y.dtype],
    )


def stream_shrink(plan: StepPlan, site: int) -> None:
    """Write the hidden planes of all groups at a site, as `launch_shrink` does.

    Args:
        plan: of the step, prepared just before.
        site: number of the site, of `can_stream`.
    """
    device = torch.cuda.current_device()
    _load(device)["shrink"].launch(
        make_arguments(plan, site, None), blocks=_n_multiprocessors(device), overlap=overlaps()
    )


def stream_expand(y: torch.Tensor, plan: StepPlan, site: int, *, overlap: bool = False) -> None:
    """Add the deltas of all groups to the outputs of a site, as `launch_expand` does.

    Args:
        y: bf16, fp16 or fp32 [tokens, out], columns adjacent.
        plan: of the step, shrunk.
        site: number of the site, of `can_stream`.
        overlap: start while the shrink ends, where that is the launch before on this stream.
    """
    device = torch.cuda.current_device()
    _load(device)["expand"].launch(
        make_arguments(plan, site, y),
        blocks=_n_multiprocessors(device),
        overlap=overlap and overlaps(),
    )
