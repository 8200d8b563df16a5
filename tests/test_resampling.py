"""Resampling by matrix products against nnU-Net's own."""

from __future__ import annotations

import numpy as np
import pytest
from nnunetv2.preprocessing.resampling.default_resampling import (
    resample_data_or_seg,
    resample_data_or_seg_to_shape,
)

from fedcmt.resampling import is_replaceable, resample, resample_linear, resampling_function

GRIDS = [
    ((9, 10, 12), (13, 15, 18), None),
    ((60, 50, 40), (75, 43, 51), None),
    ((9, 12, 12), (6, 18, 24), 0),
    ((12, 9, 12), (18, 14, 12), 1),
    ((12, 9, 13), (18, 14, 18), 2),
    ((9, 12, 12), (14, 12, 12), 0),
    ((1, 12, 12), (1, 18, 18), None),
    ((1, 5, 2), (1, 8, 3), 0),
    ((150, 3, 4), (141, 5, 4), None),
]


def stock(data: np.ndarray, target: tuple[int, ...], axis: int | None, order: int) -> np.ndarray:
    """nnU-Net's."""
    return resample_data_or_seg(data, np.array(target), False, axis, order, axis is not None, order_z=0)


@pytest.mark.parametrize(("source", "target", "axis"), GRIDS)
def test_cubic_voxels_equal_nnunets(source: tuple[int, ...], target: tuple[int, ...], axis: int | None) -> None:
    data = np.random.default_rng(0).normal(0, 1, (2, *source)).astype(np.float32)
    ours, theirs = resample(data, target, nearest_axis=axis), stock(data, target, axis, 3)
    assert ours.dtype == theirs.dtype == np.float32
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(("source", "target", "axis"), GRIDS)
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_linear_voxels_equal_nnunets_in_double_precision(
    source: tuple[int, ...], target: tuple[int, ...], axis: int | None, dtype: type
) -> None:
    data = np.random.default_rng(1).normal(0, 1, (2, *source)).astype(dtype)
    ours, theirs = resample_linear(data, target, nearest_axis=axis), stock(data, target, axis, 1)
    assert ours.dtype == theirs.dtype == dtype
    if dtype is np.float64:  # skimage clips the last bit away where all corners are one value
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-15)
    else:
        assert np.array_equal(ours, theirs)


def test_values_stay_within_the_range_of_the_volume_or_slice() -> None:
    data = np.zeros((1, 6, 9, 9), np.float32)
    data[0, 2:4, 3:6, 3:6] = 1
    for axis in (None, 0):
        enlarged = resample(data, (12, 31, 31), nearest_axis=axis)
        assert (enlarged.min(), enlarged.max()) == (0, 1)


def test_the_same_grid_is_the_same_array() -> None:
    data = np.ones((1, 3, 4, 5), np.float32)
    assert resample(data, (3, 4, 5)) is data
    assert resample_linear(data, (3, 4, 5)) is data


@pytest.mark.parametrize(
    ("current", "new"),
    [((2, 1, 1), (1, 1, 1)), ((5, 1, 1), (3, 1.2, 1.2)), ((1, 1, 1), (1, 1, 6)), ((5, 5, 1), (2, 2, 1))],
)
@pytest.mark.parametrize("force", [None, False, True])
def test_the_plans_function_chooses_the_axis_as_nnunet_does(
    current: tuple[float, ...], new: tuple[float, ...], force: bool | None
) -> None:
    kwargs = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": force}
    data = np.random.default_rng(2).normal(0, 1, (1, 8, 9, 10)).astype(np.float32)
    target = np.array([round(i / j * k) for i, j, k in zip(current, new, data.shape[1:], strict=True)])
    theirs = resample_data_or_seg_to_shape(data, target, current, new, **kwargs)
    assert np.array_equal(resampling_function(kwargs)(data, target, current, new), theirs)


def test_other_functions_of_a_plan_are_left_to_nnunet() -> None:
    name, kwargs = "resample_data_or_seg_to_shape", {"is_seg": False, "order": 3, "order_z": 0}
    assert is_replaceable(name, kwargs)
    assert not is_replaceable("resample_torch_fornnunet", kwargs)
    assert not is_replaceable(name, kwargs | {"order_z": 1})
    assert not is_replaceable(name, kwargs | {"is_seg": True})
    assert not is_replaceable(name, kwargs | {"new_option": 1})
