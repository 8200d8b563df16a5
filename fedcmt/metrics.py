"""Scores of one case: overlap and surface distance per class, and the scores of a classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage
from sklearn.metrics import roc_auc_score


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Dice overlap of two masks of the same shape, ``2 TP / (2 TP + FP + FN)``.

    Returns:
        NaN where both are empty (nnU-Net's convention: the case says nothing about the class), 0 where only one is.
    """
    prediction, truth = _masks(prediction, truth)
    total = int(prediction.sum()) + int(truth.sum())
    return 2 * int((prediction & truth).sum()) / total if total else float("nan")


def surface_distances_mm(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> tuple[float, float]:
    """Mean and 95th percentile of the symmetric surface distance between two masks ``[D, H, W]``.

    Surface voxels are mask voxels with a face neighbour outside the mask or at the edge of the grid; of each, the
    distance to the nearest one of the other mask counts. The mean (ASSD) is over both surfaces together, HD95 the
    larger one of the two surfaces' 95th percentiles.

    Args:
        prediction: mask.
        truth: mask.
        spacing: voxel size in mm along (D, H, W).

    Returns:
        ASSD and HD95 in mm; NaN where a mask is empty.
    """
    prediction, truth = _masks(prediction, truth)
    if not prediction.any() or not truth.any():
        return float("nan"), float("nan")
    # A surface voxel's distance depends on the two masks only, so the box around both is enough.
    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[0]
    surfaces = [_surface(mask[box]) for mask in (prediction, truth)]
    to_surface = [ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces]
    distances = to_surface[1][surfaces[0]], to_surface[0][surfaces[1]]
    return float(np.concatenate(distances).mean()), float(max(np.percentile(one, 95) for one in distances))


def surface_distance_mm(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> float:
    """The mean of :func:`surface_distances_mm`."""
    return surface_distances_mm(prediction, truth, spacing)[0]


def segmentation_scores(
    prediction: np.ndarray,
    truth: np.ndarray,
    labels: Mapping[str, int | Sequence[int]],
    ignore_label: int | None,
    spacing: Sequence[float],
) -> dict[str, dict[str, float]]:
    """Scores a label map against the truth, class by class.

    Args:
        prediction: label map ``[D, H, W]``.
        truth: label map ``[D, H, W]``; voxels of ``ignore_label`` are left out on both sides.
        labels: name to label or to the labels of a region (scored as their union); "background" and the ignore
            label are not scored.
        ignore_label: label whose voxels do not count, or None.
        spacing: voxel size in mm along (D, H, W).

    Returns:
        By class name: ``Dice``, ``n_pred``, ``n_ref``, ``TP``, ``FP``, ``FN`` (voxels) and ``surface_distance_mm``.

    Raises:
        ValueError: the shapes differ.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape:
        raise ValueError(f"`prediction` should have the shape of `truth`, {truth.shape}. Found {prediction.shape}.")
    counted = np.ones(truth.shape, bool) if ignore_label is None else truth != ignore_label
    scores = {}
    for name, label in labels.items():
        values = [label] if isinstance(label, (int, np.integer)) else list(label)
        if name == "background" or values == [ignore_label]:
            continue
        predicted = np.isin(prediction, values) & counted
        reference = np.isin(truth, values) & counted
        true_positives = int((predicted & reference).sum())
        num_predicted, num_reference = int(predicted.sum()), int(reference.sum())
        scores[name] = {
            "Dice": dice(predicted, reference),
            "n_pred": num_predicted,
            "n_ref": num_reference,
            "TP": true_positives,
            "FP": num_predicted - true_positives,
            "FN": num_reference - true_positives,
            "surface_distance_mm": surface_distance_mm(predicted, reference, spacing),
        }
    return scores


def classification_scores(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Scores the class probabilities of several cases.

    Args:
        probabilities: ``[n, K]``, K >= 2.
        truth: class ids ``[n]``.

    Returns:
        ``accuracy``; ``balanced_accuracy``, the mean recall of the classes that occur in the truth; ``auroc``, of
        class 1 for two classes and the mean of one class against the rest for more, NaN unless every class occurs.
        All are NaN without cases.

    Raises:
        ValueError: wrong shapes, probabilities that are not finite, or class ids outside 0..K-1.
    """
    probabilities, truth = np.asarray(probabilities, np.float64), np.asarray(truth)
    if probabilities.ndim != 2 or probabilities.shape[1] < 2 or truth.shape != probabilities.shape[:1]:
        raise ValueError(
            f"`probabilities` should be [n, K >= 2] and `truth` [n]. Found {probabilities.shape} and {truth.shape}."
        )
    if not np.isfinite(probabilities).all():
        raise ValueError("`probabilities` should be finite. Found NaN or Inf.")
    num_classes = probabilities.shape[1]
    if not np.isin(truth, range(num_classes)).all():
        raise ValueError(f"`truth` should hold class ids 0..{num_classes - 1}. Found {np.unique(truth).tolist()}.")
    if truth.size == 0:
        return dict.fromkeys(("accuracy", "balanced_accuracy", "auroc"), float("nan"))
    correct = probabilities.argmax(axis=1) == truth
    return {
        "accuracy": float(correct.mean()),
        "balanced_accuracy": float(np.mean([correct[truth == present].mean() for present in np.unique(truth)])),
        "auroc": _auroc(probabilities, truth),
    }


def _auroc(probabilities: np.ndarray, truth: np.ndarray) -> float:
    num_classes = probabilities.shape[1]
    if np.unique(truth).size < num_classes:
        return float("nan")
    # One class against the rest by hand: scikit-learn's own insists on rows that sum to exactly 1.
    scored = [1] if num_classes == 2 else range(num_classes)
    return float(np.mean([roc_auc_score(truth == class_id, probabilities[:, class_id]) for class_id in scored]))


def _masks(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    prediction, truth = np.asarray(prediction, bool), np.asarray(truth, bool)
    if prediction.shape != truth.shape:
        raise ValueError(f"`prediction` should have the shape of `truth`, {truth.shape}. Found {prediction.shape}.")
    return prediction, truth


def _surface(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask)
