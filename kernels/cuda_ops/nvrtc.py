"""CUDA C++ compiled at run time and launched through the driver, without torch's help or nvcc."""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from deltacome_core.errors import InternalError

_FUNCTION_SHARED_BYTES: Final = 8
_FUNCTION_CARVEOUT: Final = 9
_LAUNCH_SERIALIZATION: Final = 6
# Shared memory that a Hopper multiprocessor has at most, of what it shares with its first cache.
_LARGEST_CARVEOUT_BYTES: Final = 228 * 1024


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: a number, and a union of 64 bytes of which an int is used."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("_", ctypes.c_int),
        ("value", ctypes.c_int),
        ("_rest", ctypes.c_char * 60),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


def _check(result: int, what: str) -> None:
    if result:
        raise InternalError(f"{what} failed with {result}")


def _load_nvrtc() -> ctypes.CDLL:
    """The run-time compiler that torch's CUDA builds bring with them."""
    major = (torch.version.cuda or "").partition(".")[0]
    packages = Path(torch.__file__).parents[1] / "nvidia"
    found = sorted(str(path) for path in packages.glob(f"**/libnvrtc.so.{major}"))
    for name in (f"libnvrtc.so.{major}", *found):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise InternalError(f"no libnvrtc.so.{major} is beside torch")


def compile_cubin(source: str, *, arch: int, defines: dict[str, int]) -> bytes:
    """Compile CUDA C++ that includes nothing.

    Args:
        source: the program.
        arch: compute capability, 90 for Hopper.
        defines: macros.

    Returns:
        Machine code of that architecture.

    Raises:
        InternalError: it does not compile; the message is the compiler's.
    """
    nvrtc = _load_nvrtc()
    program = ctypes.c_void_p()
    text = source.encode()
    _check(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"stream.cu", 0, None, None),
        "nvrtcCreateProgram",
    )
    options = [f"--gpu-architecture=sm_{arch}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in defines.items()]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), given)
    size = ctypes.c_size_t()
    if failed:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        said = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, said)
        raise InternalError(said.value.decode())
    _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
    code = ctypes.create_string_buffer(size.value)
    _check(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel on one device that takes one structure as its argument."""

    function: ctypes.c_void_p
    driver: ctypes.CDLL
    threads: int
    shared_bytes: int

    def launch(self, arguments: ctypes.Structure, *, blocks: int, overlap: bool) -> None:
        """Queue the kernel on the current stream.

        Args:
            arguments: copied at once.
            blocks: of the grid.
            overlap: start before the launch before ends; the kernel waits where it has to.

        Raises:
            InternalError: the driver refused.
        """
        attribute = _Attribute(id=_LAUNCH_SERIALIZATION, value=1)
        config = _Config(
            grid=(blocks, 1, 1),
            block=(self.threads, 1, 1),
            shared_bytes=self.shared_bytes,
            stream=torch.cuda.current_stream().cuda_stream,
            attributes=ctypes.pointer(attribute),
            n_attributes=int(overlap),
        )
        given: Any = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _check(
            self.driver.cuLaunchKernelEx(ctypes.byref(config), self.function, given, None),
            "cuLaunchKernelEx",
        )


def load_kernels(code: bytes, names: dict[str, int], *, threads: int) -> dict[str, Kernel]:
    """Load machine code onto the current device.

    Args:
        code: of `compile_cubin`.
        names: shared memory of each kernel in bytes.
        threads: of a block.

    Returns:
        The kernels by name.

    Raises:
        InternalError: the driver refused.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    # The context that the driver loads into is torch's.
    torch.cuda.set_device(torch.cuda.current_device())
    module = ctypes.c_void_p()
    _check(driver.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
    kernels = {}
    for name, shared_bytes in names.items():
        function = ctypes.c_void_p()
        found = driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
        _check(found, "cuModuleGetFunction")
        # What shared memory leaves of a multiprocessor's cache holds the activations.
        carveout = -(-100 * shared_bytes // _LARGEST_CARVEOUT_BYTES)
        for attribute, value in (
            (_FUNCTION_SHARED_BYTES, shared_bytes),
            (_FUNCTION_CARVEOUT, carveout),
        ):
            _check(driver.cuFuncSetAttribute(function, attribute, value), "cuFuncSetAttribute")
        kernels[name] = Kernel(
            function=function, driver=driver, threads=threads, shared_bytes=shared_bytes
        )
    return kernels
