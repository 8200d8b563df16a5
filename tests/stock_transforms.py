"""batchgeneratorsv2's transforms with given parameters instead of drawn ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform, _convert_my_grid_to_grid_sample_grid
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


def stock_blur(image: Tensor, sigmas: Sequence[Sequence[float] | None]) -> Tensor:
    chosen = [s is not None for s in sigmas]
    transform = GaussianBlurTransform(1.0, benchmark=False)
    return transform._apply_to_image(
        image.clone(), apply_to_channel=torch.tensor(chosen), sigmas=[s for s in sigmas if s is not None]
    )


def stock_brightness(image: Tensor, factors: Sequence[float]) -> Tensor:
    transform = MultiplicativeBrightnessTransform(1.0, synchronize_channels=False)
    channels = torch.arange(len(image))
    return transform._apply_to_image(image.clone(), apply_to_channel=channels, multipliers=torch.tensor(factors))


def stock_contrast(image: Tensor, factors: Sequence[float]) -> Tensor:
    transform = ContrastTransform(1.0, preserve_range=True, synchronize_channels=False)
    channels = torch.arange(len(image))
    return transform._apply_to_image(image.clone(), apply_to_channel=channels, multipliers=torch.tensor(factors))


def stock_low_resolution(image: Tensor, sizes: Sequence[Sequence[int] | None]) -> Tensor:
    """Sizes become the scales that give them."""
    transform = SimulateLowResolutionTransform(1.0, False, True, ())
    channels = [c for c, size in enumerate(sizes) if size is not None]
    scales = [[n / whole for n, whole in zip(sizes[c] or (), image.shape[1:], strict=True)] for c in channels]
    return transform._apply_to_image(
        image.clone(), apply_to_channel=channels, scales=torch.tensor(scales, dtype=torch.float64)
    )


def stock_gamma(image: Tensor, exponents: Sequence[float], *, inverted: bool) -> Tensor:
    transform = GammaTransform(1.0, 0, False, 1, 1)
    count = len(image)
    return transform._apply_to_image(
        image.clone(),
        apply_to_channel=torch.arange(count),
        retain_stats=torch.ones(count),
        invert_image=torch.full((count,), inverted),
        gamma=torch.tensor(exponents),
    )
