"""Scores against values worked out by hand, and against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmt.metrics import classification_scores, dice, segmentation_scores, surface_distance_mm

SPACING = (3.0, 1.0, 0.5)


def box(*corner: int, size: int = 2) -> np.ndarray:
    mask = np.zeros((8, 8, 8), bool)
    mask[tuple(slice(start, start + size) for start in corner)] = True
    return mask


def test_dice_by_hand() -> None:
    empty = np.zeros((8, 8, 8), bool)
    assert dice(box(1, 1, 1), box(1, 1, 1)) == 1
    assert dice(box(1, 1, 1), box(2, 1, 1)) == 0.5  # 8 voxels each, 4 shared
    assert dice(box(1, 1, 1), box(2, 2, 2)) == 2 * 1 / 16
    assert dice(box(1, 1, 1), empty) == 0
    assert dice(empty, box(1, 1, 1)) == 0
    assert np.isnan(dice(empty, empty))
    with pytest.raises(ValueError, match="shape"):
        dice(empty, empty[1:])


@pytest.mark.parametrize(("axis", "expected"), [(0, 3.0), (1, 1.0), (2, 0.5)])
def test_surface_distance_between_single_voxels_is_the_spacing(axis: int, expected: float) -> None:
    corner = [3, 3, 3]
    corner[axis] += 1
    assert surface_distance_mm(box(3, 3, 3, size=1), box(*corner, size=1), SPACING) == expected


def test_surface_distance_by_hand() -> None:
    # Every voxel of a 2x2x2 box is surface. Shifted by one along W: half of each coincides, half is 0.5 mm away.
    assert surface_distance_mm(box(1, 1, 1), box(1, 1, 2), SPACING) == 0.25
    # A single voxel in the middle of a 3x3x3 box, unit spacing: 26 surface voxels at 1 (6), sqrt 2 (12), sqrt 3 (8);
    # from the centre to the surface 1.
    centre, cube = box(3, 3, 3, size=1), box(2, 2, 2, size=3)
    expected = (6 + 12 * np.sqrt(2) + 8 * np.sqrt(3) + 1) / 27
    assert surface_distance_mm(centre, cube, (1, 1, 1)) == pytest.approx(expected)
    assert np.isnan(surface_distance_mm(centre, np.zeros_like(centre), (1, 1, 1)))


@given(st.integers(0, 2**31), st.floats(0.1, 0.9))
@settings(max_examples=30, deadline=None)
def test_surface_distance_equals_brute_force(seed: int, density: float) -> None:
    generator = np.random.default_rng(seed)
    masks = [generator.random((5, 6, 4)) < density for _ in range(2)]
    if not all(mask.any() for mask in masks):
        return
    surfaces = []
    for mask in masks:
        padded = np.pad(mask, 1)
        inner = [np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1] for axis in range(3) for step in (-1, 1)]
        surfaces.append(np.argwhere(mask & ~np.logical_and.reduce(inner)) * SPACING)
    between = np.linalg.norm(surfaces[0][:, None] - surfaces[1][None], axis=-1)
    expected = np.concatenate([between.min(0), between.min(1)]).mean()
    assert surface_distance_mm(*masks, SPACING) == pytest.approx(expected)
    assert surface_distance_mm(*masks[::-1], SPACING) == pytest.approx(expected)


def test_segmentation_scores_with_regions_and_ignore() -> None:
    truth = np.zeros((1, 2, 4), int)
    truth[0, 0] = [1, 1, 2, 3]
    truth[0, 1] = [0, 0, 2, 3]
    prediction = np.zeros_like(truth)
    prediction[0, 0] = [1, 2, 2, 2]
    prediction[0, 1] = [1, 0, 0, 1]
    labels = {"background": 0, "whole": (1, 2), "core": 2, "ignore": 3}
    scores = segmentation_scores(prediction, truth, labels, 3, (1, 1, 1))
    assert list(scores) == ["whole", "core"]
    counts = {name: [scores[name][key] for key in ("n_pred", "n_ref", "TP", "FP", "FN")] for name in scores}
    assert counts == {"whole": [4, 4, 3, 1, 1], "core": [2, 2, 1, 1, 1]}
    assert scores["whole"]["Dice"] == 0.75
    assert scores["core"]["Dice"] == 0.5
    # core: predicted (0,1), (0,2); true (0,2), (1,2): distances 1 (to (0,2)), 0, 0, 1
    assert scores["core"]["surface_distance_mm"] == 0.5
    without = segmentation_scores(prediction, truth, {"background": 0, "core": 2}, None, (1, 1, 1))
    assert without["core"]["FP"] == 2


def test_absent_classes_are_nan_not_zero() -> None:
    nothing = np.zeros((2, 2, 2), int)
    scores = segmentation_scores(nothing, nothing, {"background": 0, "liver": 1}, None, (1, 1, 1))["liver"]
    assert np.isnan(scores["Dice"])
    assert np.isnan(scores["surface_distance_mm"])
    assert scores["n_ref"] == 0
    with pytest.raises(ValueError, match="shape"):
        segmentation_scores(nothing, nothing[1:], {"liver": 1}, None, (1, 1, 1))


def test_binary_classification_by_hand() -> None:
    positive = np.array([0.1, 0.4, 0.35, 0.8])
    scores = classification_scores(np.stack([1 - positive, positive], 1), np.array([0, 0, 1, 1]))
    assert scores == {"accuracy": 0.75, "balanced_accuracy": 0.75, "auroc": 0.75}
    scores = classification_scores(np.stack([1 - positive, positive], 1), np.array([0, 0, 0, 1]))
    assert scores == {"accuracy": 1, "balanced_accuracy": 1, "auroc": 1}


def test_classification_of_three_classes() -> None:
    probabilities = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]])
    scores = classification_scores(probabilities, np.array([0, 1, 1, 2]))
    assert scores["accuracy"] == 0.75
    assert scores["balanced_accuracy"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert scores["auroc"] == 1  # each class is ranked above the rest in its own column


def test_classification_with_too_few_cases() -> None:
    one_class = classification_scores(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0]))
    assert (one_class["accuracy"], one_class["balanced_accuracy"]) == (0.5, 0.5)
    assert np.isnan(one_class["auroc"])
    assert all(np.isnan(value) for value in classification_scores(np.zeros((0, 2)), np.zeros(0, int)).values())


@pytest.mark.parametrize(
    ("probabilities", "truth"),
    [
        ([[0.5, 0.5]], [0, 1]),
        ([0.5, 0.5], [0]),
        ([[1.0]], [0]),
        ([[np.nan, 1]], [0]),
        ([[0.5, 0.5]], [2]),
        ([[0.5, 0.5]], [-1]),
    ],
)
def test_classification_refuses_what_it_cannot_score(probabilities: list, truth: list) -> None:
    with pytest.raises(ValueError, match="`"):
        classification_scores(np.array(probabilities), np.array(truth))
