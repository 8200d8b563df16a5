"""Instance normalisation and the leaky ReLU after it, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcmt.ops import _native, reference
from fedcmt.ops._backend import Backend, cpu_execution, use_native


def instance_norm_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    epsilon: float = 1e-5,
    negative_slope: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """Normalises every channel of every instance in place, one pass after the other while it is in the cache.

    Equivalent to: `leaky_relu(instance_norm(x, None, None, weight, bias, eps=epsilon), negative_slope)`. The native
    path rounds where torch does on the same processor; sums run in another order, in float64, so that a mean or a
    variance may differ in its last bit about once in ten million channels.

    Args:
        x: float32 on the CPU, without gaps, at least two values a channel  # [B, C, ...]
        weight: float32  # [C]
        bias: float32  # [C]
        epsilon: Added to the variance.
        negative_slope: From 0 to 1; 1 applies no ReLU.
        backend: "auto", "native" or "reference".

    Returns:
        `x`.

    Raises:
        TypeError, ValueError: Arguments that do not fit each other.
        ImportError: backend is "native" and the extension is missing.
    """
    _check(x, weight, bias, negative_slope)
    with torch.no_grad():
        if not use_native(backend, x.device):
            return reference.instance_norm_(x, weight, bias, epsilon=epsilon, negative_slope=negative_slope)
        instances, channels = x.shape[:2]
        _native.extension().instance_norm_cpu(
            x.data_ptr(),
            (instances, channels, x[0, 0].numel()),
            weight.data_ptr(),
            bias.data_ptr(),
            epsilon,
            negative_slope,
            cpu_execution()[0],
        )
    return x


def _check(x: Tensor, weight: Tensor, bias: Tensor, negative_slope: float) -> None:
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.dim() < 3 or not x.is_contiguous():
        raise TypeError(
            f"`x` should be float32 [B, C, ...] on the CPU, without gaps. Got {x.dtype}, {tuple(x.shape)}, {x.device}"
        )
    if x.numel() == 0 or x[0, 0].numel() < 2:
        raise ValueError(f"`x` should hold at least two values a channel. Got shape {tuple(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        fits = tensor.dtype == torch.float32 and tensor.shape == x.shape[1:2] and tensor.device.type == "cpu"
        if not fits or not tensor.is_contiguous():
            raise ValueError(
                f"`{name}` should be float32 [{x.shape[1]}] on the CPU. Got {tensor.dtype}, {tuple(tensor.shape)}, "
                f"{tensor.device}"
            )
    if not 0 <= negative_slope <= 1:
        raise ValueError(f"`negative_slope` should be in 0..1. Got {negative_slope}")
