"""What changes a patch's intensities, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcmt import ops
from fedcmt.data.sampling import Draws, Size


def change_intensities(image: Tensor, draws: Draws) -> None:
    """Noise, blur, brightness, contrast, low resolution and gamma, in this order; statistics are a channel's own.

    Args:
        image: `[C, D, H, W]` float32 without gaps, changed in place.
        draws: What to do.
    """
    ops.change_intensities(
        image,
        noise=draws.noise,
        noise_seed=draws.noise_seed,
        blur=draws.blur,
        brightness=draws.brightness,
        contrast=draws.contrast,
        low_resolution=draws.low_resolution,
        gamma_inverted=draws.gamma_inverted,
        gamma=draws.gamma,
    )


def standard_noise(channels: int, size: Size, seed: int) -> Tensor:
    """The noise field that belongs to a seed, `[C, D, H, W]`: standard normal numbers."""
    field = torch.zeros(channels, *size)
    ops.change_intensities(field, noise=1.0, noise_seed=seed)
    return field
