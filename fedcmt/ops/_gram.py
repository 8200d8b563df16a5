"""Inner products of updates, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedcmt.ops import _native, reference
from fedcmt.ops._arguments import (
    DTYPE_CODES,
    check_gram,
    check_number,
    check_segments,
    check_updates,
    check_weights,
)
from fedcmt.ops._backend import Backend, cpu_execution, cuda_launch, runs_cuda_kernels, use_native

Segments = Sequence[int] | Tensor


def gramian(updates: Sequence[Any], *, segments: Segments | None = None, backend: Backend = "auto") -> Tensor:
    """Gram matrix of the updates in one pass: G[i, j] = <updates[i], updates[j]>.

    Products and sums are float64 (a product of two float32 values is then exact), so the result
    does not suffer from the length of the updates. The result is the same, bit for bit, for any
    number of threads.

    Equivalent to: `x = torch.stack(updates).double(); x @ x.T`

    Args:
        updates: N >= 1 tensors or arrays, float32, bfloat16 or float16, on one device  # [P]
        segments: Bounds 0 = b_0 <= ... <= b_S = P of consecutive parts such as layers; then there is
            one matrix for each part, from the same single pass. Their sum is the whole matrix.
        backend: "auto", "native" or "reference".

    Returns:
        Symmetric float64 matrix on the updates' device  # [N, N], with segments [S, N, N]

    Raises:
        TypeError: Something else than tensors of one of the three dtypes.
        ValueError: No updates, or updates that differ or are not 1-D and contiguous, or segments
            that do not rise from 0 to P.
        ImportError: backend is "native" and the extension, or its CUDA part, is missing.

    Source: conflict-averse combinations need no more of the updates than this matrix (CAGrad,
    arXiv 2110.14048, section 3; ours is computed without stacking the updates).
    """
    rows = check_updates(updates)
    bounds = check_segments(segments, rows[0].numel())
    if not use_native(backend, rows[0].device):
        return reference.gramian(rows, segments=None if segments is None else bounds)
    grams = _native_products("gramian", rows, bounds, (len(rows), len(rows)), cpu_execution(updates))
    return grams[0] if segments is None else grams


def gramian_append(
    gram: Tensor | None,
    updates: Sequence[Any],
    update: Any,
    *,
    segments: Segments | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The Gram matrix of the updates and one more, from the matrix without it.

    Reads each update once, so the whole matrix of N updates costs more than `gramian`, but each part
    of the work is done when its update arrives, while the network brings the next one.

    Equivalent to: `gramian([*updates, update])`, bit for bit on a CPU.

    Args:
        gram: Gram matrix of `updates`; ignored when there are none  # [N, N] or [S, N, N]
        updates: N >= 0 tensors or arrays that have arrived before  # [P]
        update: The next one  # [P]
        segments: As for `gramian`.
        backend: "auto", "native" or "reference".

    Returns:
        Symmetric float64 matrix on the updates' device  # [N + 1, N + 1] or [S, N + 1, N + 1]

    Raises:
        TypeError, ValueError, ImportError: As for `gramian`; also for a matrix that does not fit.
    """
    rows = check_updates([*updates, update])
    count = len(rows)
    bounds = check_segments(segments, rows[0].numel())
    leading = () if segments is None else (len(bounds) - 1,)
    if count > 1:
        check_gram(gram, (*leading, count - 1, count - 1))
    if not use_native(backend, rows[0].device):
        return reference.gramian_append(gram, rows[:-1], rows[-1], segments=None if segments is None else bounds)
    row = _native_products("gramian_row", rows, bounds, (count,), cpu_execution(updates))
    return reference.grown(gram, row.view(*leading, count))


def _native_products(
    name: str, rows: Sequence[Tensor], bounds: list[int], shape: tuple[int, ...], execution: tuple[int, bool]
) -> Tensor:
    extension, device = _native.extension(), rows[0].device
    result = torch.empty(len(bounds) - 1, *shape, dtype=torch.float64, device=device)
    arguments = ([row.data_ptr() for row in rows], DTYPE_CODES[rows[0].dtype], bounds)
    if runs_cuda_kernels(device):
        size = getattr(extension, f"{name}_workspace_bytes")(*arguments)
        _workspace, launch = cuda_launch(size, device)
        getattr(extension, f"{name}_cuda")(*arguments, result.data_ptr(), launch)
    else:
        getattr(extension, f"{name}_cpu")(*arguments, result.data_ptr(), execution)
    return result


