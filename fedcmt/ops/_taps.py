"""Which samples an interpolated value is made of, along one axis: SciPy's numbers, to the last bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Taps:
    """`value[i] = w0[i] * source[first[i]] + w1[i] * source[second[i]]`.

    Attributes:
        first: int32  # [m]
        second: int32, the next sample, or `first` at the end of the axis  # [m]
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
    places = np.clip((np.arange(target) + 0.5) * (size / target) - 0.5, 0, size - 1)
    first = np.floor(places)
    w0 = 1 - (places - first)
    return _taps(first, w0, 1 - w0, size)


def nearest_taps(size: int, target: int) -> Taps:
    """The nearest of `size` samples at `target` places.

    Equivalent to: `scipy.ndimage.map_coordinates(source, [places], order=0, mode="nearest")`
    """
    places = np.clip((size / target) * (np.arange(target) + 0.5) - 0.5, 0, size - 1)
    first = np.minimum(np.floor(places + 0.5), size - 1)
    return _taps(first, np.ones(target), np.zeros(target), size)


def _taps(first: np.ndarray, w0: np.ndarray, w1: np.ndarray, size: int) -> Taps:
    first = first.astype(np.int32)
    return Taps(first, np.minimum(first + 1, np.int32(size - 1)), w0, w1)
