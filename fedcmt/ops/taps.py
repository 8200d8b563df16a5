"""Which samples an interpolated value is made of, along one axis: SciPy's numbers, to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Taps:
    """`value[i] = w0[i] * source[first[i]] + w1[i] * source[second[i]]`.

    Attributes:
        first: int32  # [m]
        second: int32, the next sample, at the edges the same  # [m]
        w0: float64  # [m]
        w1: float64  # [m]
    """

    first: np.ndarray
    second: np.ndarray
    w0: np.ndarray
    w1: np.ndarray


def axis_taps(size: int, target: int) -> Taps:
    """Linear interpolation of `size` samples at `target` places, edges repeated.

    Equivalent to: `scipy.ndimage.zoom(source, target / size, order=1, mode="nearest", grid_mode=True)`
    """
    places = (np.arange(target) + 0.5) * (size / target) - 0.5
    first = np.floor(places)
    w0 = 1 - (places - first)
    # Beyond the edges SciPy takes the edge's sample twice, with both weights.
    return _taps(first, w0, 1 - w0, size)


def nearest_taps(size: int, target: int) -> Taps:
    """The nearest of `size` samples at `target` places.

    Equivalent to: `scipy.ndimage.map_coordinates(source, [places], order=0, mode="nearest")`
    """
    places = np.clip((size / target) * (np.arange(target) + 0.5) - 0.5, 0, size - 1)
    first = np.minimum(np.floor(places + 0.5), size - 1)
    return _taps(first, np.ones(target), np.zeros(target), size)


def _taps(first: np.ndarray, w0: np.ndarray, w1: np.ndarray, size: int) -> Taps:
    indices = [np.clip(index, 0, size - 1).astype(np.int32) for index in (first, first + 1)]
    return Taps(indices[0], indices[1], w0, w1)


def all_taps(shape: Sequence[int], target: Sequence[int], nearest_axis: int | None) -> list[Taps]:
    """Taps of the three axes, linear but for one that takes the nearest."""
    return [(nearest_taps if axis == nearest_axis else axis_taps)(shape[axis], int(target[axis])) for axis in range(3)]


def interpolated_slice(source: np.ndarray, index: int, taps: Sequence[Taps]) -> np.ndarray:
    """One slice along the first axis, linearly interpolated along all three.

    The corners come one after the other, and so do each one's weights: the order of SciPy's sums, for equal roundings.

    Args:
        source: Any floating point  # [..., D, H, W]
        index: Of the slice, 0..D'-1.
        taps: Of D, H and W.

    Returns:
        float64  # [..., H', W']
    """
    tz, ty, tx = taps
    sums: Any = 0.0
    for plane, wz in ((tz.first[index], tz.w0[index]), (tz.second[index], tz.w1[index])):
        if wz == 0:
            continue
        weighted = source[..., plane, :, :].astype(np.float64) * wz
        for rows, wy in ((ty.first, ty.w0), (ty.second, ty.w1)):
            scaled = weighted[..., rows, :] * wy[:, None]
            sums = sums + scaled[..., tx.first] * tx.w0
            sums += scaled[..., tx.second] * tx.w1
    return sums
