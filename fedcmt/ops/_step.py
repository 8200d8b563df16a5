"""The server's step: combine the updates, run the server optimizer, change the parameters, measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fedcmt.ops import _native, reference
from fedcmt.ops._arguments import (
    DTYPE_CODES,
    check_gram,
    check_no_overlap,
    check_number,
    check_segments,
    check_updates,
    check_weights,
    check_written,
    named,
)
from fedcmt.ops._backend import Backend, cpu_execution, cuda_launch, runs_cuda_kernels, use_native
from fedcmt.ops._gram import Segments, gramian
from fedcmt.ops._stats import StepStats

Optimizer = Literal["sgd", "adam", "yogi", "adagrad"]
# The values of enum class Optimizer in csrc/ops.h.
_OPTIMIZER_CODES = {"sgd": 0, "adam": 1, "yogi": 2, "adagrad": 3}


State = tuple[Tensor, Tensor | None, Tensor | None]  # parameters, momentum, second moment of one target


@dataclass(frozen=True)
class _Rule:
    """The optimizer and its numbers, all checked."""

    optimizer: Optimizer
    lr: float
    beta: float
    dampening: float
    beta2: float
    epsilon: float


@overload
def server_step(
    params: Tensor, momentum: Tensor | None, updates: Sequence[Any], weights: Any, *, lr: float, beta: float = 0.0,
    dampening: float | None = None, optimizer: Optimizer = "sgd", second: Tensor | None = None, beta2: float = 0.99,
    epsilon: float = 1e-3, max_norm: float | None = None, gram: Tensor | None = None,
    segments: Segments | None = None, backend: Backend = "auto",
) -> StepStats: ...  # fmt: skip


@overload
def server_step(
    params: Sequence[Tensor], momentum: Sequence[Tensor | None] | None, updates: Sequence[Any], weights: Any, *,
    lr: float, beta: float = 0.0, dampening: float | None = None, optimizer: Optimizer = "sgd",
    second: Sequence[Tensor] | None = None, beta2: float = 0.99, epsilon: float = 1e-3,
    max_norm: float | None = None, gram: Tensor | None = None, segments: Segments | None = None,
    backend: Backend = "auto",
) -> list[StepStats]: ...  # fmt: skip


def server_step(
    params: Any,
    momentum: Any,
    updates: Sequence[Any],
    weights: Any,
    *,
    lr: float,
    beta: float = 0.0,
    dampening: float | None = None,
    optimizer: Optimizer = "sgd",
    second: Any = None,
    beta2: float = 0.99,
    epsilon: float = 1e-3,
    max_norm: float | None = None,
    gram: Tensor | None = None,
    segments: Segments | None = None,
    backend: Backend = "auto",
) -> StepStats | list[StepStats]:
    """The server's step in one pass over updates and state, in place and in float32:

        d = sum_i weights[i] * updates[i];  m = beta * m + (1 - dampening) * d
        sgd:      params += lr * m
        adam:     v = beta2 * v + (1 - beta2) * d^2;                 params += lr * m / (sqrt(v) + epsilon)
        yogi:     v = v - (1 - beta2) * d^2 * sign(v - d^2);         the same
        adagrad:  v = v + d^2;                                       the same

    Parameters and state are changed also where d has non-finite values, so look at the returned
    count before using them. With beta = 0 the old momentum is not read.

    With M parameter vectors (personal or group models, each with its own state) and weights [M, N],
    all are updated in one pass over the N updates; with segments each has weights of its own.

    Equivalent to, for sgd: `params.add_(momentum.mul_(beta).add_(weights @ torch.stack(updates)), alpha=lr)`

    Args:
        params: Float32 parameters, or a sequence of M such vectors  # [P]
        momentum: Float32 momentum, or None where beta is 0; a sequence where params is one  # [P]
        updates: N >= 1 tensors or arrays, float32, bfloat16 or float16, on the parameters' device  # [P]
        weights: Finite numbers, used as float32  # [N]; [M, N]; with segments [S, N] or [M, S, N]
        lr: Factor of the step.
        beta: Factor of the old momentum, beta_1 of the adaptive optimizers.
        dampening: 0 for sgd and beta for the adaptive optimizers by default.
        optimizer: "sgd", "adam", "yogi" or "adagrad". There is no bias correction, as in the source;
            fold it into lr and epsilon where it is wanted.
        second: Float32 second moment v of the adaptive optimizers, with momentum's form  # [P]
        beta2: Decay of the second moment.
        epsilon: The degree of adaptivity, tau in the source.
        max_norm: Shortens d to at most this Euclidean norm (over all segments). The norm is taken
            from the Gram matrix, so clipping needs no pass of its own.
        gram: Of the updates, per segment where there are segments; computed where max_norm needs it
            and it is not given  # [N, N] or [S, N, N]
        segments: Bounds 0 = b_0 <= ... <= b_S = P of parts with weights of their own.
        backend: "auto", "native" or "reference".

    Returns:
        Norm of the step, number of non-finite values in d and the factor of clipping; a list of M
        where params is a sequence.

    Raises:
        TypeError: An argument of another type or dtype.
        ValueError: Lengths, devices or numbers that do not fit, tensors that are not contiguous, or
            written tensors that share memory with each other or with an update.
        ImportError: backend is "native" and the extension, or its CUDA part, is missing.

    Source: FedOpt (Reddi et al., arXiv 2003.00295, algorithm 2), with the updates combined, applied
    and measured while they are read once.
    """
    rows = check_updates(updates)
    single = not isinstance(params, (list, tuple))
    bounds = check_segments(segments, rows[0].numel())
    rule = _check_rule(optimizer, lr, beta, dampening, beta2, epsilon)
    state = _check_state([params] if single else params, momentum, second, rows, rule, single)
    parts = None if segments is None else bounds
    factors = _check_factors(weights, len(state), parts, len(rows), single)
    clipping = _clipping(factors, updates, gram, parts, max_norm, backend)  # [M]
    with torch.no_grad():
        if use_native(backend, rows[0].device):
            columns = [list(column) for column in zip(*state, strict=True)]
            sums = _native_step(columns, rows, factors * clipping[:, None, None], bounds, rule, cpu_execution(updates))
            stats = [StepStats(*pair, factor) for pair, factor in zip(sums, clipping.tolist(), strict=True)]
        else:
            stats = _reference_step(state, rows, factors, parts, rule, max_norm)
    return stats[0] if single else stats


def _reference_step(
    state: list[State], rows: list[Tensor], factors: Tensor, parts: list[int] | None, rule: _Rule,
    max_norm: float | None,
) -> list[StepStats]:  # fmt: skip
    params, momentum, second = (list(column) for column in zip(*state, strict=True))
    stats = reference.server_step(
        params, momentum, rows, factors, second=second, max_norm=max_norm, segments=parts, **asdict(rule)
    )
    assert isinstance(stats, list)
    return stats


def _check_rule(
    optimizer: Optimizer, lr: float, beta: float, dampening: float | None, beta2: float, epsilon: float
) -> _Rule:
    if optimizer not in _OPTIMIZER_CODES:
        raise ValueError(f"`optimizer` should be one of {tuple(_OPTIMIZER_CODES)}. Got {optimizer!r}")
    lr, beta = check_number("lr", lr), check_number("beta", beta)
    if dampening is None:
        dampening = 0.0 if optimizer == "sgd" else beta
    beta2, epsilon = check_number("beta2", beta2), check_number("epsilon", epsilon)
    if not 0 <= beta2 <= 1:
        raise ValueError(f"`beta2` should be between 0 and 1. Got {beta2}")
    if epsilon <= 0 and optimizer != "sgd":
        raise ValueError(f"`epsilon` should be above 0. Got {epsilon}")
    return _Rule(optimizer, lr, beta, check_number("dampening", dampening), beta2, epsilon)


def _check_state(params: Any, momentum: Any, second: Any, rows: list[Tensor], rule: _Rule, single: bool) -> list[State]:
    """Parameters, momentum and second moment of each target."""
    count = len(params)
    if count == 0:
        raise ValueError("`params` should hold at least one tensor. Got none")
    columns = {"params": list(params)}
    for name, value in (("momentum", momentum), ("second", second)):
        values = [value] * count if single or value is None else value
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"`{name}` should be a list where `params` is one. Got {type(values).__name__}")
        if len(values) != count:
            raise ValueError(f"`{name}` should hold one tensor a parameter vector, {count}. Got {len(values)}")
        columns[name] = list(values)
    _check_presence(columns, rule)
    written = []
    for name, values in columns.items():
        for m, value in enumerate(values):
            if value is not None:
                label = name if single else f"{name}[{m}]"
                values[m] = check_written(label, value, rows[0], "updates[0]", (torch.float32,))
                written.append((label, values[m]))
    check_no_overlap(written, named(rows))
    return list(zip(columns["params"], columns["momentum"], columns["second"], strict=True))


def _check_presence(columns: dict[str, list[Any]], rule: _Rule) -> None:
    if rule.beta != 0.0 and any(value is None for value in columns["momentum"]):
        raise ValueError(f"`momentum` should be a tensor where beta is not 0. Got None, beta = {rule.beta}")
    if rule.optimizer == "sgd" and any(value is not None for value in columns["second"]):
        raise ValueError("`second` should be None with sgd. Got a tensor")
    if rule.optimizer != "sgd" and any(value is None for value in columns["second"]):
        raise ValueError(f"`second` should be a tensor with {rule.optimizer}. Got None")


def _check_factors(weights: Any, targets: int, parts: list[int] | None, updates: int, single: bool) -> Tensor:
    """Weights as `[M, S, N]` float64."""
    segments = () if parts is None else (len(parts) - 1,)
    shape = (*(() if single else (targets,)), *segments, updates)
    return check_weights(weights, shape).view(targets, *(segments or (1,)), updates)


def _clipping(
    factors: Tensor,
    updates: Sequence[Any],
    gram: Tensor | None,
    segments: list[int] | None,
    max_norm: float | None,
    backend: Backend,
) -> Tensor:
    """Factor of each target that keeps |d| within max_norm, `[M]`; |d|^2 = sum_s w_s^T G_s w_s."""
    if max_norm is None:
        return torch.ones(len(factors), dtype=torch.float64)
    if check_number("max_norm", max_norm) <= 0:
        raise ValueError(f"`max_norm` should be above 0. Got {max_norm}")
    _, parts, count = factors.shape
    if gram is None:
        gram = gramian(updates, segments=segments, backend=backend)
    grams = check_gram(gram, (count, count) if segments is None else (parts, count, count)).cpu()
    grams = grams.view(parts, count, count)
    norms = torch.einsum("msi,sij,msj->m", factors, grams, factors).clamp_min(0).sqrt()
    # A norm that is not finite clips nothing: the count of non-finite values tells.
    return torch.where((norms > max_norm) & torch.isfinite(norms), max_norm / norms, torch.ones_like(norms))


def _native_step(
    columns: list[list[Any]],
    rows: list[Tensor],
    weights: Tensor,
    bounds: list[int],
    rule: _Rule,
    execution: tuple[int, bool],
) -> list[tuple[float, int]]:
    """Runs the native step; returns norm and non-finite count of each target."""
    extension, device = _native.extension(), rows[0].device
    arguments = (
        [[0 if value is None else value.data_ptr() for value in column] for column in columns],
        [row.data_ptr() for row in rows],
        DTYPE_CODES[rows[0].dtype],
        bounds,
        weights.flatten().tolist(),
        (_OPTIMIZER_CODES[rule.optimizer], rule.lr, rule.beta, 1.0 - rule.dampening, rule.beta2, rule.epsilon),
    )
    if runs_cuda_kernels(device):
        size = extension.server_step_workspace_bytes(*arguments)
        _workspace, launch = cuda_launch(size, device)
        sums = torch.empty(len(weights), 2, dtype=torch.float64, device=device)
        extension.server_step_cuda(*arguments, sums.data_ptr(), launch)
        pairs = sums.tolist()
    else:
        pairs = extension.server_step_cpu(*arguments, execution)
    return [(abs(rule.lr) * math.sqrt(squares), int(nonfinite)) for squares, nonfinite in pairs]
