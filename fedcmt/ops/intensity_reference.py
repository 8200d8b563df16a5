"""The definition of `change_intensities` in plain torch, for `fedcmt.ops.reference`; float64 images work as well."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

_EPSILON = 1e-7
_NOISE_BLOCK, _NOISE_LANES = 64, 16  # as in csrc/patch.h
_MASK = np.uint64(0xFFFFFFFF)


def change_intensities(
    image: Tensor,
    *,
    noise: float = 0.0,
    noise_seed: int = 0,
    blur: Sequence[Sequence[float] | None] = (),
    brightness: Sequence[float] = (),
    contrast: Sequence[float] = (),
    low_resolution: Sequence[Sequence[int] | None] = (),
    gamma_inverted: Sequence[float] = (),
    gamma: Sequence[float] = (),
    mirrored_axes: Sequence[int] = (),
) -> None:
    """One change after the other, channel by channel."""
    for c, x in enumerate(image):
        if noise > 0:
            normal = torch.from_numpy(standard_noise(x.numel(), noise_seed, c)).to(x)
            x.add_(normal.reshape(x.shape), alpha=noise)
        if blur and (sigmas := blur[c]) is not None:
            for axis, sigma in enumerate(sigmas):
                if sigma > 0:
                    x.copy_(_filtered(x, axis, gaussian_taps(sigma)))
        if brightness:
            x.mul_(brightness[c])
        if contrast and contrast[c] != 1:
            low, high, mean = x.min(), x.max(), x.mean()
            x.sub_(mean).mul_(contrast[c]).add_(mean).clamp_(low, high)
        if low_resolution and (size := low_resolution[c]) is not None:
            x.copy_(_thinned(x.flip(tuple(mirrored_axes)), size).flip(tuple(mirrored_axes)))
        if gamma_inverted:
            x.copy_(-_raised(-x, gamma_inverted[c]))
        if gamma:
            x.copy_(_raised(x, gamma[c]))


def gaussian_taps(sigma: float) -> list[float]:
    """A normalised Gaussian of 6 sigma + 0.5 taps, rounded to the nearest odd number; batchgeneratorsv2's."""
    length = 6 * sigma + 0.5
    count = round(length)
    if count % 2 == 0:
        count += 1 if length >= count else -1
    weights = [math.exp(-0.5 * ((k - count // 2) / sigma) ** 2) for k in range(count)]
    return [weight / sum(weights) for weight in weights]


def standard_noise(count: int, seed: int, channel: int) -> np.ndarray:
    """Normal numbers, float64: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller, in the order of csrc/patch.h."""
    blocks = -(-count // _NOISE_BLOCK)
    words = _philox(np.arange(blocks * _NOISE_LANES, dtype=np.uint64), channel, seed)
    uniform = [(word >> np.uint64(8)).astype(np.float64) * 2.0**-24 for word in words]
    normal = []
    for radius, angle in (uniform[:2], uniform[2:]):
        length = np.sqrt(-2 * np.log(radius + 2.0**-24))
        normal += [length * np.cos(2 * np.pi * angle), length * np.sin(2 * np.pi * angle)]
    ordered = np.stack(normal).reshape(4, blocks, _NOISE_LANES).transpose(1, 0, 2)
    return ordered.reshape(-1)[:count]


def _philox(index: np.ndarray, channel: int, seed: int) -> list[np.ndarray]:
    """The four words of the counters (index, 0, channel, 0)."""
    zeros = np.zeros_like(index)
    words = [index, zeros, zeros + np.uint64(channel), zeros]
    keys = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            (second >> np.uint64(32)) ^ words[1] ^ np.uint64(keys[0]),
            second & _MASK,
            (first >> np.uint64(32)) ^ words[3] ^ np.uint64(keys[1]),
            first & _MASK,
        ]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return words


def _filtered(x: Tensor, axis: int, taps: Sequence[float]) -> Tensor:
    """Borders fold back without repeating the outer voxel, as often as the filter is long."""
    radius, size = len(taps) // 2, x.shape[axis]
    period = max(2 * (size - 1), 1)
    places = torch.arange(-radius, size + radius, device=x.device) % period
    folded = x.index_select(axis, torch.minimum(places, period - places) if size > 1 else places)
    return torch.stack([folded.narrow(axis, k, size) * tap for k, tap in enumerate(taps)]).sum(0)


def _thinned(x: Tensor, size: Sequence[int]) -> Tensor:
    small = x
    for axis, (n, kept) in enumerate(zip(x.shape, size, strict=True)):
        small = small.index_select(axis, _nearest_exact(n, kept).to(x.device))
    small = small[None, None]
    return interpolate(small, x.shape, mode="trilinear", align_corners=False)[0, 0]


def _nearest_exact(size: int, kept: int) -> Tensor:
    """The voxels of `interpolate(..., mode="nearest-exact")`, whose places are float32."""
    places = (torch.arange(kept) + 0.5) * float(np.float32(size) / np.float32(kept))
    return places.long().clamp_max(size - 1)


def _raised(x: Tensor, exponent: float) -> Tensor:
    low, width, mean, deviation = x.min(), x.max() - x.min(), x.mean(), x.std()
    raised = ((x - low) / width.clamp_min(_EPSILON)) ** exponent * width + low
    return (raised - raised.mean()) * (deviation / raised.std().clamp_min(_EPSILON)) + mean
