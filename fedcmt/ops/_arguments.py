"""Checks of the operations' arguments, and arrays of other libraries as tensors over the same memory."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

# The values of enum class Dtype in csrc/ops.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def as_tensor(name: str, value: Any, *, written: bool = False) -> Tensor:
    """A tensor as it is; a NumPy, CuPy or any other DLPack array as a tensor over the same memory.

    Raises:
        TypeError: Neither a tensor nor an array, or an array of a dtype that torch does not know.
        ValueError: A read-only array where the operation writes.
    """
    if isinstance(value, Tensor):
        return value
    numpy = sys.modules.get("numpy")  # where nobody imported it, nothing can be its array
    if numpy is not None and isinstance(value, numpy.ndarray):
        if written and not value.flags.writeable:
            raise ValueError(f"`{name}` should be writable. Got a read-only array")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return _converted(name, torch.from_numpy, value)
    if hasattr(value, "__cuda_array_interface__"):
        return _converted(name, lambda array: torch.as_tensor(array, device="cuda"), value)
    if hasattr(value, "__dlpack__"):
        return _converted(name, torch.from_dlpack, value)
    raise TypeError(f"`{name}` should be a tensor. Got {type(value).__name__}")


def _converted(name: str, convert: Any, value: Any) -> Tensor:
    try:
        tensor: Tensor = convert(value)
    except (TypeError, ValueError, BufferError) as error:
        raise TypeError(f"`{name}` cannot be taken as a tensor: {error}") from None
    return tensor


def check_updates(updates: Any, name: str = "updates") -> list[Tensor]:
    """The updates as tensors of one dtype, device and length.

    Raises:
        TypeError, ValueError: They are not.
    """
    tensors = _check_rows(updates, name)
    for other_name, update in named(tensors, name)[1:]:
        _check_same(other_name, update, f"{name}[0]", tensors[0])
        _check_same_dtype(other_name, update, f"{name}[0]", tensors[0])
    return tensors


def check_ragged_updates(updates: Any) -> list[Tensor]:
    """The updates as tensors of one dtype and device, of any lengths."""
    tensors = _check_rows(updates, "updates")
    for name, update in named(tensors)[1:]:
        _check_same_device(name, update, "updates[0]", tensors[0])
        _check_same_dtype(name, update, "updates[0]", tensors[0])
    return tensors


def _check_rows(updates: Any, name: str) -> list[Tensor]:
    if isinstance(updates, Tensor) or not isinstance(updates, Sequence):
        raise TypeError(f"`{name}` should be a list or tuple of 1-D tensors. Got {type(updates).__name__}")
    if len(updates) == 0:
        raise ValueError(f"`{name}` should hold at least one tensor. Got none")
    return [check_update(row_name, update) for row_name, update in named(updates, name)]


def check_update(name: str, update: Any) -> Tensor:
    """One update: a dense 1-D tensor of float32, bfloat16 or float16."""
    tensor = _check_dense(name, as_tensor(name, update))
    if tensor.dtype not in DTYPE_CODES:
        raise TypeError(f"`{name}` should be float32, bfloat16 or float16. Got {tensor.dtype}")
    return tensor


def check_written(name: str, value: Any, like: Tensor, like_name: str, dtypes: Iterable[torch.dtype]) -> Tensor:
    """A tensor that the operation writes, of the length and on the device of another."""
    tensor = _check_dense(name, as_tensor(name, value, written=True))
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"`{name}` should be {expected}. Got {tensor.dtype}")
    _check_same(name, tensor, like_name, like)
    return tensor


def _check_dense(name: str, tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.dim() != 1:
        raise ValueError(f"`{name}` should be a dense 1-D tensor. Got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"`{name}` should be contiguous. Got stride {tensor.stride(0)}; call .contiguous()")
    return tensor


def _check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    _check_same_device(name, tensor, other_name, other)
    if tensor.numel() != other.numel():
        raise ValueError(f"`{name}` should have the length of {other_name}, {other.numel()}. Got {tensor.numel()}")


def _check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"`{name}` should be on the device of {other_name}, {other.device}. Got {tensor.device}")


def _check_same_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(f"`{name}` should have the dtype of {other_name}, {other.dtype}. Got {tensor.dtype}")


def named(tensors: Sequence[Any], name: str = "updates") -> list[tuple[str, Any]]:
    """Each tensor with its name for messages."""
    return [(f"{name}[{i}]", tensor) for i, tensor in enumerate(tensors)]


def check_no_overlap(written: Sequence[tuple[str, Tensor]], read: Sequence[tuple[str, Tensor]]) -> None:
    """A written tensor must share no byte with a tensor that is read or written beside it."""
    for place, (name, tensor) in enumerate(written):
        begin, end = _extent(tensor)
        for other_name, other in [*written[place + 1 :], *read]:
            other_begin, other_end = _extent(other)
            if begin < other_end and other_begin < end:
                raise ValueError(f"`{name}` should not share memory with {other_name}. Got overlapping tensors")


def _extent(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def check_number(name: str, value: Any) -> float:
    """A finite number that fits float32.

    Raises:
        TypeError, ValueError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` should be a number. Got {type(value).__name__}")
    if not math.isfinite(value) or abs(float(value)) > torch.finfo(torch.float32).max:
        raise ValueError(f"`{name}` should be finite as float32. Got {value}")
    return float(value)


def check_weights(weights: Any, shape: tuple[int, ...]) -> Tensor:
    """Weights as a float64 tensor on the CPU of the shape expected.

    Raises:
        TypeError, ValueError: Another shape, or numbers that are not finite as float32.
    """
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        tensor = as_tensor("weights", weights)
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"`weights` should be real. Got {tensor.dtype}")
        tensor = tensor.detach().double().cpu()
    else:
        tensor = _nested_numbers(weights)
    if tuple(tensor.shape) != shape:
        expected = f"one number an update, {shape[0]}" if len(shape) == 1 else f"numbers of shape {shape}"
        found = len(tensor) if tensor.dim() == len(shape) == 1 else tuple(tensor.shape)
        raise ValueError(f"`weights` should hold {expected}. Got {found}")
    wrong = ~(tensor.abs() <= torch.finfo(torch.float32).max)
    if bool(wrong.any()):
        raise ValueError(f"`weights` should be finite as float32. Got {tensor[wrong][0].item()}")
    return tensor


def _nested_numbers(weights: Sequence[Any]) -> Tensor:
    rows = []
    for name, value in named(weights, "weights"):
        if isinstance(value, str) or not (isinstance(value, Sequence) or hasattr(value, "tolist")):
            check_number(name, value)
        rows.append(value.tolist() if hasattr(value, "tolist") else value)
    try:
        return torch.tensor(rows, dtype=torch.float64)
    except ValueError:
        raise ValueError("`weights` should have rows of one length. Got rows of different lengths") from None


def check_segments(segments: Sequence[int] | Tensor | None, length: int) -> list[int]:
    """Bounds of the segments, `[S + 1]`; without segments, those of one.

    Raises:
        ValueError: They do not rise from 0 to the length.
    """
    if segments is None:
        return [0, length]
    bounds = [int(bound) for bound in segments]
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length or bounds != sorted(bounds):
        raise ValueError(f"`segments` should be bounds that rise from 0 to the length, {length}. Got {bounds[:8]}")
    return bounds


def check_gram(gram: Any, shape: tuple[int, ...], name: str = "gram") -> Tensor:
    """A float64 Gram matrix, or one a segment, of the shape expected."""
    if not isinstance(gram, Tensor):
        raise TypeError(f"`{name}` should be a tensor. Got {type(gram).__name__}")
    if tuple(gram.shape) != shape or gram.dtype != torch.float64:
        raise ValueError(f"`{name}` should be float64 of shape {shape}. Got {gram.dtype}, {tuple(gram.shape)}")
    return gram
