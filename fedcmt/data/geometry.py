"""Where a warped patch comes from: matrix, part of the case to read, points to sample.

Coordinates are voxel indices along D, H, W. A voxel ``o`` of the patch (size F) is sampled from the region (size I) at

    q = A (o - (F - 1) / 2) + (I - 1) / 2,    A = Rz Ry Rx S    (nnU-Net's ``create_affine_matrix_3d``)

with Rx, Ry, Rz the rotations about D, H, W and S the scales, trilinearly. Outside the region the image is 0 and the
label -1, and the case reaches as far as the region even where a smaller part of it is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedcmt.data.sampling import Axes, Draws, PatchRules, Size


@dataclass(frozen=True)
class Reading:
    """The part of a case that a patch needs, and how the patch lies in it.

    Attributes:
        corner: In the case; may lie outside, where the case is padded.
        size: Of the part.
        affine: A and t with ``q = A o + t`` in voxels of the part, for :func:`fedcmt.ops.warp_patch`; `[3, 4]` float64.
            None where the part is the patch.
    """

    corner: Size
    size: Size
    affine: np.ndarray | None = None


def reading(draws: Draws, rules: PatchRules) -> Reading:
    """The least that has to be read: the patch itself, or the box around the warp's points within the region."""
    initial, final = np.asarray(rules.initial_size), np.asarray(rules.patch_size)
    if not draws.warped:
        return Reading(_size(np.asarray(draws.corner) + initial // 2 - final // 2), rules.patch_size)
    matrix = turned(draws.angles or (0.0, 0.0, 0.0), draws.scales or (1.0, 1.0, 1.0))
    centre = (initial - 1) / 2
    reach = np.abs(matrix) @ ((final - 1) / 2) + 1e-4  # the last for rounding to float32
    low = np.clip(np.floor(centre - reach).astype(int), 0, initial - 1)
    high = np.clip(np.floor(centre + reach).astype(int) + 2, low + 1, initial)
    shift = centre - matrix @ ((final - 1) / 2) - low
    return Reading(
        _size(np.asarray(draws.corner) + low), _size(high - low), np.concatenate([matrix, shift[:, None]], axis=1)
    )


def turned(angles: Axes, scales: Axes) -> np.ndarray:
    """A `[3, 3]` float64 from angles in radians about D, H, W and scales along them."""
    (sx, sy, sz), (cx, cy, cz) = np.sin(angles), np.cos(angles)
    about_d = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_h = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_w = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_w @ about_h @ about_d @ np.diag(scales)


def _size(values: np.ndarray) -> Size:
    depth, height, width = (int(value) for value in values)
    return depth, height, width
