"""The definition of each operation in plain torch: same names and results as in `fedcmt.ops`.

These run on any device that torch runs on, and check nothing: call them through `fedcmt.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements widened to float64 at a time; bounds the memory to N x 8 MiB.
_CHUNK = 1 << 20


def gramian(updates: Sequence[Tensor], bounds: Sequence[int]) -> Tensor:
    """Inner products of all pairs of updates in each segment, multiplied and added in float64.

    Args:
        updates: N tensors  # [P]
        bounds: Of the segments  # [S + 1]

    Returns:
        Float64 matrices on the updates' device  # [S, N, N]
    """
    count, device = len(updates), updates[0].device
    grams = torch.zeros(len(bounds) - 1, count, count, dtype=torch.float64, device=device)
    for gram, begin, end in zip(grams, bounds, bounds[1:], strict=False):
        for start in range(begin, end, _CHUNK):
            rows = torch.stack([u[start : min(start + _CHUNK, end)] for u in updates]).double()  # [N, chunk]
            gram += rows @ rows.T
    return torch.triu(grams) + torch.triu(grams, diagonal=1).mT


def gramian_row(updates: Sequence[Tensor], bounds: Sequence[int]) -> Tensor:
    """Inner products of the last update with each of the updates, `[S, N]` float64."""
    last = updates[-1]
    row = torch.zeros(len(bounds) - 1, len(updates), dtype=torch.float64, device=last.device)
    for products, begin, end in zip(row, bounds, bounds[1:], strict=False):
        for start in range(begin, end, _CHUNK):
            part = slice(start, min(start + _CHUNK, end))
            rows = torch.stack([u[part] for u in updates]).double()  # [N, chunk]
            products += rows @ last[part].double()
    return row


@dataclass(frozen=True)
class Rule:
    """How d becomes a step: an optimizer and its numbers, as in `fedcmt.ops.server_step`."""

    optimizer: str
    lr: float
    beta: float
    gain: float  # 1 - dampening
    beta2: float
    epsilon: float


def server_step(
    params: Sequence[Tensor],
    momentum: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    updates: Sequence[Tensor],
    weights: Tensor,
    bounds: Sequence[int],
    rule: Rule,
) -> list[tuple[float, int]]:
    """Weighted sums, server optimizer and parameter update of M targets, in place and in float32.

    Args:
        params: M float32 tensors, changed in place  # [P]
        momentum: M float32 tensors, changed in place, or None  # [P]
        second: M float32 tensors, changed in place, or None with SGD  # [P]
        updates: N tensors  # [P]
        weights: float64 values that are rounded to float32  # [M, S, N]
        bounds: Of the segments  # [S + 1]
        rule: Optimizer and its numbers.

    Returns:
        For each target, the Euclidean norm of lr * step and the number of non-finite values in d.
    """
    return [
        _step_one(*state, combine(updates, factors, bounds), rule)
        for *state, factors in zip(params, momentum, second, weights.float(), strict=True)
    ]


def combine(updates: Sequence[Tensor], weights: Tensor, bounds: Sequence[int]) -> Tensor:
    """d = sum_i weights[s, i] * updates[i] in each segment s, float32 `[P]`."""
    combined = torch.zeros(bounds[-1], dtype=torch.float32, device=updates[0].device)
    for factors, begin, end in zip(weights.tolist(), bounds, bounds[1:], strict=False):
        for update, weight in zip(updates, factors, strict=True):
            combined[begin:end].add_(update[begin:end], alpha=weight)
    return combined


def _step_one(
    params: Tensor, momentum: Tensor | None, second: Tensor | None, combined: Tensor, rule: Rule
) -> tuple[float, int]:
    nonfinite = int(combined.numel() - torch.isfinite(combined).sum().item())
    step = combined * rule.gain
    if momentum is not None:
        # With beta 0 the old momentum is not read: 0 * inf must not poison the step.
        step = step if rule.beta == 0.0 else momentum * rule.beta + step
        momentum.copy_(step)
    if second is not None:
        second.copy_(_second_moment(second, combined.square(), rule))
        step = step / (second.sqrt() + rule.epsilon)
    params.add_(step, alpha=rule.lr)
    return abs(rule.lr) * float(torch.linalg.vector_norm(step, dtype=torch.float64)), nonfinite


def _second_moment(second: Tensor, squares: Tensor, rule: Rule) -> Tensor:
    """v of FedAdam, FedYogi and FedAdagrad (arXiv 2003.00295, algorithm 2)."""
    if rule.optimizer == "adam":
        return rule.beta2 * second + (1 - rule.beta2) * squares
    if rule.optimizer == "yogi":
        return second - (1 - rule.beta2) * squares * torch.sign(second - squares)
    return second + squares


def weighted_mean(updates: Sequence[Tensor], weights: Tensor, masks: Tensor) -> list[Tensor]:
    """Weighted means over groups of updates.

    Args:
        updates: N tensors; those of a group have one length  # [P_m]
        weights: Weight of each member in each group, summing to 1 over the group  # [M, N] float64
        masks: Who is a member  # [M, N] bool

    Returns:
        M float32 tensors  # [P_m]
    """
    means = []
    for factors, mask in zip(weights.float().tolist(), masks.tolist(), strict=True):
        members = [i for i, member in enumerate(mask) if member]
        mean = torch.zeros(updates[members[0]].numel(), device=updates[0].device)
        for i in members:
            mean.add_(updates[i], alpha=factors[i])
        means.append(mean)
    return means


def screen(update: Tensor, into: Tensor | None) -> tuple[int, float, float]:
    """Copies an update and measures it as stored.

    Args:
        update: Any of the three dtypes  # [P]
        into: Receives the values, rounded to its dtype, or None  # [P]

    Returns:
        Number of non-finite values; sum of squares and largest absolute value of the finite ones.
    """
    stored = update if into is None else into.copy_(update)
    finite = torch.isfinite(stored)
    values = torch.where(finite, stored, torch.zeros_like(stored)).double()
    largest = float(values.abs().max()) if values.numel() else 0.0
    return int(values.numel() - finite.sum().item()), float(values.square().sum()), largest


def project_conflicts(grams: Tensor, order: Tensor) -> Tensor:
    """PCGrad's sequential projections in terms of the updates.

    Args:
        grams: float64  # [S, N, N]
        order: int64; row i is the sequence in which update i meets the others  # [N, N]

    Returns:
        Row i holds the factors of the N updates in the projected update i  # [S, N, N] float64
    """
    count = grams.shape[-1]
    coefficients = torch.eye(count, dtype=torch.float64, device=grams.device).repeat(len(grams), 1, 1)
    for gram, rows in zip(grams, coefficients, strict=True):
        for i, row in enumerate(rows):
            for j in order[i].tolist():
                inner = torch.dot(row, gram[:, j])
                if j != i and inner < 0 and gram[j, j] > 0:
                    row[j] -= inner / gram[j, j]
    return coefficients
