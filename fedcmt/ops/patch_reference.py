"""The definition of the operations on training patches in plain torch, for `fedcmt.ops.reference`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

# As in csrc/patch.h: voxels that share a float64 base, and how far away coordinates may be.
_BLOCK = 16
_LIMIT = 2.0**28


def warp_patch(
    image: Tensor,
    labels: Tensor,
    affine: np.ndarray,
    shape: Sequence[int],
    *,
    label_fill: int = -1,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Eight corners a voxel, weighted in float32; of labels, the best score in half precision."""
    cells = [_locate(row, shape, image.device) for row in affine]  # along D, H, W
    offsets, inside, weights = _corners(cells, image.shape[1:])
    warped = torch.zeros(len(image), *shape, device=image.device)
    for corner, weight in enumerate(weights):
        values = image.flatten(1)[:, offsets[corner]]  # [C, D', H', W']
        warped += torch.where(inside[corner], values, 0.0) * weight
    chosen = labels.new_empty(len(labels), *shape)
    for labels_of_map, target in zip(labels, chosen, strict=True):
        corners = torch.where(inside, labels_of_map.flatten()[offsets], label_fill)  # [8, D', H', W']
        target.copy_(_decide(corners, weights, _nearest(cells)))
    if out is None:
        return warped, chosen
    return out[0].copy_(warped), out[1].copy_(chosen)


def _locate(row: np.ndarray, shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Lower neighbour (int64) and fraction (float32) of every voxel's coordinate along one axis, `[D', H', W']`."""
    z, y, x = (torch.arange(n, device=device) for n in shape)
    lane = x % _BLOCK
    start = (row[0] * z.double()[:, None] + row[1] * y.double()) + row[3]  # [D', H']
    base = (start[..., None] + (x - lane).double() * row[2]).clamp(-_LIMIT, _LIMIT)
    whole = base.floor()
    place = (base - whole).float() + lane.float() * float(np.float32(row[2]))
    cell = place.floor()
    return whole.long() + cell.long(), place - cell


def _corners(cells: Sequence[tuple[Tensor, Tensor]], source: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Offset in a map, whether inside, and weight of the corners, in the order of D, H, W; `[8, D', H', W']` each."""
    offsets, insides, weights = [], [], []
    for upper in product((0, 1), repeat=3):
        offset, inside = torch.zeros_like(cells[0][0]), torch.ones_like(cells[0][0], dtype=torch.bool)
        for (index, _), up, size in zip(cells, upper, source, strict=True):
            inside &= (index + up >= 0) & (index + up < size)
            offset = offset * size + (index + up).clamp(0, size - 1)
        d, h, w = (fraction if up else 1 - fraction for (_, fraction), up in zip(cells, upper, strict=True))
        offsets.append(offset)
        insides.append(inside)
        weights.append((w * h) * d)
    return torch.stack(offsets), torch.stack(insides), torch.stack(weights)


def _nearest(cells: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Number of the nearest corner; halves go to the even neighbour, as with nearbyint."""
    upper = [(fraction > 0.5) | ((fraction == 0.5) & (index % 2 == 1)) for index, fraction in cells]
    return upper[0] * 4 + upper[1] * 2 + upper[2] * 1


def _decide(corners: Tensor, weights: Tensor, nearest: Tensor) -> Tensor:
    """The label with the largest score: of several the nearest one if among them, else the lowest."""
    winner, largest = corners[0], _score(corners[0], corners, weights)
    for label in corners[1:]:
        score = _score(label, corners, weights)
        better = (score > largest) | ((score == largest) & (label < winner))
        winner, largest = torch.where(better, label, winner), torch.where(better, score, largest)
    close = corners.gather(0, nearest[None])[0]
    return torch.where(_score(close, corners, weights) == largest, close, winner)


def _score(label: Tensor, corners: Tensor, weights: Tensor) -> Tensor:
    score = torch.zeros_like(weights[0])
    for other, weight in zip(corners, weights, strict=True):
        score += torch.where(other == label, weight * 1000.0, 0.0)
    return score.half()
