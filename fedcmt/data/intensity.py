"""What changes a patch's intensities, in torch and in place, channel by channel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fedcmt.data.sampling import Axes, Draws, Size

_EPSILON = 1e-7


def change_intensities(image: Tensor, draws: Draws, noise: Tensor | None = None) -> None:
    """Noise, blur, brightness, contrast, low resolution and gamma, in this order; statistics are a channel's own.

    Args:
        image: `[C, D, H, W]` float32, changed in place.
        draws: What to do.
        noise: Standard normal numbers of the image's shape instead of those of ``draws.noise_seed``.
    """
    if draws.noise > 0:
        image.add_(standard_noise(image.shape, draws.noise_seed) if noise is None else noise, alpha=draws.noise)
    for channel, voxels in enumerate(image):
        if draws.blur and (sigmas := draws.blur[channel]) is not None:
            blur(voxels, sigmas)
        if draws.brightness:
            voxels.mul_(draws.brightness[channel])
        if draws.contrast:
            contrast(voxels, draws.contrast[channel])
        if draws.low_resolution and (size := draws.low_resolution[channel]) is not None:
            low_resolution(voxels, size)
        if draws.gamma_inverted:
            gamma(voxels.neg_(), draws.gamma_inverted[channel])
            voxels.neg_()
        if draws.gamma:
            gamma(voxels, draws.gamma[channel])


def standard_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal numbers, the same for the same seed whatever else is drawn."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def blur(voxels: Tensor, sigmas: Axes) -> None:
    """Gaussian filter along each axis, of 3, 5 or 7 taps, mirrored at the borders without repeating them.

    Args:
        voxels: `[D, H, W]`, changed in place.
        sigmas: Standard deviations in voxels; 0 leaves an axis as it is.
    """
    for axis, sigma in enumerate(sigmas):
        if sigma > 0 and voxels.shape[axis] > 1:
            _blur_along(voxels, axis, taps(sigma))


def taps(sigma: float) -> list[float]:
    """A normalised Gaussian of nnU-Net's length: 6 sigma + 0.5, rounded to the nearest odd number."""
    length = 6 * sigma + 0.5
    count = round(length)
    if count % 2 == 0:
        count += 1 if length >= count else -1
    weights = [math.exp(-0.5 * ((i - count // 2) / sigma) ** 2) for i in range(count)]
    return [weight / sum(weights) for weight in weights]


def _blur_along(voxels: Tensor, axis: int, weights: Sequence[float]) -> None:
    radius, extent = len(weights) // 2, voxels.shape[axis]
    padded = voxels.index_select(axis, _mirrored(extent, radius))
    torch.mul(padded.narrow(axis, radius, extent), weights[radius], out=voxels)
    for step in range(1, radius + 1):
        for start in (radius - step, radius + step):
            voxels.add_(padded.narrow(axis, start, extent), alpha=weights[radius + step])


def _mirrored(extent: int, radius: int) -> Tensor:
    """Indices from -radius to extent + radius, folded back at the first and the last voxel."""
    index = torch.arange(-radius, extent + radius).remainder(2 * (extent - 1))
    return torch.minimum(index, 2 * (extent - 1) - index)


def contrast(voxels: Tensor, factor: float) -> None:
    """Stretch about the mean, kept within the range; in place."""
    low, high = torch.aminmax(voxels)
    mean = voxels.mean()
    voxels.sub_(mean).mul_(factor).add_(mean).clamp_(low, high)


def low_resolution(voxels: Tensor, size: Size) -> None:
    """Thin to a size by taking the nearest voxels and bring back trilinearly; in place."""
    small = interpolate(voxels[None, None], size, mode="nearest-exact")
    voxels.copy_(interpolate(small, voxels.shape, mode="trilinear", align_corners=False)[0, 0])


def gamma(voxels: Tensor, exponent: float) -> None:
    """Raise the position within the range to a power, then restore mean and standard deviation; in place."""
    low, high = torch.aminmax(voxels)
    width = float(high - low)
    deviation, mean = torch.std_mean(voxels)
    voxels.sub_(low).div_(max(width, _EPSILON)).pow_(exponent)
    new_deviation, new_mean = torch.std_mean(voxels)
    # One pass for the two affine maps that follow each other: back to the range, and to the statistics.
    voxels.sub_(new_mean).mul_(width * deviation / (new_deviation * width).clamp_min(_EPSILON)).add_(mean)
