"""The server's operations on flat updates, those on training patches, and two of prediction.

Each has a torch definition of the same name in `fedcmt.ops.reference` and native ones, in C++ for
CPUs and, but for `logits_to_labels` and `instance_norm_`, in CUDA. `backend` chooses: "native" never falls back,
"reference" is plain torch, and "auto" is native where the extension (and, for CUDA tensors, its CUDA part) is there.

Updates are torch tensors, NumPy or CuPy arrays, or anything with DLPack: nothing is copied.
"""

from __future__ import annotations

from fedcmt.ops._backend import Backend, BackendInfo, backend_info
from fedcmt.ops._gram import gramian, gramian_append, project_conflicts, restore_norms
from fedcmt.ops._intensity import change_intensities, gaussian_taps
from fedcmt.ops._labels import logits_to_labels
from fedcmt.ops._means import screen, weighted_mean
from fedcmt.ops._norm import instance_norm_
from fedcmt.ops._patch import patch_affine, warp_patch
from fedcmt.ops._stats import ScreenStats, StepStats
from fedcmt.ops._step import Optimizer, server_step
from fedcmt.ops.buffers import copy_buffer, empty_buffer, zero_buffer
from fedcmt.ops.mapped import MappedUpdates

__all__ = [
    "Backend",
    "BackendInfo",
    "MappedUpdates",
    "Optimizer",
    "ScreenStats",
    "StepStats",
    "backend_info",
    "change_intensities",
    "copy_buffer",
    "empty_buffer",
    "gaussian_taps",
    "gramian",
    "gramian_append",
    "instance_norm_",
    "logits_to_labels",
    "patch_affine",
    "project_conflicts",
    "restore_norms",
    "screen",
    "server_step",
    "warp_patch",
    "weighted_mean",
    "zero_buffer",
]