def project_conflicts(gram: Tensor, *, order: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """PCGrad's projections, computed from the Gram matrix alone: no pass over the updates.

    Each update is projected in turn onto the normal plane of every other update it conflicts with.

    Equivalent to: `rows = torch.eye(n)`, then for each i and each j of order[i] but i itself,
    `inner = rows[i] @ gram[:, j]; rows[i, j] -= inner / gram[j, j]` where inner < 0.

    Args:
        gram: Gram matrix, or one a segment  # [N, N] or [S, N, N] float64
        order: Row i is the sequence in which update i meets the others (i itself is passed over);
            default 0, 1, ..., N - 1. PCGrad draws random permutations.  # [N, N] int64
        backend: "auto", "native" or "reference".

    Returns:
        Row i holds the factors of the N updates in the projected update i, so `w @ result` are the
        weights of the combined projected updates  # like gram, float64

    Raises:
        TypeError, ValueError: A matrix or an order that does not fit.
        ImportError: backend is "native" and the extension, or its CUDA part, is missing.

    Source: PCGrad (Yu et al., NeurIPS 2020, arXiv 2001.06782, algorithm 1).
    """
    if not isinstance(gram, Tensor) or gram.dim() not in (2, 3):
        raise TypeError("`gram` should be a tensor of shape [N, N] or [S, N, N]")
    count = gram.shape[-1]
    grams = check_gram(gram, (*gram.shape[:-2], count, count))
    if not use_native(backend, gram.device):
        return reference.project_conflicts(grams, order=None if order is None else _check_order(order, count))
    grams = grams.reshape(-1, count, count).contiguous()
    order = _check_order(order, count).to(gram.device)
    result = torch.empty_like(grams)
    arguments = (grams.data_ptr(), len(grams), count, order.data_ptr(), result.data_ptr())
    if runs_cuda_kernels(gram.device):
        _workspace, launch = cuda_launch(0, gram.device)
        _native.extension().project_conflicts_cuda(*arguments, launch)
    else:
        _native.extension().project_conflicts_cpu(*arguments)
    return result.view(gram.shape)


def _check_order(order: Tensor | None, count: int) -> Tensor:
    if order is None:
        return torch.arange(count).expand(count, count).contiguous()
    if not isinstance(order, Tensor) or order.dtype != torch.int64 or tuple(order.shape) != (count, count):
        raise ValueError(f"`order` should be an int64 tensor of shape {(count, count)}")
    if not torch.equal(order.cpu().sort(dim=1).values, torch.arange(count).expand(count, count)):
        raise ValueError(f"`order` should hold permutations of 0 to {count - 1} in its rows")
    return order.contiguous()


def restore_norms(weights: Any, gram: Tensor, *, limit: float | None = None) -> Tensor:
    """Scales rows of mixing weights so that mixing nearly orthogonal updates does not shorten them.

    s_m = sum_j W[m, j] sqrt(G[j, j]) / sqrt((W G W^T)[m, m]), at most `limit`; row m becomes s_m W[m].

    Args:
        weights: Non-negative mixing weights  # [M, N] or, with a matrix a segment, [M, S, N]
        gram: Gram matrix, or one a segment  # [N, N] or [S, N, N] float64
        limit: Largest factor; sqrt(N) is what orthogonal updates of equal length need.

    Returns:
        The scaled weights on the CPU, for `server_step`  # like weights, float64

    Raises:
        TypeError, ValueError: Shapes that do not fit, or a limit below 0.
    """
    if not isinstance(gram, Tensor) or gram.dim() not in (2, 3):
        raise TypeError("`gram` should be a tensor of shape [N, N] or [S, N, N]")
    rows = torch.as_tensor(weights, dtype=torch.float64)
    rows = check_weights(rows, (len(rows), *gram.shape[:-1]))
    if limit is not None and check_number("limit", limit) < 0:
        raise ValueError(f"`limit` should not be negative. Got {limit}")
    grams = check_gram(gram, tuple(gram.shape)).cpu()
    wanted = (rows * grams.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()).sum(-1)  # [M] or [M, S]
    mixed = torch.einsum("m...i,...ij,m...j->m...", rows, grams, rows).clamp_min(0).sqrt()
    factors = torch.where(mixed > 0, wanted / mixed, torch.ones_like(mixed))
    if limit is not None:
        factors = factors.clamp_max(limit)
    return rows * factors[..., None]
