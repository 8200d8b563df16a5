"""Updates that rest in files: more of them than memory holds."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor


class MappedUpdates(Sequence[Tensor]):
    """N updates in raw files, read from disk (or the page cache) while an operation runs over them.

    Pass it as `updates` to `gramian`, `server_step` or `weighted_mean`: the results are those of the
    same tensors in memory, bit for bit. The native CPU operations give pages back as soon as they
    have been read, so the memory in use stays at some tens of MB whatever N and P are. The torch
    reference reads the same files but leaves the pages to the operating system.

    Args:
        paths: One file an update: its values, little-endian, and nothing else.
        dtype: float32, bfloat16 or float16.

    Raises:
        OSError: A file cannot be opened.
        ValueError: No file, or files that differ in size or do not hold whole values.
    """

    release_pages = True

    def __init__(self, paths: Sequence[Path | str], dtype: torch.dtype = torch.float32) -> None:
        if not paths:
            raise ValueError("`paths` should name at least one file. Got none")
        sizes = {Path(path).stat().st_size for path in paths}
        if len(sizes) != 1:
            raise ValueError(f"`paths` should be files of one size. Got sizes {sorted(sizes)}")
        (size,) = sizes
        if size % dtype.itemsize:
            raise ValueError(f"`paths` should hold whole values of {dtype}. Got {size} bytes")
        self._rows = [_mapped(Path(path), size, dtype) for path in paths]

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        """An update as a read-only tensor over its file  # [P]"""
        return self._rows[index]

    def __len__(self) -> int:
        """N."""
        return len(self._rows)


def _mapped(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    if size == 0:
        return torch.empty(0, dtype=dtype)
    with path.open("rb") as file:
        # A private mapping: torch wants a writable buffer, and a write must never reach the file.
        pages = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    pages.madvise(mmap.MADV_SEQUENTIAL)
    return torch.frombuffer(pages, dtype=dtype)
