"""The definition of each operation in plain torch: same names, arguments and results as in `fedcmt.ops`.

These run on any device that torch runs on, take tensors only, and check nothing: call them through
`fedcmt.ops`, where the arguments are described.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedcmt.ops._stats import ScreenStats, StepStats
from fedcmt.ops.intensity_reference import change_intensities as change_intensities
from fedcmt.ops.patch_reference import warp_patch as warp_patch
from fedcmt.ops.taps import all_taps, interpolated_slice

# Elements widened to float64 at a time; bounds the memory to N x 8 MiB.
_CHUNK = 1 << 20
_LARGEST_HALF = 65504
LOGITS_NOT_FINITE = "`logits` should be finite in half precision. Got an overflow or not-a-number"


def gramian(updates: Sequence[Tensor], *, segments: Sequence[int] | None = None) -> Tensor:
    """Inner products of all pairs of updates, multiplied and added in float64, `[N, N]` or `[S, N, N]`."""
    bounds = _bounds(segments, updates)
    grams = updates[0].new_zeros(len(bounds) - 1, len(updates), len(updates), dtype=torch.float64)
    for gram, begin, end in zip(grams, bounds, bounds[1:], strict=False):
        for start in range(begin, end, _CHUNK):
            rows = torch.stack([u[start : min(start + _CHUNK, end)] for u in updates]).double()  # [N, chunk]
            gram += rows @ rows.T
    grams = torch.triu(grams) + torch.triu(grams, diagonal=1).mT
    return grams[0] if segments is None else grams


def gramian_append(
    gram: Tensor | None, updates: Sequence[Tensor], update: Tensor, *, segments: Sequence[int] | None = None
) -> Tensor:
    """The Gram matrix grown by one row and column, `[N + 1, N + 1]` or `[S, N + 1, N + 1]`."""
    bounds = _bounds(segments, [update])
    row = update.new_zeros(len(bounds) - 1, len(updates) + 1, dtype=torch.float64)  # [S, N + 1]
    for products, begin, end in zip(row, bounds, bounds[1:], strict=False):
        for start in range(begin, end, _CHUNK):
            part = slice(start, min(start + _CHUNK, end))
            rows = torch.stack([u[part] for u in [*updates, update]]).double()  # [N + 1, chunk]
            products += rows @ update[part].double()
    return grown(gram, row if segments is not None else row[0])


def grown(gram: Tensor | None, row: Tensor) -> Tensor:
    """A symmetric matrix with `row`, `[..., N + 1]`, as its new last row and column."""
    result = row.new_empty(*row.shape, row.shape[-1])
    if gram is not None and row.shape[-1] > 1:
        result[..., :-1, :-1] = gram
    result[..., -1, :] = row
    result[..., :, -1] = row
    return result


def project_conflicts(gram: Tensor, *, order: Tensor | None = None) -> Tensor:
    """PCGrad's sequential projections in terms of the updates, `[N, N]` or `[S, N, N]`."""
    count = gram.shape[-1]
    sequences = [list(range(count))] * count if order is None else order.tolist()
    coefficients = torch.eye(count, dtype=torch.float64, device=gram.device).expand(gram.shape).clone()
    for products, rows in zip(gram.view(-1, count, count), coefficients.view(-1, count, count), strict=True):
        for i, row in enumerate(rows):
            for j in sequences[i]:
                inner = torch.dot(row, products[:, j])
                if j != i and inner < 0 and products[j, j] > 0:
                    row[j] -= inner / products[j, j]
    return coefficients


def server_step(
    params: Any,
    momentum: Any,
    updates: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    *,
    lr: float,
    beta: float = 0.0,
    dampening: float | None = None,
    optimizer: str = "sgd",
    second: Any = None,
    beta2: float = 0.99,
    epsilon: float = 1e-3,
    max_norm: float | None = None,
    gram: Tensor | None = None,
    segments: Sequence[int] | None = None,
) -> StepStats | list[StepStats]:
    """Weighted sums, clipping, server optimizer and parameter update, in place and in float32."""
    if isinstance(params, (list, tuple)):
        options: dict[str, Any] = {
            "lr": lr, "beta": beta, "dampening": dampening, "optimizer": optimizer, "beta2": beta2,
            "epsilon": epsilon, "max_norm": max_norm, "segments": segments,
        }  # fmt: skip
        nothing = [None] * len(params)
        state = zip(params, momentum or nothing, second or nothing, weights, strict=True)
        return [_step(p, m, v, updates, w, **options) for p, m, v, w in state]
    return _step(
        params, momentum, second, updates, weights, lr=lr, beta=beta, dampening=dampening, optimizer=optimizer,
        beta2=beta2, epsilon=epsilon, max_norm=max_norm, segments=segments,
    )  # fmt: skip


