"""batchgeneratorsv2's transforms with given parameters instead of drawn ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from batchgeneratorsv2.transforms.spatial.spatial import (
    SpatialTransform,
    _convert_my_grid_to_grid_sample_grid,
)
from torch import Tensor


def stock_warp(
    image: Tensor, labels: Tensor, matrix: np.ndarray | None, shape: Sequence[int], *, label_fill: int = -1
) -> tuple[Tensor, Tensor]:
    """SpatialTransform as nnU-Net 2.8.1 configures it; 2D images are `[C, H, W]`."""
    transform = SpatialTransform(
        tuple(shape), 0, random_crop=False, border_mode_seg="constant", padding_value_seg=label_fill
    )
    source = image.shape[1:]
    grid = None
    if matrix is not None:
        turned = torch.matmul(transform._get_base_grid_clone(), torch.from_numpy(matrix.T).float())
        grid = _convert_my_grid_to_grid_sample_grid(turned, source)
    parameters = {"grid": grid, "center_location_in_pixels": [n / 2 for n in source]}
    return (
        transform._apply_to_image(image, **parameters),
        transform._apply_to_segmentation(labels, **parameters),
    )
