"""CAGrad on the Gram matrix (Liu et al., NeurIPS 2021, arXiv 2110.14048, section 3.2)."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor


def cagrad_weights(gram: Tensor, weights: Tensor, c: float) -> Tensor:
    """Factors of the updates in the conflict-averse step.

    The step maximises the smallest inner product with any update within a ball of radius c |g0| around the weighted
    mean g0 = sum_i w_i Delta_i. Its dual is a convex problem over the simplex,

        min_x  x^T G w + c sqrt(w^T G w) sqrt(x^T G x),

    and d = (g0 + lambda sum_i x_i Delta_i) / (1 + c^2) with lambda = c sqrt(w^T G w) / sqrt(x^T G x).
    Differs from the paper in that w need not be uniform. One update is returned as it is.

    Args:
        gram: `[N, N]` float64 inner products of the updates.
        weights: `[N]` of the mean, non-negative, summing to 1.
        c: Conflict aversion, 0 (the mean) to below 1.

    Returns:
        `[N]` float64.
    """
    count = len(weights)
    scale = float(gram.diagonal().mean())
    if c == 0 or count == 1 or scale == 0:
        return weights.double().clone()
    g = gram.cpu().double().numpy() / scale
    w = weights.cpu().double().numpy()
    gw = g @ w
    radius = c * np.sqrt(max(w @ gw, 0.0))

    def dual(x: np.ndarray) -> tuple[float, np.ndarray]:
        gx = g @ x
        length = np.sqrt(max(x @ gx, 1e-18))
        return x @ gw + radius * length, gw + radius * gx / length

    result = minimize(
        dual,
        w,
        jac=True,
        bounds=[(0.0, 1.0)] * count,
        method="SLSQP",
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1.0, "jac": lambda x: np.ones_like(x)},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    x = np.clip(result.x, 0.0, None)
    x /= x.sum()
    length = np.sqrt(max(x @ g @ x, 0.0))
    # Updates that cancel exactly leave no direction to lean towards.
    leaning = radius / length * x if length > 1e-9 else np.zeros(count)
    return torch.from_numpy((w + leaning) / (1 + c * c))
