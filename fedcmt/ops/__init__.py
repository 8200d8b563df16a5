"""The server's two operations on flat updates, native where possible.

Each has a torch definition of the same name in `fedcmt.ops.reference` and a native one, in C++ for
CPUs and in CUDA. `backend` chooses: "native" never falls back, "reference" is plain torch, and
"auto" is native where the extension (and, for CUDA tensors, its CUDA part) is there.

Every check of the arguments is in this file.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from fedcmt.ops import _native, reference

__all__ = ["Backend", "BackendInfo", "StepStats", "backend_info", "gramian", "server_step"]

Backend = Literal["auto", "native", "reference"]

_BACKENDS = ("auto", "native", "reference")
# The values of enum class Dtype in csrc/ops.h.
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepStats:
    """What a server step did.

    Attributes:
        norm: Euclidean norm of lr * m, the step that was added to the parameters.
        nonfinite: Number of NaN and infinite values in d = sum_i weights[i] * updates[i].
    """

    norm: float
    nonfinite: int


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


def gramian(updates: Sequence[Tensor], *, backend: Backend = "auto") -> Tensor:
    """Gram matrix of the updates in one pass: G[i, j] = <updates[i], updates[j]>.

    Products and sums are float64 (a product of two float32 values is then exact), so the result
    does not suffer from the length of the updates. The result is the same, bit for bit, for any
    number of threads.

    Equivalent to: `x = torch.stack(updates).double(); x @ x.T`

    Args:
        updates: N >= 1 tensors, float32, bfloat16 or float16, on one device  # [P]
        backend: "auto", "native" or "reference".

    Returns:
        Symmetric float64 matrix on the updates' device  # [N, N]

    Raises:
        TypeError: Something else than tensors of one of the three dtypes.
        ValueError: No updates, or updates that differ or are not 1-D and contiguous.
        ImportError: backend is "native" and the extension, or its CUDA part, is missing.

    Source: conflict-averse combinations need no more of the updates than this matrix (CAGrad,
    arXiv 2110.14048, section 3; ours is computed without stacking the updates).
    """
    first = _check_updates(updates)
    if not _use_native(backend, first.device):
        return reference.gramian(updates)
    extension = _native.extension()
    gram = torch.empty(len(updates), len(updates), dtype=torch.float64, device=first.device)
    rows = [update.data_ptr() for update in updates]
    length, code = first.numel(), _DTYPE_CODES[first.dtype]
    if first.device.type == "cuda":
        size = extension.gramian_workspace_bytes(len(updates), length)
        workspace = torch.empty(size, dtype=torch.uint8, device=first.device)
        extension.gramian_cuda(rows, length, code, workspace.data_ptr(), gram.data_ptr(), *_launch_on(first.device))
    else:
        extension.gramian_cpu(rows, length, code, gram.data_ptr(), torch.get_num_threads())
    return gram


def server_step(
    params: Tensor,
    momentum: Tensor | None,
    updates: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    *,
    lr: float,
    beta: float = 0.0,
    backend: Backend = "auto",
) -> StepStats:
    """The server's step in one pass: d = sum_i weights[i] * updates[i]; m = beta * m + d;
    params += lr * m.

    `params` and `momentum` are changed in place, in float32; also where d has non-finite values,
    so look at the returned count before using them. With beta = 0 the old momentum is not read.

    Equivalent to: `params.add_(momentum.mul_(beta).add_(weights @ torch.stack(updates)), alpha=lr)`

    Args:
        params: Float32 parameters  # [P]
        momentum: Float32 momentum, or None where beta is 0  # [P]
        updates: N >= 1 tensors, float32, bfloat16 or float16, on the parameters' device  # [P]
        weights: N finite numbers, used as float32  # [N]
        lr: Factor of the step.
        beta: Factor of the old momentum.
        backend: "auto", "native" or "reference".

    Returns:
        Norm of the step and the number of non-finite values in d.

    Raises:
        TypeError: An argument of another type or dtype.
        ValueError: Lengths, devices or numbers that do not fit, tensors that are not contiguous or
            that share memory with `params` or `momentum`.
        ImportError: backend is "native" and the extension, or its CUDA part, is missing.

    Source: server momentum of FedOpt (arXiv 2003.00295, algorithm 2, FedAvgM), with the updates
    combined, applied and measured while they are read once.
    """
    first = _check_updates(updates)
    _check_like("params", params, first)
    _check_no_overlap("params", params, [("momentum", momentum), *_named(updates)])
    lr, beta = _check_number("lr", lr), _check_number("beta", beta)
    if momentum is not None:
        _check_like("momentum", momentum, first)
        _check_no_overlap("momentum", momentum, _named(updates))
    elif beta != 0.0:
        raise ValueError(f"`momentum` should be a tensor where beta is not 0. Got None, {beta = }")
    factors = _check_weights(weights, len(updates))
    with torch.no_grad():
        if not _use_native(backend, first.device):
            norm, nonfinite = reference.server_step(params, momentum, updates, factors, lr=lr, beta=beta)
            return StepStats(norm, nonfinite)
        squares, nonfinite = _native_step(params, momentum, updates, factors, lr, beta)
    return StepStats(abs(lr) * math.sqrt(squares), nonfinite)


def _native_step(
    params: Tensor,
    momentum: Tensor | None,
    updates: Sequence[Tensor],
    weights: list[float],
    lr: float,
    beta: float,
) -> tuple[float, int]:
    """Runs the native step; returns the sum of squares of m and the non-finite count of d."""
    extension = _native.extension()
    arguments = (
        params.data_ptr(),
        0 if momentum is None else momentum.data_ptr(),
        [update.data_ptr() for update in updates],
        weights,
        params.numel(),
        _DTYPE_CODES[updates[0].dtype],
        lr,
        beta,
    )
    if params.device.type != "cuda":
        return extension.server_step_cpu(*arguments, torch.get_num_threads())
    size = extension.server_step_workspace_bytes(len(updates), params.numel())
    workspace = torch.empty(size, dtype=torch.uint8, device=params.device)
    sums = torch.empty(2, dtype=torch.float64, device=params.device)
    extension.server_step_cuda(*arguments, workspace.data_ptr(), sums.data_ptr(), *_launch_on(params.device))
    squares, nonfinite = sums.tolist()
    return squares, int(nonfinite)


def _launch_on(device: torch.device) -> tuple[int, int]:
    """Index and current stream of a CUDA device."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(index).cuda_stream


