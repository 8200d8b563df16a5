"""What follows from a Gram matrix of updates, in float64."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

StepLength = Literal["plain", "restored", "fedexp"]


def lengthened(weights: Tensor, gram: Tensor, rule: StepLength) -> Tensor:
    """Weights of a step of another length along the same direction.

    Near orthogonal updates make a mean of 1/sqrt(N) of their length. ``restored`` gives it their mean length, with at
    most a factor of sqrt(N). ``fedexp`` is the adaptive rate max(1, sum_i w_i |Delta_i|^2 / (2 |d|^2)) of FedExP
    (Jhunjhunwala et al., ICLR 2023, arXiv 2301.09604, equation 6), without its epsilon, so that scale does not matter.

    Args:
        weights: `[N]` float64.
        gram: `[N, N]` float64 inner products of the updates.
        rule: ``plain``, ``restored`` or ``fedexp``.
    """
    if rule == "plain":
        return weights
    squares, length = gram.diagonal().clamp_min(0), float(weights @ gram @ weights)
    # Updates that cancel have a step of rounding errors only, and no direction to go further along.
    if length <= 1e-12 * float(weights.abs() @ squares):
        return weights
    if rule == "fedexp":
        return weights * max(1.0, float(weights.abs() @ squares) / (2 * length))
    factor = float(weights.abs() @ squares.sqrt()) / math.sqrt(length)
    return weights * min(factor, math.sqrt(len(weights)))


def root(gram: Tensor) -> np.ndarray:
    """A matrix A `[N, N]` with A^T A = G / mean(diag G): columns are the updates in coordinates of their own."""
    scale = float(gram.diagonal().mean())
    values, vectors = np.linalg.eigh(gram.cpu().double().numpy() / (scale if scale > 0 else 1.0))
    return np.asarray(np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T)


def smallest_mean(gram: Tensor) -> Tensor:
    """The weights x on the simplex of the shortest mean: argmin x^T G x, `[N]` float64.

    With y = s x, argmin over y >= 0 of y^T G y + (1 - sum y)^2 has the same x and is a non-negative least squares
    problem, which an active-set method solves exactly.
    """
    count = gram.shape[0]
    solution, _ = nnls(np.vstack([root(gram), np.ones(count)]), np.append(np.zeros(count), 1.0))
    return torch.from_numpy(solution / solution.sum())


def onto_dual_cone(gram: Tensor) -> Tensor:
    """Each update projected onto the cone of directions that oppose no update.

    Row i is argmin v^T G v with v >= e_i, whose combination is the projection of update i.

    Returns:
        `[N, N]` float64; row i holds the factors of the updates in the projected update i.
    """
    a = root(gram)
    rows = [nnls(a, -a[:, i])[0] for i in range(len(a))]
    return torch.from_numpy(np.stack(rows)) + torch.eye(len(a), dtype=torch.float64)


def cosines(gram: Tensor) -> Tensor:
    """Cosines of the updates, shaped like ``gram``; 0 where an update is zero."""
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    table = gram / (lengths[..., :, None] * lengths[..., None, :])
    return torch.nan_to_num(table, nan=0.0, posinf=0.0, neginf=0.0)
