"""The definition of each operation in plain torch: same names and results as in `fedcmt.ops`.

These run on any device that torch runs on, and check nothing: call them through `fedcmt.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements widened to float64 at a time; bounds the memory to N x 8 MiB.
_CHUNK = 1 << 20


def gramian(updates: Sequence[Tensor]) -> Tensor:
    """Inner products of all pairs of updates, multiplied and added in float64.

    Args:
        updates: N tensors  # [P]

    Returns:
        Float64 matrix on the updates' device  # [N, N]
    """
    device, length = updates[0].device, updates[0].numel()
    gram = torch.zeros(len(updates), len(updates), dtype=torch.float64, device=device)  # [N, N]
    for start in range(0, length, _CHUNK):
        rows = torch.stack([u[start : start + _CHUNK] for u in updates]).double()  # [N, chunk]
        gram += rows @ rows.T
    return torch.triu(gram) + torch.triu(gram, diagonal=1).T


def server_step(
    params: Tensor,
    momentum: Tensor | None,
    updates: Sequence[Tensor],
    weights: Sequence[float],
    *,
    lr: float,
    beta: float = 0.0,
) -> tuple[float, int]:
    """Weighted sum, momentum and parameter update, in place and in float32.

    Args:
        params: Float32 parameters, changed in place  # [P]
        momentum: Float32 momentum, changed in place, or None where beta is 0  # [P]
        updates: N tensors  # [P]
        weights: N weights
        lr: Factor of the step.
        beta: Factor of the old momentum; where it is 0 the old momentum is not read.

    Returns:
        Euclidean norm of the step lr * m, and the number of non-finite values in d.
    """
    combined = torch.zeros_like(params)  # [P]
    for update, weight in zip(updates, weights, strict=True):
        combined.add_(update, alpha=weight)
    nonfinite = int(combined.numel() - torch.isfinite(combined).sum().item())
    if momentum is not None:
        if beta == 0.0:
            momentum.copy_(combined)
        else:
            momentum.mul_(beta).add_(combined)
        combined = momentum
    params.add_(combined, alpha=lr)
    return abs(lr) * float(torch.linalg.vector_norm(combined, dtype=torch.float64)), nonfinite
