"""nnU-Net's own augmentation with given parameters instead of drawn ones, and patches to compare it on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import (
    SpatialTransform,
    _convert_my_grid_to_grid_sample_grid,
    create_affine_matrix_2d,
    create_affine_matrix_3d,
)
from scipy import ndimage
from torch import Tensor

from fedcmt.data.sampling import Draws, PatchRules


def case(channels: int, shape: Sequence[int], labels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A smooth image with noise `[C, D, H, W]` and blobs of labels 0 to `labels` - 1, -1 at one end `[D, H, W]`."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), 2.5)
    smooth /= smooth.std()
    image = np.stack([smooth * (1 + c) + 0.1 * rng.normal(size=shape) for c in range(channels)]).astype(np.float32)
    marks = np.digitize(smooth, np.linspace(0.3, 1.8, labels - 1)).astype(np.int16)
    marks[:, :2] = -1
    return image, marks


def of_nnunet(
    image: np.ndarray, labels: np.ndarray, draws: Draws, rules: PatchRules, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """batchgeneratorsv2's transforms, in ``get_training_transforms``' order, on a region of the initial size.

    Args:
        image: `[C, d, h, w]`.
        labels: `[d, h, w]`.
        draws: Parameters.
        rules: The client's.
        noise: Standard normal numbers for the noise.

    Returns:
        Image `[C, D, H, W]` and labels `[D, H, W]`.
    """
    x, y = torch.from_numpy(image.copy()), torch.from_numpy(labels.copy())[None]
    if rules.in_plane:  # Convert3DTo2DTransform: slices are channels
        flat = spatial(x.flatten(0, 1), y.flatten(0, 1), draws, rules.patch_size[1:])
        x, y = (part.reshape(-1, *rules.patch_size) for part in flat)
    else:
        x, y = spatial(x, y, draws, rules.patch_size)
    if rules.slices:
        x, y = x[:, 0], y[:, 0]
    x = intensities(x.clone(), draws, noise if noise is None or not rules.slices else noise[:, 0], rules)
    axes = [axis - 1 if rules.slices else axis for axis in draws.mirror]
    mirrored = MirrorTransform((0, 1, 2)).apply({"image": x, "segmentation": y}, axes=axes)
    shape = rules.patch_size
    return mirrored["image"].reshape(-1, *shape), mirrored["segmentation"].reshape(shape)


def spatial(x: Tensor, y: Tensor, draws: Draws, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    transform = SpatialTransform(
        size, 0, False, p_rotation=0, bg_style_seg_sampling=False, border_mode_seg="constant", padding_value_seg=-1
    )
    parameters = {"grid": None, "center_location_in_pixels": [n / 2 for n in x.shape[1:]]}
    if draws.warped:
        angles, scales = draws.angles or (0, 0, 0), draws.scales or (1, 1, 1)
        two = len(size) == 2
        matrix = create_affine_matrix_2d(angles[0], scales[1:]) if two else create_affine_matrix_3d(angles, scales)
        grid = torch.matmul(transform._get_base_grid_clone(), torch.from_numpy(matrix.T).float())
        parameters["grid"] = _convert_my_grid_to_grid_sample_grid(grid, x.shape[1:])
    return transform._apply_to_image(x, **parameters), transform._apply_to_segmentation(y, **parameters)


def intensities(x: Tensor, draws: Draws, noise: Tensor | None, rules: PatchRules) -> Tensor:
    every = torch.arange(len(x))
    if draws.noise > 0:
        assert noise is not None
        normal_, torch.Tensor.normal_ = torch.Tensor.normal_, lambda self, mean=0, std=1: self.copy_(noise * std)
        try:
            x = GaussianNoiseTransform(0.1, 1, True)._apply_to_image(
                x, num_apply=len(x), apply_idx=every, sigmas=draws.noise
            )
        finally:
            torch.Tensor.normal_ = normal_
    if draws.blur:
        chosen = torch.tensor([sigmas is not None for sigmas in draws.blur])
        sigmas = [s[1:] if rules.slices else s for s in draws.blur if s is not None]
        x = GaussianBlurTransform(1.0)._apply_to_image(x, apply_to_channel=chosen, sigmas=sigmas)
    if draws.brightness:
        x = MultiplicativeBrightnessTransform(1, False)._apply_to_image(
            x, apply_to_channel=every, multipliers=torch.tensor(draws.brightness)
        )
    if draws.contrast:
        x = ContrastTransform(1, True, False)._apply_to_image(
            x, apply_to_channel=every, multipliers=torch.tensor(draws.contrast)
        )
    x = low_resolution(x, draws, rules)
    for exponents, inverted in ((draws.gamma_inverted, True), (draws.gamma, False)):
        if exponents:
            x = GammaTransform(1, 0, False, 1, 1)._apply_to_image(
                x,
                apply_to_channel=every,
                retain_stats=torch.ones(len(x), dtype=torch.bool),
                invert_image=torch.full((len(x),), inverted),
                gamma=torch.tensor(exponents),
            )
    return x


def low_resolution(x: Tensor, draws: Draws, rules: PatchRules) -> Tensor:
    chosen = [channel for channel, size in enumerate(draws.low_resolution) if size is not None]
    if not chosen:
        return x
    sizes = [draws.low_resolution[channel] for channel in chosen]
    scales = torch.tensor([[n / of for n, of in zip(size, rules.patch_size, strict=True)] for size in sizes])
    return SimulateLowResolutionTransform(1, False, True, None)._apply_to_image(
        x, apply_to_channel=chosen, scales=scales[:, 3 - (x.ndim - 1) :]
    )
