"""Loads the native extension once and keeps the reason where that fails."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

BUILD_COMMAND = "pip install --no-build-isolation -e ."
CPU_PATH_VARIABLE = "FEDCMT_CPU_PATH"


@functools.cache
def _load() -> ModuleType | ImportError:
    try:
        extension = importlib.import_module("fedcmt._C")
    except ImportError as error:
        return ImportError(
            f"The native extension fedcmt._C could not be imported ({error}). Build it with: {BUILD_COMMAND}"
        )
    path = os.environ.get(CPU_PATH_VARIABLE)
    if path:
        try:
            extension.set_cpu_path(path)
        except ValueError as error:
            raise ValueError(f"{CPU_PATH_VARIABLE}: {error}") from None
    return extension


def import_error() -> ImportError | None:
    """The stored reason why the extension is not there, or None where it is."""
    loaded = _load()
    return loaded if isinstance(loaded, ImportError) else None


def extension() -> ModuleType:
    """The module `fedcmt._C`.

    Raises:
        ImportError: The extension is missing or does not load; the message has the build command.
        ValueError: FEDCMT_CPU_PATH names a path that this processor does not have.
    """
    loaded = _load()
    if isinstance(loaded, ImportError):
        raise loaded.with_traceback(None)  # the stored error would collect every caller's frames
    return loaded


def has_cuda_kernels() -> bool:
    """Whether the extension is there and was built with CUDA kernels."""
    loaded = _load()
    return not isinstance(loaded, ImportError) and bool(loaded.cuda_architectures)
