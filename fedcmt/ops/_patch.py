"""Training patches: taken out of a case, turned, scaled and mirrored in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedcmt.ops import _native, reference
from fedcmt.ops._backend import Backend, cpu_execution, cuda_launch, runs_cuda_kernels, use_native

_LARGEST_FACTOR = 2.0**20  # of the affine: with it, coordinates stay exact
_LARGEST_MAP = 2**31 - 1  # offsets within one map are int32


def patch_affine(
    matrix: npt.ArrayLike | None,
    source_shape: Sequence[int],
    shape: Sequence[int],
    mirrored_axes: Sequence[int] = (),
) -> np.ndarray:
    """From a voxel of a patch to the voxel of the source that it shows, for `warp_patch`.

    As in batchgeneratorsv2's SpatialTransform and MirrorTransform: offsets from the patch's centre are multiplied by
    `matrix` and counted from the source's centre, (n - 1) / 2 of n voxels; where nothing is turned or scaled, whole
    voxels are taken, from `source // 2 - shape // 2` on; the result is mirrored last.

    Args:
        matrix: Acts on (D, H, W); None where nothing is turned or scaled  # [3, 3]
        source_shape: (D, H, W).
        shape: Of the patch, (D', H', W').
        mirrored_axes: Of (0, 1, 2).

    Returns:
        float64  # [3, 4]
    """
    source, target = np.asarray(source_shape, np.float64), np.asarray(shape, np.float64)
    if matrix is None:
        linear = np.eye(3)
        shift = source // 2 - target // 2
    else:
        linear = np.asarray(matrix, np.float64)
        shift = (source - 1) / 2 - linear @ ((target - 1) / 2)
    for axis in mirrored_axes:
        shift = shift + linear[:, axis] * (target[axis] - 1)
        linear = linear * np.where(np.arange(3) == axis, -1.0, 1.0)
    return np.concatenate([linear, shift[:, None]], axis=1)


def warp_patch(
    image: Tensor,
    labels: Tensor,
    affine: npt.ArrayLike,
    shape: Sequence[int],
    *,
    label_fill: int = -1,
    out: tuple[Tensor, Tensor] | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Image and labels on a patch's grid in one pass: linear interpolation, and nnU-Net's rule for labels.

    Voxel o of the patch shows the source at `p = affine[:, :3] @ o + affine[:, 3]`, in voxels. Outside, the image is
    0 and the labels are `label_fill`. A label's score is the interpolated value of its one-hot map times 1000,
    rounded to half precision; the largest wins, of several the nearest voxel's label, else the lowest
    (batchgeneratorsv2 0.3.6, SpatialTransform with seg_tiebreak "nearest"). One-hot maps are never made.

    Every backend, instruction set and number of threads gives the same bits.

    Equivalent to: `grid_sample(image[None], grid, align_corners=False)[0]`, and for the labels
    `values[[grid_sample((labels == v).float(), ...) for v in values].argmax()]`

    Args:
        image: float32, the last axis without gaps  # [C, D, H, W]
        labels: int16, likewise; L may be 0  # [L, D, H, W]
        affine: From voxels of the patch to voxels of the source, finite, up to 2^20; see `patch_affine`  # [3, 4]
        shape: Of the patch, (D', H', W').
        label_fill: The label outside of the source.
        out: Where image and labels go, without gaps  # [C, D', H', W'], [L, D', H', W']
        backend: "auto", "native" or "reference".

    Returns:
        `out`, or new tensors: image `[C, D', H', W']` and labels `[L, D', H', W']`.

    Raises:
        TypeError, ValueError: Arguments that do not fit each other.
        ImportError: backend is "native" and the extension, or its CUDA part, is missing.
    """
    _check_source(image, labels)
    matrix = _checked_affine(affine)
    size = tuple(int(n) for n in shape)
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"`shape` should be three positive numbers. Got {tuple(shape)}")
    if not -(2**15) <= label_fill < 2**15:
        raise ValueError(f"`label_fill` should fit int16. Got {label_fill}")
    warped = _outputs(image, labels, size) if out is None else _checked_out(out, image, labels, size)
    with torch.no_grad():
        if not use_native(backend, image.device):
            return reference.warp_patch(image, labels, matrix, size, label_fill=label_fill, out=warped)
        _native_warp(image, labels, label_fill, matrix, size, warped)
    return warped


def _check_source(image: Tensor, labels: Tensor) -> None:
    for name, maps, dtype in (("image", image, torch.float32), ("labels", labels, torch.int16)):
        if maps.dtype != dtype or maps.dim() != 4:
            raise TypeError(f"`{name}` should be {dtype} [K, D, H, W]. Got {maps.dtype}, {tuple(maps.shape)}")
        if 0 in maps.shape[1:] or (maps.shape[3] > 1 and maps.stride(3) != 1):
            raise ValueError(
                f"`{name}` should hold voxels, without gaps along W. Got shape {tuple(maps.shape)}, "
                f"strides {maps.stride()}"
            )
        if sum((n - 1) * step for n, step in zip(maps.shape[1:], maps.stride()[1:], strict=True)) >= _LARGEST_MAP:
            raise ValueError(f"`{name}` should have fewer than 2^31 voxels a map. Got shape {tuple(maps.shape)}")
    if image.shape[1:] != labels.shape[1:] or image.device != labels.device:
        raise ValueError(
            f"`labels` should be [L, {', '.join(map(str, image.shape[1:]))}] on {image.device}. "
            f"Got {tuple(labels.shape)} on {labels.device}"
        )


def _checked_affine(affine: npt.ArrayLike) -> np.ndarray:
    matrix = np.asarray(affine, np.float64)
    if matrix.shape != (3, 4):
        raise ValueError(f"`affine` should be [3, 4]. Got shape {matrix.shape}")
    if not (np.abs(matrix) <= _LARGEST_FACTOR).all():
        raise ValueError(f"`affine` should be finite and at most 2^20. Got {matrix.tolist()}")
    return matrix


def _outputs(image: Tensor, labels: Tensor, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return image.new_empty(len(image), *size), labels.new_empty(len(labels), *size)


def _checked_out(
    out: tuple[Tensor, Tensor], image: Tensor, labels: Tensor, size: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    for given, source in zip(out, (image, labels), strict=True):
        expected = (len(source), *size)
        if (
            given.dtype != source.dtype
            or tuple(given.shape) != expected
            or given.device != source.device
            or not given.is_contiguous()
        ):
            raise ValueError(
                f"`out` should be {source.dtype} {expected} without gaps on {source.device}. "
                f"Got {given.dtype}, {tuple(given.shape)}, strides {given.stride()}, {given.device}"
            )
    return out


def _native_warp(
    image: Tensor,
    labels: Tensor,
    label_fill: int,
    affine: np.ndarray,
    size: tuple[int, ...],
    out: tuple[Tensor, Tensor],
) -> None:
    extension = _native.extension()
    sources = [(maps.data_ptr(), list(maps.shape), list(maps.stride()[:3])) for maps in (image, labels)]
    arguments = (*sources, label_fill, affine.ravel().tolist(), list(size), (out[0].data_ptr(), out[1].data_ptr()))
    if runs_cuda_kernels(image.device):
        _workspace, launch = cuda_launch(0, image.device)
        extension.warp_patch_cuda(*arguments, launch)
    else:
        extension.warp_patch_cpu(*arguments, cpu_execution()[0])
