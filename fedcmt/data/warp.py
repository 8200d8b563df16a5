"""Rotated and scaled patches in torch: images trilinearly, label maps by nnU-Net's rule."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from fedcmt.data.sampling import Size
from fedcmt.data.source import OUTSIDE

_FULL = 1000.0  # nnU-Net's scores are float16 numbers up to 1000: near ties become ties
_MOST_AT_ONCE = 8  # score maps interpolated together


def warp(image: Tensor, labels: Tensor, matrix: np.ndarray, shift: np.ndarray, size: Size) -> tuple[Tensor, Tensor]:
    """Resample an image and its label map at ``q = A o + t``, o the voxels of the patch.

    A voxel's label is the one with the largest sum of trilinear weights; ties go to the nearest voxel's label where it
    is among the tied ones, else to the smallest (batchgeneratorsv2's ``SpatialTransform``).

    Args:
        image: `[C, d, h, w]` float32, 0 outside.
        labels: `[d, h, w]` int16, -1 outside.
        matrix: A `[3, 3]`.
        shift: t `[3]`, in voxels of the image.
        size: `(D, H, W)` of the patch.

    Returns:
        Image `[C, D, H, W]` and labels `[D, H, W]`.
    """
    within_slices = size[0] == image.shape[1] and np.array_equal(matrix[0], (1, 0, 0)) and shift[0] == 0
    if within_slices:  # each slice is a channel of a two-dimensional image
        grid = _grid(matrix[1:, 1:], shift[1:], image.shape[2:], size[1:])
        flat = _sample(image.reshape(-1, *image.shape[2:]), grid, "bilinear")
        return flat.reshape(image.shape[0], *size), _warp_labels(labels, grid)
    grid = _grid(matrix, shift, image.shape[1:], size)
    return _sample(image, grid, "bilinear"), _warp_labels(labels[None], grid)[0]


def _grid(matrix: np.ndarray, shift: np.ndarray, extent: Size | torch.Size, size: Size | tuple[int, int]) -> Tensor:
    """Points as ``grid_sample`` wants them: last axis first, -1 and 1 at the borders of the image's outer voxels."""
    dimensions = len(size)
    grid = torch.empty((*size, dimensions))
    for axis in range(dimensions):
        scale = 2.0 / extent[axis]
        point = torch.tensor((float(shift[axis]) + 0.5) * scale - 1.0, dtype=torch.float64)
        for other in range(dimensions):
            steps = torch.arange(size[other], dtype=torch.float64) * float(matrix[axis, other] * scale)
            point = point + steps.reshape([-1 if other == d else 1 for d in range(dimensions)])
        grid[..., dimensions - 1 - axis] = point
    return grid


def _sample(channels: Tensor, grid: Tensor, mode: str) -> Tensor:
    return grid_sample(channels[None], grid[None], mode=mode, padding_mode="zeros", align_corners=False)[0]


def _warp_labels(labels: Tensor, grid: Tensor) -> Tensor:
    """Label maps `[n, ...]` int16 -> `[n, ...]`, all at the same points."""
    present = torch.unique(labels).tolist()
    if bool((grid.abs() > 1 - 1 / min(labels.shape[1:])).any()) and OUTSIDE not in present:
        present.insert(0, OUTSIDE)
    if len(present) == 1:
        return torch.full((len(labels), *grid.shape[:-1]), present[0], dtype=labels.dtype)
    nearest = (_sample(labels.float() - OUTSIDE, grid, "nearest") + OUTSIDE).to(labels.dtype)
    best = torch.full(nearest.shape, -torch.inf, dtype=torch.float16)
    winner, own = torch.empty_like(nearest), torch.full_like(best, -torch.inf)
    for start in range(0, len(present), _MOST_AT_ONCE):
        group = present[start : start + _MOST_AT_ONCE]
        # Sampled less the value outside, which is then added: as if the map went on for ever with label -1.
        maps = torch.stack([(labels == label).float() - float(label == OUTSIDE) for label in group]) * _FULL
        scores = _sample(maps.flatten(0, 1), grid, "bilinear").unflatten(0, (len(group), -1))
        for label, score in zip(group, scores, strict=True):
            score = (score + _FULL * float(label == OUTSIDE)).half()
            winner[score > best] = label
            best = torch.maximum(best, score)
            own = torch.where(nearest == label, score, own)
    return torch.where(own == best, nearest, winner)
