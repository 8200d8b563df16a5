"""What the operations are compared with: plain torch done well, a published solver, other libraries.

Each function makes the work from the inputs; what can be prepared once is prepared outside of the measurement.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from measure import Inputs, Work
from scipy.optimize import minimize
from torch import Tensor

LR, BETA, CONFLICT_AVERSION = 0.5, 0.9, 0.4
CASES = 10  # of each client, where a library weights by them
_PEAK_SIZE = 1024
PEAK_PRODUCTS = _PEAK_SIZE**3
_CHUNK = 16384  # elements: 8 rows of float32 fit the second cache


def multiply_stacked(inputs: Inputs, dtype: torch.dtype) -> Work:
    """Gram matrix by one product of a matrix that is stacked already; sums are float32."""
    stacked = inputs.stacked(dtype)  # [N, P]
    return lambda: stacked @ stacked.T


def stack_and_multiply(inputs: Inputs, dtype: torch.dtype) -> Work:
    """Gram matrix by stacking (and widening) all updates, then one product; sums are float32."""
    rows = inputs.rows(dtype)

    def work() -> Tensor:
        stacked = torch.stack(list(rows)).float()  # [N, P]
        return stacked @ stacked.T

    return work


def multiply_chunks(inputs: Inputs, dtype: torch.dtype) -> Work:
    """Gram matrix by stacking and multiplying pieces that fit the cache; float32 in a piece, float64 across them."""
    rows = inputs.rows(dtype)

    def work() -> Tensor:
        gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for pieces in zip(*(row.split(_CHUNK) for row in rows), strict=True):
            stacked = torch.stack(pieces).float()  # [N, chunk]
            gram += stacked @ stacked.T
        return gram

    return work


def dot_pairs(inputs: Inputs, dtype: torch.dtype) -> Work:
    """Gram matrix by one torch.dot a pair: no stacking, but each update is read N + 1 times."""
    rows = inputs.rows(dtype)

    def work() -> Tensor:
        gram = torch.empty(len(rows), len(rows), dtype=dtype)
        for i, j in itertools.combinations_with_replacement(range(len(rows)), 2):
            gram[i, j] = gram[j, i] = torch.dot(rows[i], rows[j])
        return gram

    return work


def dot_last(inputs: Inputs, dtype: torch.dtype) -> Work:
    """The last row of the Gram matrix by one torch.dot each."""
    rows = inputs.rows(dtype)
    return lambda: torch.stack([torch.dot(row, rows[-1]) for row in rows])


def _measured(combined: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Count of non-finite values and norm, as `server_step` returns them (the norm's sums here float32)."""
    return combined.numel() - torch.isfinite(combined).sum(), torch.linalg.vector_norm(step)


def step_by_addition(inputs: Inputs, dtype: torch.dtype, targets: int = 1, segments: int = 1) -> Work:
    """The server's step, the same work as ours: a chain of add_, momentum, parameters, count, norm."""
    rows, state = inputs.rows(dtype), inputs.state(2 * targets)
    combined = torch.empty_like(state[0])
    views = [row.tensor_split(segments) for row in (combined, *rows)]
    pieces = list(zip(*views, strict=True))  # of each segment: combined, rows

    def work() -> list[tuple[Tensor, Tensor]]:
        measured = []
        for params, momentum in zip(state[::2], state[1::2], strict=True):
            combined.zero_()
            for target, *parts in pieces:
                for part, weight in zip(parts, inputs.weights, strict=True):
                    target.add_(part, alpha=weight)
            momentum.mul_(BETA).add_(combined)
            params.add_(momentum, alpha=LR)
            measured.append(_measured(combined, momentum))
        return measured

    return work


def step_into_momentum(inputs: Inputs, dtype: torch.dtype) -> Work:
    """Less work than ours: rows are added straight to the momentum, and its non-finite values are counted."""
    rows, (params, momentum) = inputs.rows(dtype), inputs.state(2)

    def work() -> tuple[Tensor, Tensor]:
        momentum.mul_(BETA)
        for row, weight in zip(rows, inputs.weights, strict=True):
            momentum.add_(row, alpha=weight)
        params.add_(momentum, alpha=LR)
        return _measured(momentum, momentum)

    return work


def step_by_product(inputs: Inputs, dtype: torch.dtype) -> Work:
    """The server's step with a matrix-vector product, for updates that are stacked already."""
    stacked, (params, momentum) = inputs.stacked(dtype), inputs.state(2)
    weights = torch.tensor(inputs.weights, dtype=dtype)

    def work() -> tuple[Tensor, Tensor]:
        combined = weights @ stacked  # [P]
        momentum.mul_(BETA).add_(combined)
        params.add_(momentum, alpha=LR)
        return _measured(combined, momentum)

    return work