def _step(
    params: Tensor,
    momentum: Tensor | None,
    second: Tensor | None,
    updates: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    *,
    lr: float,
    beta: float,
    dampening: float | None,
    optimizer: str,
    beta2: float,
    epsilon: float,
    max_norm: float | None,
    segments: Sequence[int] | None,
) -> StepStats:
    combined = _combine(updates, weights, segments)
    clipping = 1.0
    if max_norm is not None:
        length = float(torch.linalg.vector_norm(combined, dtype=torch.float64))
        clipping = max_norm / length if length > max_norm and math.isfinite(length) else 1.0
        combined = combined * clipping
    nonfinite = int(combined.numel() - torch.isfinite(combined).sum().item())
    if dampening is None:
        dampening = 0.0 if optimizer == "sgd" else beta
    step = combined * (1 - dampening)
    if momentum is not None:
        # With beta 0 the old momentum is not read: 0 * inf must not poison the step.
        step = step if beta == 0.0 else momentum * beta + step
        momentum.copy_(step)
    if second is not None:
        second.copy_(_second_moment(second, combined.square(), optimizer, beta2))
        step = step / (second.sqrt() + epsilon)
    params.add_(step, alpha=lr)
    return StepStats(abs(lr) * float(torch.linalg.vector_norm(step, dtype=torch.float64)), nonfinite, clipping)


def _combine(updates: Sequence[Tensor], weights: Tensor | Sequence[float], segments: Sequence[int] | None) -> Tensor:
    """d = sum_i weights[s, i] * updates[i] in each segment s, float32 `[P]`."""
    bounds = _bounds(segments, updates)
    factors = torch.as_tensor(weights, dtype=torch.float32).view(len(bounds) - 1, len(updates))
    combined = torch.zeros_like(updates[0], dtype=torch.float32)
    for row, begin, end in zip(factors.tolist(), bounds, bounds[1:], strict=False):
        for update, weight in zip(updates, row, strict=True):
            combined[begin:end].add_(update[begin:end], alpha=weight)
    return combined


def _second_moment(second: Tensor, squares: Tensor, optimizer: str, beta2: float) -> Tensor:
    """v of FedAdam, FedYogi and FedAdagrad (arXiv 2003.00295, algorithm 2)."""
    if optimizer == "adam":
        return beta2 * second + (1 - beta2) * squares
    if optimizer == "yogi":
        return second - (1 - beta2) * squares * torch.sign(second - squares)
    return second + squares


def weighted_mean(
    updates: Sequence[Tensor], weights: Tensor | Sequence[float], masks: Tensor | None = None
) -> Tensor | list[Tensor]:
    """Weighted mean of all updates, `[P]`, or of the members of each mask, M tensors `[P_m]`; float32."""
    factors = torch.as_tensor(weights, dtype=torch.float64)
    groups = [[True] * len(updates)] if masks is None else torch.as_tensor(masks).tolist()
    means = []
    for group in groups:
        members = [i for i, member in enumerate(group) if member]
        shares = factors[members] / factors[members].sum()
        mean = torch.zeros_like(updates[members[0]], dtype=torch.float32)
        for i, share in zip(members, shares.float().tolist(), strict=True):
            mean.add_(updates[i], alpha=share)
        means.append(mean)
    return means[0] if masks is None else means


def screen(update: Tensor, *, into: Tensor | None = None) -> ScreenStats:
    """Copies an update and measures it as stored."""
    stored = update if into is None else into.copy_(update)
    values = stored[torch.isfinite(stored)].double()
    largest = float(values.abs().max()) if values.numel() else 0.0
    return ScreenStats(stored.numel() - values.numel(), float(torch.linalg.vector_norm(values)), largest)


def logits_to_labels(
    logits: Tensor,
    shape: Sequence[int],
    *,
    weights: Tensor | None = None,
    nearest_axis: int | None = None,
    region_values: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The first largest of the resampled logits, or the last region above a half, `[D', H', W']`, slice by slice."""
    half = logits if weights is None else logits / weights
    if not ((logits.abs() <= _LARGEST_HALF).all() and (half.abs() <= _LARGEST_HALF).all()):
        raise FloatingPointError(LOGITS_NOT_FINITE)
    labels = empty_labels(shape, len(logits), region_values) if out is None else out
    source, taps = half.numpy(), all_taps(logits.shape[1:], shape, nearest_axis)
    for z, plane in enumerate(labels.numpy()):
        rounded = interpolated_slice(source, z, taps).astype(np.float16)
        if region_values is None:
            plane[...] = rounded.argmax(0)
        else:
            plane[...] = 0
            for chance, value in zip(torch.from_numpy(rounded).float().sigmoid(), region_values, strict=True):
                plane[(chance > 0.5).numpy()] = value
    return labels


def instance_norm_(x: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float, negative_slope: float) -> Tensor:
    """See :func:`fedcmt.ops.instance_norm_`."""
    normalized = functional.instance_norm(x, None, None, weight, bias, eps=epsilon)
    return x.copy_(functional.leaky_relu_(normalized, negative_slope))


def empty_labels(shape: Sequence[int], num_heads: int, region_values: Sequence[int] | None) -> Tensor:
    """Where labels go, of the smallest type that holds them."""
    largest = num_heads - 1 if region_values is None else max(region_values)
    return torch.empty(tuple(int(n) for n in shape), dtype=torch.uint8 if largest <= 255 else torch.uint16)


def _bounds(segments: Sequence[int] | None, updates: Sequence[Tensor]) -> list[int]:
    return [0, updates[0].numel()] if segments is None else [int(bound) for bound in segments]
