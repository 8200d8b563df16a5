"""Memory for flat buffers, in huge pages where the system has them."""

from __future__ import annotations

import mmap
import sys

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20  # bytes, of x86-64 and of most arm64 kernels
_WORTH_IT = 2 * _HUGE_PAGE


def empty_buffer(length: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """A vector without values for parameters, state or updates.

    Operations on buffers far larger than the caches wait for address translation: with pages of 4 KiB each of many
    rows needs a new entry every thousand elements. A large buffer on a Linux CPU therefore asks for huge pages, which
    the kernel gives unless transparent huge pages are switched off ("never"). Everywhere else this is
    :func:`torch.empty`.

    Args:
        length: Number of elements, P.
        dtype: Of the elements.
        device: Default CPU.

    Returns:
        `[P]`
    """
    size = length * dtype.itemsize
    on_cpu = device is None or torch.device(device).type == "cpu"
    if not (on_cpu and sys.platform == "linux" and size >= _WORTH_IT):
        return torch.empty(length, dtype=dtype, device=device)
    # A whole page more, so that the buffer can start where a huge page does.
    pages = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    start = torch.frombuffer(pages, dtype=torch.uint8, count=1).data_ptr()
    return torch.frombuffer(pages, dtype=dtype, count=length, offset=-start % _HUGE_PAGE)


def zero_buffer(like: Tensor) -> Tensor:
    """As :func:`empty_buffer`, like another buffer, of zeros  # [P]"""
    return empty_buffer(like.numel(), like.dtype, like.device).zero_()


def copy_buffer(source: Tensor) -> Tensor:
    """As :func:`empty_buffer`, with the values of another buffer  # [P]"""
    return empty_buffer(source.numel(), source.dtype, source.device).copy_(source)