def adam_by_torch(inputs: Inputs, dtype: torch.dtype) -> Work:
    """The server's step with FedAdam (arXiv 2003.00295, algorithm 2), in place where torch allows."""
    rows, (params, momentum, second) = inputs.rows(dtype), inputs.state(3)
    combined = torch.empty_like(params)

    def work() -> tuple[Tensor, Tensor]:
        combined.zero_()
        for row, weight in zip(rows, inputs.weights, strict=True):
            combined.add_(row, alpha=weight)
        momentum.lerp_(combined, 1 - BETA)
        second.mul_(0.99).addcmul_(combined, combined, value=1 - 0.99)
        step = second.sqrt().add_(1e-3).reciprocal_().mul_(momentum)
        params.add_(step, alpha=LR)
        return _measured(combined, step)

    return work


def mean_by_torch(inputs: Inputs, dtype: torch.dtype) -> Work:
    """Weighted mean by a chain of add_."""
    rows = inputs.rows(dtype)

    def work() -> Tensor:
        mean = torch.zeros(inputs.length)
        for row, weight in zip(rows, inputs.weights, strict=True):
            mean.add_(row, alpha=weight)
        return mean

    return work


def screen_by_torch(inputs: Inputs, dtype: torch.dtype, into: torch.dtype | None) -> Work:
    """Copy, finite check, norm and largest value of one update."""
    row = inputs.rows(dtype)[0]
    target = row if into is None else torch.empty_like(row, dtype=into)

    def work() -> tuple[Tensor, ...]:
        if into is not None:
            target.copy_(row)
        return *_measured(target, target), torch.linalg.vector_norm(target, float("inf"))

    return work


def fedhca2(inputs: Inputs, dtype: torch.dtype) -> Work:
    """The step as FedHCA2 publishes its solver (CVPR 2024, arXiv 2311.13250): CAGrad on stacked deltas, then momentum.

    CAGrad (arXiv 2110.14048): x minimises x^T G b + c sqrt(x^T G x) on the simplex, b uniform, c = alpha times the
    norm of the mean; d = (mean + c / |g_x| g_x) / (1 + alpha^2). SLSQP differentiates numerically, sums are float32,
    and the deltas are stacked, transposed and weighted as whole matrices, as in the published code.
    """
    rows, (params, momentum) = inputs.rows(dtype), inputs.state(2)

    def work() -> None:
        combined = _conflict_averse(rows, CONFLICT_AVERSION)
        momentum.mul_(BETA).add_(combined)
        params.add_(momentum, alpha=LR)

    return work


def _conflict_averse(deltas: Sequence[Tensor], alpha: float) -> Tensor:
    count = len(deltas)
    columns = torch.stack(list(deltas)).t()  # [P, N]
    gram = columns.t().mm(columns)  # [N, N]
    radius = alpha * float((gram.mean() + 1e-8).sqrt()) + 1e-8
    products, uniform = gram.numpy(), np.full(count, 1 / count)

    def objective(x: np.ndarray) -> float:
        return float(x @ products @ uniform + radius * np.sqrt(x @ products @ x + 1e-8))

    solution = minimize(
        objective,
        uniform,
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda x: 1 - x.sum()},
    )
    worst = (columns * torch.from_numpy(solution.x).float().view(1, -1)).sum(1)  # [P]
    combined = columns.mean(1) + radius / (worst.norm() + 1e-8) * worst
    return combined / (1 + alpha**2)


def torchjd_aggregation(inputs: Inputs, dtype: torch.dtype, name: str) -> Work:
    """TorchJD's aggregator on a matrix that is stacked already; no server optimizer."""
    from torchjd.aggregation import CAGrad, UPGrad

    aggregator = CAGrad(CONFLICT_AVERSION) if name == "CAGrad" else UPGrad()
    stacked = inputs.stacked(dtype)
    return lambda: aggregator(stacked)


def nvflare_mean(inputs: Inputs, dtype: torch.dtype) -> Work:
    """NVFlare's weighted mean of tensors, which is all that its FedAvg computes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper

    rows = inputs.rows(dtype)

    def work() -> object:
        helper = WeightedAggregationHelper()
        for i, row in enumerate(rows):
            helper.add({"shared": row}, weight=CASES, contributor_name=f"client {i}", contribution_round=0)
        return helper.get_result()

    return work


def flower_mean(inputs: Inputs, dtype: torch.dtype) -> Work:
    """Flower's weighted mean of NumPy arrays, which is all that its FedAvg computes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from flwr.server.strategy.aggregate import aggregate

    results = [([row.numpy()], CASES) for row in inputs.rows(dtype)]
    return lambda: aggregate(results)


def float64_peak(_: Inputs) -> Work:
    """PEAK_PRODUCTS multiply-adds by torch's float64 matrix product, taken for what one thread can do at most."""
    matrix = torch.randn(_PEAK_SIZE, _PEAK_SIZE, dtype=torch.float64)
    return lambda: matrix @ matrix
