"""Changes of a patch's intensities, in place and in as few passes as their statistics allow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedcmt.ops import _native, reference
from fedcmt.ops._backend import Backend, cpu_execution, cuda_launch, runs_cuda_kernels, use_native
from fedcmt.ops.intensity_reference import gaussian_taps

_LARGEST_IMAGE = 2**31 - 1  # voxels of a channel; the noise counts them with 32 bits
_Axes = tuple[float, float, float]


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
    backend: Backend = "auto",
) -> None:
    """nnU-Net's intensity augmentation with given parameters, in the order of the arguments, in place.

    Those of a channel are one number, size or triple for each; nothing, or None for a channel, leaves it as it is.
    Means, ranges and standard deviations are those of a channel at that moment. Results depend on neither the number
    of threads nor on other channels; instruction sets and CUDA differ in the last bits.

    Equivalent to, for each channel x (batchgeneratorsv2 0.3.6):
        `x += noise * randn`, separable Gaussian filters with reflected borders, `x *= brightness`,
        `((x - mean) * contrast + mean).clamp(min, max)`, `interpolate(interpolate(x, size, mode="nearest-exact"),
        shape, mode="trilinear")`, then twice, of -x and of x, `((x - min) / (max - min)) ** gamma` brought back to
        x's mean and standard deviation.

    Args:
        image: float32 without gaps  # [C, D, H, W]
        noise: Standard deviation.
        noise_seed: 0 to 2^64 - 1; the noise is a function of it, channel and voxel alone (Philox4x32-10).
        blur: Standard deviations in voxels along D, H and W, up to 8; 0 leaves an axis as it is  # [C]
        brightness: Factors  # [C]
        contrast: Factors about the mean, kept within the range  # [C]
        low_resolution: Sizes (d, h, w) to thin to, each up to the image's  # [C]
        gamma_inverted: Exponents for the negated values, above 0  # [C]
        gamma: Exponents, above 0  # [C]
        mirrored_axes: Of (0, 1, 2): the image lies mirrored along them, and the results are the mirror image of what
            they would have been. Matters for the voxels that low resolution keeps, but not for the noise.
        backend: "auto", "native" or "reference".

    Raises:
        TypeError, ValueError: Arguments that do not fit each other.
        ImportError: backend is "native" and the extension, or its CUDA part, is missing.
    """
    _check_image(image, noise, noise_seed)
    _check_channels(image, blur=blur, brightness=brightness, contrast=contrast, low_resolution=low_resolution,
                    gamma_inverted=gamma_inverted, gamma=gamma)  # fmt: skip
    sigmas, sizes = _checked_blur(blur), _checked_sizes(low_resolution, image.shape[1:])
    if not set(mirrored_axes) <= {0, 1, 2}:
        raise ValueError(f"`mirrored_axes` should be among 0, 1 and 2. Got {tuple(mirrored_axes)}")
    with torch.no_grad():
        if not use_native(backend, image.device):
            return reference.change_intensities(
                image, noise=noise, noise_seed=noise_seed, blur=sigmas, brightness=brightness, contrast=contrast,
                low_resolution=sizes, gamma_inverted=gamma_inverted, gamma=gamma, mirrored_axes=mirrored_axes,
            )  # fmt: skip
        changes = [
            (
                noise,
                [gaussian_taps(sigma) if sigma > 0 else [] for sigma in (sigmas[c] if sigmas else None) or (0, 0, 0)],
                brightness[c] if brightness else 1.0,
                contrast[c] if contrast else 1.0,
                list((sizes[c] if sizes else None) or (0, 0, 0)),
                gamma_inverted[c] if gamma_inverted else 0.0,
                gamma[c] if gamma else 0.0,
            )
            for c in range(len(image))
        ]
        _native_changes(image, changes, noise_seed, [axis in mirrored_axes for axis in range(3)])
    return None


def _check_image(image: Tensor, noise: float, noise_seed: int) -> None:
    if image.dtype != torch.float32 or image.dim() != 4:
        raise TypeError(f"`image` should be float32 [C, D, H, W]. Got {image.dtype}, {tuple(image.shape)}")
    if 0 in image.shape[1:] or not image.is_contiguous() or image[:1].numel() > _LARGEST_IMAGE:
        raise ValueError(
            f"`image` should hold up to 2^31 voxels a channel, without gaps. Got shape {tuple(image.shape)}, "
            f"strides {image.stride()}"
        )
    if not 0 <= noise < math.inf:
        raise ValueError(f"`noise` should be a standard deviation, 0 or more. Got {noise}")
    if not 0 <= noise_seed < 2**64:
        raise ValueError(f"`noise_seed` should be 0 to 2^64 - 1. Got {noise_seed}")


def _check_channels(image: Tensor, **parameters: Sequence[object]) -> None:
    for name, values in parameters.items():
        if len(values) not in (0, len(image)):
            raise ValueError(f"`{name}` should be empty or hold {len(image)}, one a channel. Got {len(values)}")
        if name in ("brightness", "contrast") and not all(math.isfinite(x) for x in values):  # type: ignore[arg-type]
            raise ValueError(f"`{name}` should be finite. Got {list(values)}")
        if name.startswith("gamma") and not all(0 < x < math.inf for x in values):  # type: ignore[operator]
            raise ValueError(f"`{name}` should be above 0. Got {list(values)}")


def _checked_blur(blur: Sequence[Sequence[float] | None]) -> list[_Axes | None]:
    for sigmas in blur:
        if sigmas is not None and (len(sigmas) != 3 or not all(0 <= sigma <= 8 for sigma in sigmas)):
            raise ValueError(f"`blur` should be three numbers from 0 to 8 a channel, or None. Got {sigmas}")
    return [None if sigmas is None else (sigmas[0], sigmas[1], sigmas[2]) for sigmas in blur]


def _checked_sizes(sizes: Sequence[Sequence[int] | None], shape: Sequence[int]) -> list[tuple[int, int, int] | None]:
    for size in sizes:
        if size is not None and (
            len(size) != 3 or not all(1 <= small <= whole for small, whole in zip(size, shape, strict=True))
        ):
            raise ValueError(f"`low_resolution` should be sizes from 1 to {tuple(shape)}, or None. Got {tuple(size)}")
    return [None if size is None else (int(size[0]), int(size[1]), int(size[2])) for size in sizes]


def _native_changes(image: Tensor, changes: Sequence[tuple[object, ...]], seed: int, mirrored: Sequence[bool]) -> None:
    extension = _native.extension()
    arguments = (image.data_ptr(), list(image.shape), list(changes), seed, list(mirrored))
    if runs_cuda_kernels(image.device):
        size = extension.change_intensities_workspace_bytes(*arguments)
        _workspace, launch = cuda_launch(size, image.device)
        extension.change_intensities_cuda(*arguments, launch)
    else:
        extension.change_intensities_cpu(*arguments, cpu_execution()[0])
