"""Names of compiled kernels in Triton's cache, the same in every process."""

import sys
from types import ModuleType

from triton.runtime.jit import JITFunction


def settle_keys(*modules: ModuleType) -> None:
    """Hash the functions of modules, each after those that it calls.

    Triton hashes a function when it is first compiled, and leaves constants of the functions that
    it calls out if those were not hashed before. A process that began with another kernel would
    find nothing of this one in the cache.

    Args:
        modules: with kernels, and what they import.
    """
    for module in modules:
        # In the order in which they are defined, after those that are imported.
        for function in list(vars(module).values()):
            if not isinstance(function, JITFunction):
                continue
            if function.module != module.__name__:
                settle_keys(sys.modules[function.module])
            function.cache_key  # noqa: B018  reading it hashes
