"""Prediction by tiles: a network over a volume larger than its patch, added up as nnU-Net adds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]
OnTile = Callable[[int, int], None]


@dataclass(frozen=True)
class Logits:
    """Weighted logits of a volume, and the weights they are still to be divided by.

    Attributes:
        sums: float16  # [K, D, H, W]
        weights: float16, or None where the sums are divided already  # [D, H, W]
    """

    sums: Tensor
    weights: Tensor | None

    def divided(self) -> Tensor:
        """The logits, float16 `[K, D, H, W]`."""
        return self.sums if self.weights is None else torch.div(self.sums, self.weights)


@dataclass(frozen=True)
class Tiling:
    """How a volume is covered.

    Attributes:
        patch_size: Of the network, `[3]`, or `[2]` for one that sees single slices.
        step_size: Distance of tiles, in patches.
        mirror_axes: Spatial axes of a patch over whose mirror images predictions are averaged.
    """

    patch_size: tuple[int, ...]
    step_size: float
    mirror_axes: tuple[int, ...]


@torch.inference_mode()
def predict_tiles(
    network: Network, image: Tensor, num_heads: int, tiling: Tiling, device: torch.device, on_tile: OnTile | None = None
) -> Logits:
    """Logits of a preprocessed volume.

    Every rounding is that of nnU-Net's ``nnUNetPredictor``: sums are kept in half precision, patches are weighted by
    a Gaussian of 10 at its centre.

    Args:
        network: Batch `[1, C, ...]` -> logits `[1, K, ...]`.
        image: `[C, D, H, W]` float32.
        num_heads: K.
        tiling: Size, distance and mirroring of tiles.
        device: Where network and sums are.
        on_tile: Called after every tile with its number, from 1, and how many there are.

    Returns:
        Logits on the CPU, on the image's grid.
    """
    from acvl_utils.cropping_and_padding.padding import pad_nd_image
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian

    padded, unpad = pad_nd_image(image, tiling.patch_size, "constant", {"value": 0}, True, None)
    padded = padded.to(device)
    sums = torch.zeros((num_heads, *padded.shape[1:]), dtype=torch.half, device=device)
    weights = torch.zeros(padded.shape[1:], dtype=torch.half, device=device)
    gaussian = compute_gaussian(tuple(tiling.patch_size), sigma_scale=1.0 / 8, value_scaling_factor=10, device=device)
    tiles = tile_positions(tuple(padded.shape[1:]), tiling)
    with torch.autocast("cuda") if device.type == "cuda" else nullcontext():
        for number, tile in enumerate(tiles, start=1):
            patch = padded[tile][None].contiguous()
            logits = _mirrored(network, patch, tiling.mirror_axes)[0]
            logits *= gaussian
            sums[tile] += logits
            weights[tile[1:]] += gaussian
            if on_tile is not None:
                on_tile(number, len(tiles))
    return Logits(sums[(slice(None), *unpad[1:])].cpu(), weights[tuple(unpad[1:])].cpu())


def tile_positions(shape: Sequence[int], tiling: Tiling) -> list[tuple[slice | int, ...]]:
    """Index of every tile in an array `[C, D, H, W]`; a network of slices has tiles in every slice."""
    from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

    patch = tiling.patch_size
    steps = compute_steps_for_sliding_window(tuple(shape[-len(patch) :]), patch, tiling.step_size)
    slices = [
        tuple(slice(start, start + size) for start, size in zip(corner, patch, strict=True))
        for corner in itertools.product(*steps)
    ]
    if len(patch) == len(shape):
        return [(slice(None), *tile) for tile in slices]
    return [(slice(None), index, *tile) for index in range(shape[0]) for tile in slices]


def sample_tiles(image: Tensor, tiling: Tiling, count: int) -> list[Tensor]:
    """Some tiles of a volume `[C, D, H, W]` from its middle outwards, each `[1, C, ...]`."""
    from acvl_utils.cropping_and_padding.padding import pad_nd_image

    padded = pad_nd_image(image, tiling.patch_size, "constant", {"value": 0})
    tiles = tile_positions(tuple(padded.shape[1:]), tiling)
    middle = sorted(range(len(tiles)), key=lambda index: abs(index - len(tiles) // 2))[:count]
    return [padded[tiles[index]][None].contiguous() for index in middle]


def _mirrored(network: Network, patch: Tensor, axes: Sequence[int]) -> Tensor:
    """The mean over all mirror images, in nnU-Net's order of sums."""
    logits = network(patch)
    spatial = [axis + 2 for axis in axes]
    flips = [flip for count in range(len(axes)) for flip in itertools.combinations(spatial, count + 1)]
    for flip in flips:
        logits += torch.flip(network(torch.flip(patch, flip)), flip)
    if flips:
        logits /= len(flips) + 1
    return logits
