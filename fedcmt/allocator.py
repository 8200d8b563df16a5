"""The C library's allocator, told that large arrays come and go."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 2**30


def reuse_large_blocks() -> bool:
    """Let a process keep freed blocks of up to 1 GiB for the next array of that size.

    By default glibc gives each feature map of a network back to the system and asks for the next one anew, zeroed page
    by page: a fifth of a prediction's CPU time. The setting is the whole process's, so that commands make it and the
    library does not.

    Returns:
        Whether this C library knows the settings.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return all(mallopt(option, _KEPT_BYTES) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def give_back_freed_blocks() -> None:
    """Return memory that is free, but kept, to the system; with another C library than glibc nothing happens.

    Takes some milliseconds. Between steps that need arrays of different sizes it lowers the peak.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    trim(0)
