"""nnU-Net's resampling, 20 times faster: spline interpolation is linear, and separable by axis.

Interpolating along one axis is a matrix `[m, n]` whose column i is SciPy's zoom of the i-th unit vector. A volume is
resampled by one product an axis in float64, and clipped to its range as skimage does. Voxels equal nnU-Net's after
rounding to float32; sums run in another order, so that about one voxel in a million differs in its last bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from fedcmt.ops.taps import all_taps, interpolated_slice

NNUNET_RESAMPLING = "resample_data_or_seg_to_shape"
_CACHED_MATRICES = 64
_ROWS_PER_BLOCK = 64
_NEGLIGIBLE = 1e-18


def array_module(array: Any) -> tuple[ModuleType, ModuleType]:
    """NumPy and ``scipy.ndimage``, or CuPy and its twin for arrays on a GPU."""
    if isinstance(array, np.ndarray):
        from scipy import ndimage

        return np, ndimage
    import cupy
    from cupyx.scipy import ndimage

    return cupy, ndimage


def resample(data: Any, shape: Sequence[int], *, order: int = 3, nearest_axis: int | None = None) -> Any:
    """Resamples channels onto another grid over the same extent.

    Equivalent to: nnU-Net's ``resample_data_or_seg(data, shape, False, nearest_axis, order, nearest_axis is not None)``

    Args:
        data: Floating point, NumPy or CuPy  # [C, D, H, W]
        shape: (D', H', W').
        order: Of the spline.
        nearest_axis: Axis of (D, H, W) along which the nearest slice is taken; the slices are resampled one by one.

    Returns:
        The same dtype  # [C, D', H', W']
    """
    size = tuple(int(n) for n in shape)
    if data.shape[1:] == size:
        return data
    xp, _ = array_module(data)
    result = xp.empty((len(data), *size), data.dtype)
    for channel, target in zip(data, result, strict=True):
        target[...] = _resampled(channel.astype(xp.float64), size, order, nearest_axis)
    return result


def resample_linear(data: np.ndarray, shape: Sequence[int], *, nearest_axis: int | None = None) -> np.ndarray:
    """`resample` of order 1 on the CPU, in SciPy's order of sums: halves round as nnU-Net's do, ties included.

    Args:
        data: Floating point  # [K, D, H, W]
        shape: (D', H', W').
        nearest_axis: As of :func:`resample`.

    Returns:
        The same dtype  # [K, D', H', W']
    """
    size = tuple(int(n) for n in shape)
    if data.shape[1:] == size:
        return data
    taps = all_taps(data.shape[1:], size, nearest_axis)
    result = np.empty((len(data), *size), data.dtype)
    for channel, target in zip(data, result, strict=True):
        for index in range(size[0]):
            target[index] = interpolated_slice(channel, index, taps)
    return result


def _resampled(volume: Any, shape: tuple[int, ...], order: int, nearest_axis: int | None) -> Any:
    """One channel `[D, H, W]` float64."""
    xp, ndimage = array_module(volume)
    kept = tuple(axis for axis in range(3) if axis != nearest_axis)
    low, high = volume.min(axis=kept, keepdims=True), volume.max(axis=kept, keepdims=True)
    # The axis that shrinks most comes first: the products after it have less to do.
    for axis in sorted(kept, key=lambda a: shape[a] / volume.shape[a]):
        if volume.shape[axis] != shape[axis]:
            volume = _along(volume, axis, shape[axis], order)
    volume = xp.clip(volume, low, high, out=volume)
    if nearest_axis is not None and volume.shape[nearest_axis] != shape[nearest_axis]:
        size, target = volume.shape[nearest_axis], shape[nearest_axis]
        places = (size / target) * (xp.arange(target) + 0.5) - 0.5
        index = ndimage.map_coordinates(xp.arange(size, dtype=xp.float64), places[None], order=0, mode="nearest")
        volume = xp.take(volume, index.astype(xp.int64), axis=nearest_axis)
    return volume


def _along(volume: Any, axis: int, target: int, order: int) -> Any:
    """The volume with one axis interpolated, in products that need no transposed copy."""
    xp, _ = array_module(volume)
    result = xp.empty((*volume.shape[:axis], target, *volume.shape[axis + 1 :]))
    for rows, columns, values in axis_matrix(volume.shape[axis], target, order):
        block = xp.asarray(values)
        if axis == 0:
            part = volume[columns]
            result[rows] = _product(block, part.reshape(len(part), -1)).reshape(-1, *volume.shape[1:])
        elif axis == 1:
            result[:, rows] = _product(block, volume[:, columns])
        else:
            result[:, :, rows] = _product(volume[:, :, columns], block.T)
    return result


def _product(left: Any, right: Any) -> Any:
    """`left @ right`, on CPUs with torch's threads: NumPy's spin while they wait, for up to 10 times the CPU time."""
    if isinstance(left, np.ndarray):
        return torch.matmul(torch.from_numpy(left), torch.from_numpy(right)).numpy()
    return left @ right


@functools.lru_cache(_CACHED_MATRICES)
def axis_matrix(size: int, target: int, order: int) -> list[tuple[slice, slice, np.ndarray]]:
    """The matrix `[target, size]` float64 that interpolates `size` samples at `target` places, edges repeated.

    Returns:
        Blocks of rows, each with the columns beyond which nothing reaches a double's last digit: a cubic spline's
        influence falls by 3.7 a sample.
    """
    from scipy import ndimage

    matrix = np.empty((target, size))
    unit = np.zeros(size)
    # skimage's way to the factor; SciPy rounds it back to `target`.
    factor = 1 / np.divide(size, target)
    for i in range(size):
        unit[i] = 1
        ndimage.zoom(unit, factor, output=matrix[:, i], order=order, mode="nearest", grid_mode=True)
        unit[i] = 0
    blocks = []
    for start in range(0, target, _ROWS_PER_BLOCK):
        rows = slice(start, min(start + _ROWS_PER_BLOCK, target))
        reached = np.flatnonzero((np.abs(matrix[rows]) > _NEGLIGIBLE).any(axis=0))
        columns = slice(int(reached[0]), int(reached[-1]) + 1)
        blocks.append((rows, columns, np.ascontiguousarray(matrix[rows, columns])))
    return blocks


def nearest_axis_of(current_spacing: Sequence[float], new_spacing: Sequence[float], **kwargs: Any) -> int | None:
    """The axis along which nnU-Net resamples a volume with thick slices separately, or None.

    Args:
        current_spacing: (D, H, W) in mm.
        new_spacing: (D, H, W) in mm.
        kwargs: Of the resampling function in nnU-Net's plans; ``force_separate_z`` and
            ``separate_z_anisotropy_threshold`` count.
    """
    from nnunetv2.preprocessing.resampling import default_resampling

    threshold = kwargs.get("separate_z_anisotropy_threshold", default_resampling.ANISO_THRESHOLD)
    separate, axis = default_resampling.determine_do_sep_z_and_axis(
        kwargs.get("force_separate_z", False), current_spacing, new_spacing, threshold
    )
    return int(axis) if separate else None


def is_replaceable(function: str, kwargs: dict[str, Any]) -> bool:
    """Whether this module computes what a plan's resampling function does."""
    known = {"is_seg", "order", "order_z", "force_separate_z", "separate_z_anisotropy_threshold"}
    return (
        function == NNUNET_RESAMPLING
        and set(kwargs) <= known
        and not kwargs.get("is_seg", False)
        and kwargs.get("order_z", 0) == 0
    )


def resampling_function(kwargs: dict[str, Any]) -> Callable[..., Any]:
    """A function with the arguments that nnU-Net's preprocessing passes: data, new shape, both spacings."""

    def resample_to(data: Any, shape: Sequence[int], current: Sequence[float], new: Sequence[float]) -> Any:
        return resample(data, shape, order=kwargs.get("order", 3), nearest_axis=nearest_axis_of(current, new, **kwargs))

    return resample_to