def _use_native(backend: str, device: torch.device) -> bool:
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


def _named(updates: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"updates[{i}]", update) for i, update in enumerate(updates)]


def _check_updates(updates: Sequence[Tensor]) -> Tensor:
    """Checks the updates against each other and returns the first."""
    if isinstance(updates, Tensor) or not isinstance(updates, Sequence):
        raise TypeError(f"`updates` should be a list or tuple of 1-D tensors. Got {type(updates).__name__}")
    if len(updates) == 0:
        raise ValueError("`updates` should hold at least one tensor. Got none")
    for name, update in _named(updates):
        _check_tensor(name, update)
        if update.dtype not in _DTYPE_CODES:
            raise TypeError(f"`{name}` should be float32, bfloat16 or float16. Got {update.dtype}")
        _check_same(name, update, "updates[0]", updates[0])
        if update.dtype != updates[0].dtype:
            raise TypeError(f"`{name}` should have the dtype of updates[0], {updates[0].dtype}. Got {update.dtype}")
    return updates[0]


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{name}` should be a tensor. Got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.dim() != 1:
        raise ValueError(f"`{name}` should be a dense 1-D tensor. Got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"`{name}` should be contiguous. Got stride {tensor.stride(0)}; call .contiguous()")


def _check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"`{name}` should be on the device of {other_name}, {other.device}. Got {tensor.device}")
    if tensor.numel() != other.numel():
        raise ValueError(f"`{name}` should have the length of {other_name}, {other.numel()}. Got {tensor.numel()}")


def _check_like(name: str, tensor: Any, first_update: Tensor) -> None:
    _check_tensor(name, tensor)
    if tensor.dtype != torch.float32:
        raise TypeError(f"`{name}` should be float32. Got {tensor.dtype}")
    _check_same(name, tensor, "updates[0]", first_update)


def _check_no_overlap(name: str, tensor: Tensor, others: Sequence[tuple[str, Tensor | None]]) -> None:
    """A written tensor must share no byte with a tensor that is read or written beside it."""
    begin = tensor.data_ptr()
    end = begin + tensor.numel() * tensor.element_size()
    for other_name, other in others:
        if other is None:
            continue
        other_begin = other.data_ptr()
        other_end = other_begin + other.numel() * other.element_size()
        if begin < other_end and other_begin < end:
            raise ValueError(f"`{name}` should not share memory with {other_name}. Got overlapping tensors")


def _check_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` should be a number. Got {type(value).__name__}")
    if not math.isfinite(value) or not _fits_float32(float(value)):
        raise ValueError(f"`{name}` should be finite as float32. Got {value}")
    return float(value)


def _fits_float32(value: float) -> bool:
    return abs(value) <= torch.finfo(torch.float32).max


def _check_weights(weights: Any, count: int) -> list[float]:
    if isinstance(weights, Tensor):
        if weights.dim() != 1 or weights.is_complex() or weights.dtype == torch.bool:
            raise ValueError(f"`weights` should be 1-D and real. Got {tuple(weights.shape)}, {weights.dtype}")
        values = weights.tolist()
    elif isinstance(weights, Sequence) and not isinstance(weights, str):
        values = [_check_number(f"weights[{i}]", weight) for i, weight in enumerate(weights)]
    else:
        raise TypeError(f"`weights` should be a tensor or a sequence of numbers. Got {type(weights).__name__}")
    if len(values) != count:
        raise ValueError(f"`weights` should hold one number an update, {count}. Got {len(values)}")
    return [_check_number(f"weights[{i}]", value) for i, value in enumerate(values)]
