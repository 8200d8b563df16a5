"""Operations on arriving updates and small shared parts: weighted means by group, screening."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedcmt.ops import _native, reference
from fedcmt.ops._arguments import (
    DTYPE_CODES,
    check_no_overlap,
    check_ragged_updates,
    check_update,
    check_weights,
    check_written,
)
from fedcmt.ops._backend import Backend, cpu_execution, cuda_launch, runs_cuda_kernels, use_native
from fedcmt.ops._stats import ScreenStats
from fedcmt.ops.buffers import empty_buffer


def weighted_mean(
    updates: Sequence[Any], weights: Any, masks: Any = None, *, backend: Backend = "auto"
) -> Tensor | list[Tensor]:
    """Weighted mean of the updates, or of several groups of them in one launch.

    Groups may differ in length: adaptors of clients with different numbers of channels, say.

    Equivalent to: `(weights / weights.sum()) @ torch.stack(updates)`, for each mask over its members.

    Args:
        updates: N >= 1 tensors or arrays, float32, bfloat16 or float16, on one device  # [P]
        weights: Non-negative weight of each update, such as its number of cases  # [N]
        masks: Who belongs to each of M groups; without masks all are one group  # [M, N] bool
        backend: "auto", "native" or "reference".

    Returns:
        The float32 mean, or a list of M means where masks are given  # [P]

    Raises:
        TypeError, ValueError: Updates of a group that differ in length, negative weights, a group
            without members or without weight.
        ImportError: backend is "native" and the extension, or its CUDA part, is missing.

    Source: FedAvg (McMahan et al., AISTATS 2017, algorithm 1), the server's mean.
    """
    rows = check_ragged_updates(updates)
    factors = check_weights(weights, (len(rows),))
    if bool((factors < 0).any()):
        raise ValueError(f"`weights` should not be negative. Got {factors.min().item()}")
    members = _check_masks(masks, rows)
    shares = members * factors  # [M, N]
    totals = shares.sum(dim=1)
    if not bool((totals > 0).all()):
        raise ValueError(f"`weights` should not be all zero in a group. Got zeros in group {int(totals.argmin())}")
    shares = shares / totals[:, None]
    with torch.no_grad():
        if use_native(backend, rows[0].device):
            means = _native_means(rows, shares, members, cpu_execution(updates))
        else:
            return reference.weighted_mean(rows, factors, None if masks is None else members)
    return means[0] if masks is None else means


def _check_masks(masks: Any, rows: list[Tensor]) -> Tensor:
    """Masks `[M, N]` bool on the CPU whose groups have members of one length."""
    count = len(rows)
    members = torch.ones(1, count, dtype=torch.bool) if masks is None else torch.as_tensor(masks).cpu()
    if members.dtype != torch.bool or members.dim() != 2 or members.shape[1] != count or len(members) == 0:
        raise ValueError(f"`masks` should be bool of shape (M, {count}). Got {members.dtype}, {tuple(members.shape)}")
    for m, mask in enumerate(members.tolist()):
        lengths = {row.numel() for row, member in zip(rows, mask, strict=True) if member}
        if len(lengths) != 1:
            found = "no member" if not lengths else f"lengths {sorted(lengths)}"
            raise ValueError(f"`updates` of group {m} should have one length. Got {found}")
    return members


def _native_means(rows: list[Tensor], shares: Tensor, masks: Tensor, execution: tuple[int, bool]) -> list[Tensor]:
    extension, device = _native.extension(), rows[0].device
    means, tasks = [], []
    for weights, mask in zip(shares.tolist(), masks.tolist(), strict=True):
        members = [i for i, member in enumerate(mask) if member]
        length = rows[members[0]].numel()
        means.append(empty_buffer(length, device=device))
        pointers = [rows[i].data_ptr() for i in members]
        tasks.append((means[-1].data_ptr(), pointers, [weights[i] for i in members], length))
    code = DTYPE_CODES[rows[0].dtype]
    if runs_cuda_kernels(device):
        _workspace, launch = cuda_launch(extension.weighted_mean_workspace_bytes(tasks, code), device)
        extension.weighted_mean_cuda(tasks, code, launch)
    else:
        extension.weighted_mean_cpu(tasks, code, execution)
    return means


def screen(update: Any, *, into: Any = None, backend: Backend = "auto") -> ScreenStats:
    """Finite check, norm and scale of an arriving update in one pass, also while it is copied.

    `into` may have another of the three dtypes: an update that arrives in float32 can rest in
    bfloat16, or the other way round. Values are rounded to nearest even and measured as stored, so a
    value too large for float16 counts as non-finite. Parts of an update can be screened as they
    arrive, into views of the buffer; their stats add up.

    Equivalent to: `into.copy_(update)`, then `(~into.isfinite()).sum(), into[into.isfinite()].norm(),
    into[into.isfinite()].abs().max()`

    Args:
        update: Tensor or array, float32, bfloat16 or float16  # [P]
        into: Where to copy it, on its device  # [P]
        backend: "auto", "native" or "reference".

    Raises:
        TypeError, ValueError: Arguments that do not fit each other, or that share memory.
        ImportError: backend is "native" and the extension, or its CUDA part, is missing.
    """
    source = check_update("update", update)
    target = None
    if into is not None:
        target = check_written("into", into, source, "update", tuple(DTYPE_CODES))
        check_no_overlap([("into", target)], [("update", source)])
    with torch.no_grad():
        if not use_native(backend, source.device):
            return reference.screen(source, into=target)
        nonfinite, squares, largest = _native_screen(source, target)
    return ScreenStats(int(nonfinite), math.sqrt(squares), float(largest))


def _native_screen(source: Tensor, target: Tensor | None) -> tuple[float, float, float]:
    extension = _native.extension()
    stored = source if target is None else target
    arguments = (
        source.data_ptr(),
        DTYPE_CODES[source.dtype],
        0 if target is None else target.data_ptr(),
        DTYPE_CODES[stored.dtype],
        source.numel(),
    )
    if runs_cuda_kernels(source.device):
        _workspace, launch = cuda_launch(extension.screen_workspace_bytes(*arguments), source.device)
        sums = torch.empty(3, dtype=torch.float64, device=source.device)
        extension.screen_cuda(*arguments, sums.data_ptr(), launch)
        nonfinite, squares, largest = sums.tolist()
        return nonfinite, squares, largest
    result: tuple[float, float, float] = extension.screen_cpu(*arguments, cpu_execution())
    return result
