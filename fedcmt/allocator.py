"""The C library's allocator, told that large arrays come and go."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h


def reuse_large_blocks(up_to: int = 2**30, *, one_heap: bool = False) -> bool:
    """Let a process keep freed blocks for the next array of that size.

    By default glibc gives each feature map of a network back to the system and asks for the next one anew, zeroed page
    by page: a fifth of a prediction's CPU time. The setting is the whole process's, so that commands make it and the
    library does not.

    Args:
        up_to: Bytes; larger blocks are given back.
        one_heap: Keep one heap for all threads begun later, in place of one for each that has freed a block.

    Returns:
        Whether this C library knows the settings.
    """
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    options = [(_M_MMAP_THRESHOLD, up_to), (_M_TRIM_THRESHOLD, up_to), *([(_M_ARENA_MAX, 1)] if one_heap else [])]
    return all(mallopt(option, value) == 1 for option, value in options)


def give_back_freed_blocks() -> None:
    """Return memory that is free, but kept, to the system; with another C library than glibc nothing happens.

    Takes some milliseconds. Between steps that need arrays of different sizes it lowers the peak.
    """
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where it has none of that name."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # not glibc
        return None
    return found
