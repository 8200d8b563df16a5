"""Which implementation runs: native where possible, the torch reference elsewhere."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedcmt.ops import _native

Backend = Literal["auto", "native", "reference"]
_BACKENDS = ("auto", "native", "reference")
_logger = logging.getLogger("fedcmt.ops")


@dataclass(frozen=True)
class BackendInfo:
    """What was built and what this machine can run.

    Attributes:
        native: Whether the native extension loaded.
        import_error: Why it did not load, else None.
        cpu_path: Instruction set in use: "avx512", "avx2" or "plain"; None without the extension.
        cpu_paths: All that this processor can run, best first.
        cuda_architectures: What the CUDA kernels were compiled for; empty without CUDA kernels.
        openmp_max_threads: OpenMP's thread limit; 0 without the extension.
    """

    native: bool
    import_error: str | None
    cpu_path: str | None
    cpu_paths: tuple[str, ...]
    cuda_architectures: tuple[str, ...]
    openmp_max_threads: int


def backend_info() -> BackendInfo:
    """Describes the native extension, or why it is not there."""
    error = _native.import_error()
    if error is not None:
        return BackendInfo(False, str(error), None, (), (), 0)
    extension = _native.extension()
    return BackendInfo(
        native=True,
        import_error=None,
        cpu_path=extension.cpu_path(),
        cpu_paths=tuple(extension.available_cpu_paths()),
        cuda_architectures=tuple(filter(None, extension.cuda_architectures.split(","))),
        openmp_max_threads=extension.max_threads(),
    )


def use_native(backend: str, device: torch.device) -> bool:
    """Whether the native operations serve a call.

    Raises:
        ValueError: No such backend.
        ImportError: backend is "native" and the extension, or its CUDA part, is missing.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"`backend` should be one of {_BACKENDS}. Got {backend!r}")
    if backend == "reference":
        return False
    error = _unavailable(device.type)
    if backend == "native":
        if error is not None:
            raise error.with_traceback(None)
        return True
    _log_choice(device.type)
    return error is None


def runs_cuda_kernels(device: torch.device) -> bool:
    """Whether native calls on a device go to the CUDA kernels: on GPUs, and where they are simulated on a CPU."""
    return device.type == "cuda" or bool(_native.extension().cuda_is_simulated)


def cuda_launch(size: int, device: torch.device) -> tuple[Tensor, tuple[int, int, int]]:
    """Workspace of `size` bytes (keep it until the call returns) and its address, device index and current stream."""
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    if device.type != "cuda":
        return workspace, (workspace.data_ptr(), 0, 0)
    index = torch.cuda.current_device() if device.index is None else device.index
    return workspace, (workspace.data_ptr(), index, torch.cuda.current_stream(index).cuda_stream)


def cpu_execution(updates: Any = None) -> tuple[int, bool]:
    """Number of threads, and whether the pages of mapped updates are given back once they are read."""
    return torch.get_num_threads(), bool(getattr(updates, "release_pages", False))


def _unavailable(device_type: str) -> ImportError | ValueError | None:
    """Why the native operations cannot serve a kind of device, or None where they can."""
    error = _native.import_error()
    if error is not None:
        return error
    if device_type == "cuda" and not _native.has_cuda_kernels():
        return ImportError(
            "The native extension fedcmt._C was built without CUDA kernels. "
            f"Build them with: FEDCMT_CUDA=on {_native.BUILD_COMMAND}"
        )
    if device_type not in ("cpu", "cuda"):
        return ValueError(f"Native operations should get cpu or cuda tensors. Got {device_type}")
    return None


@functools.cache
def _log_choice(device_type: str) -> None:
    error = _unavailable(device_type)
    if error is None:
        path = _native.extension().cpu_path() if device_type == "cpu" else "CUDA kernels"
        _logger.info("fedcmt.ops on %s: native (%s)", device_type, path)
    else:
        _logger.warning("fedcmt.ops on %s: reference (slower). %s", device_type, error)
