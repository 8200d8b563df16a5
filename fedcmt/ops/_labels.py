"""From a network's logits to labels on the grid of the image."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcmt.ops import _native, reference
from fedcmt.ops._backend import Backend, cpu_execution, use_native
from fedcmt.ops.taps import all_taps


def logits_to_labels(
    logits: Tensor,
    shape: Sequence[int],
    *,
    weights: Tensor | None = None,
    nearest_axis: int | None = None,
    region_values: Sequence[int] | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Labels on another grid, those of nnU-Net bit for bit, without storing logits there.

    Equivalent to: `resize((logits / weights).half(), shape, order=1).half().argmax(0)`, the resizing in float64 as
    skimage does it; with regions, instead of the argmax, `labels[logits[i].sigmoid() > 0.5] = region_values[i]` one
    region after the other. Halves are rounded where nnU-Net rounds: two logits that round to the same half go to the
    first label.

    Args:
        logits: float16 on the CPU, the last axis without gaps  # [K, D, H, W]
        shape: Of the labels, (D', H', W').
        weights: float16, what the logits are divided by: the sum of the tiles' weights  # [D, H, W]
        nearest_axis: Axis of (D, H, W) along which the nearest slice is taken, as nnU-Net does between thick slices.
        region_values: Label of each region; None for labels, which exclude each other  # [K]
        out: Where the labels go, uint8 or uint16, also a view with gaps  # [D', H', W']
        backend: "auto", "native" or "reference".

    Returns:
        `out`, or a new tensor: uint8 for labels up to 255, else uint16.

    Raises:
        TypeError, ValueError: Arguments that do not fit each other.
        FloatingPointError: A logit overflows half precision or is not a number.
        ImportError: backend is "native" and the extension is missing.
    """
    _check(logits, weights, shape, region_values)
    labels = _output(out, shape, len(logits), region_values)
    arguments: dict[str, Any] = {
        "weights": weights,
        "nearest_axis": nearest_axis,
        "region_values": region_values,
        "out": labels,
    }
    with torch.no_grad():
        if use_native(backend, logits.device):
            return _native_labels(logits, shape, **arguments)
        return reference.logits_to_labels(logits, shape, **arguments)


def _check(logits: Tensor, weights: Tensor | None, shape: Sequence[int], region_values: Sequence[int] | None) -> None:
    if logits.dtype != torch.float16 or logits.dim() != 4 or logits.device.type != "cpu":
        raise TypeError(
            f"`logits` should be float16 [K, D, H, W] on the CPU. Got {logits.dtype}, {tuple(logits.shape)}, "
            f"{logits.device}"
        )
    if logits.numel() == 0 or logits.stride(3) != 1:
        raise ValueError(
            f"`logits` should hold values, without gaps along W. Got shape {tuple(logits.shape)}, "
            f"strides {logits.stride()}"
        )
    if weights is not None and (
        weights.dtype != torch.float16 or weights.shape != logits.shape[1:] or weights.stride(2) != 1
    ):
        raise ValueError(
            f"`weights` should be float16 {tuple(logits.shape[1:])}, without gaps along W. "
            f"Got {weights.dtype}, {tuple(weights.shape)}"
        )
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"`shape` should be three positive numbers. Got {tuple(shape)}")
    if region_values is not None and (
        len(region_values) != len(logits) or min(region_values) < 0 or max(region_values) > 65535
    ):
        raise ValueError(
            f"`region_values` should be {len(logits)} labels in 0..65535, one a region. Got {list(region_values)}"
        )


def _output(out: Tensor | None, shape: Sequence[int], num_heads: int, region_values: Sequence[int] | None) -> Tensor:
    if out is None:
        return reference.empty_labels(shape, num_heads, region_values)
    expected = tuple(int(n) for n in shape)
    if out.dtype not in (torch.uint8, torch.uint16) or tuple(out.shape) != expected or out.device.type != "cpu":
        raise ValueError(f"`out` should be uint8 or uint16 {expected} on the CPU. Got {out.dtype}, {tuple(out.shape)}")
    largest = num_heads - 1 if region_values is None else max(region_values)
    if largest > torch.iinfo(out.dtype).max:
        raise ValueError(f"`out` should hold labels up to {largest}. Got {out.dtype}")
    return out


@functools.cache
def _region_threshold() -> float:
    """The largest half whose sigmoid, in float32, is not above 0.5: a little more than 0."""
    halves = torch.arange(64, dtype=torch.int16).view(torch.float16)  # the 64 smallest, in order
    return float(halves[torch.sigmoid(halves.float()) <= 0.5].max())


def _native_labels(
    logits: Tensor,
    shape: Sequence[int],
    *,
    weights: Tensor | None,
    nearest_axis: int | None,
    region_values: Sequence[int] | None,
    out: Tensor,
) -> Tensor:
    taps = all_taps(logits.shape[1:], shape, nearest_axis)
    values = None if region_values is None else np.asarray(region_values, np.int32)
    finite = _native.extension().logits_to_labels_cpu(
        logits.data_ptr(),
        list(logits.shape),
        list(logits.stride()),
        0 if weights is None else weights.data_ptr(),
        [0, 0, 1] if weights is None else list(weights.stride()),
        [(*(a.ctypes.data for a in (t.first, t.second, t.w0, t.w1)), len(t.first)) for t in taps],
        0 if values is None else values.ctypes.data,
        0.0 if values is None else _region_threshold(),
        out.data_ptr(),
        list(out.stride()),
        out.element_size(),
        cpu_execution()[0],
    )
    if not finite:
        raise FloatingPointError(reference.LOGITS_NOT_FINITE)
    return out
