"""The floor: reading each byte once, and writing it where the operation writes.

No library's reduction reads as fast as one core can (`torch.sum` least of all), so the floor is a loop of its own in
C, in several variants: whole rows one after the other or pieces of all rows in turn, with and without prefetching or
writing past the caches. The fastest on the data at hand counts.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

_TRIES = 3
_CHUNKS = (256, 4096)  # elements of one row before the next row's turn; whole rows besides


class _Rows(ctypes.Structure):
    _fields_ = (
        ("reads", ctypes.c_void_p),
        ("num_reads", ctypes.c_long),
        ("read_size", ctypes.c_long),
        ("updates", ctypes.c_void_p),
        ("num_updates", ctypes.c_long),
        ("writes", ctypes.c_void_p),
        ("num_writes", ctypes.c_long),
        ("write_size", ctypes.c_long),
    )


class _Variant(ctypes.Structure):
    _fields_ = (("chunk", ctypes.c_long), ("prefetch", ctypes.c_int), ("streaming", ctypes.c_int))


class Floor:
    """Touches tensors of one length once.

    Args:
        reads: Tensors of one dtype that are only read  # [P]
        updates: Float32 tensors that are read and written; their values stay  # [P]
        writes: Tensors of one dtype that are only written, with zeros  # [P]
        threads: Threads that share the work.
    """

    def __init__(
        self, reads: Sequence[Tensor], updates: Sequence[Tensor] = (), writes: Sequence[Tensor] = (), threads: int = 1
    ) -> None:
        self._tensors = [*reads, *updates, *writes]  # keeps them alive
        self._length = self._tensors[0].numel()
        self._tables = [_pointers(rows) for rows in (reads, updates, writes)]
        addresses = [ctypes.cast(table, ctypes.c_void_p) for table in self._tables]
        read_size, write_size = (rows[0].element_size() if rows else 4 for rows in (reads, writes))
        self._rows = _Rows(
            addresses[0], len(reads), read_size, addresses[1], len(updates), addresses[2], len(writes), write_size
        )
        self._touch = _library().touch
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._threads = threads
        streaming = (False, True) if writes else (False,)
        chunks = [chunk for chunk in (*_CHUNKS, max(self._length, 1)) if chunk <= max(self._length, 1)]
        variants = itertools.product(chunks, (False, True), streaming)
        self._chosen = min((_Variant(*options) for options in variants), key=self._fastest)

    @property
    def variant(self) -> str:
        """The variant that was the fastest, in words."""
        whole = self._chosen.chunk >= self._length
        words = ["rows one after the other" if whole else f"{self._chosen.chunk} elements of each row in turn"]
        words += ["prefetched"] * self._chosen.prefetch + ["written past the caches"] * self._chosen.streaming
        return ", ".join(words)

    def __call__(self) -> None:
        self._run(self._chosen)

    def _fastest(self, variant: _Variant) -> float:
        # CPU time is less disturbed by other processes, but that of one thread does not tell of two.
        clock = time.thread_time if self._threads == 1 else time.perf_counter
        times = []
        for _ in range(_TRIES):
            begin = clock()
            self._run(variant)
            times.append(clock() - begin)
        return min(times)

    def _run(self, variant: _Variant) -> None:
        bounds = [self._length * part // self._threads for part in range(self._threads + 1)]
        rows, chosen = ctypes.byref(self._rows), ctypes.byref(variant)
        if self._pool is None:
            self._touch(rows, chosen, 0, self._length, 0)
        else:
            list(self._pool.map(lambda part: self._touch(rows, chosen, *part, 0), itertools.pairwise(bounds)))


def _pointers(rows: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(rows))(*[row.data_ptr() for row in rows])


@functools.cache
def _library() -> ctypes.CDLL:
    """The C loop, compiled for this processor.

    Raises:
        RuntimeError: There is no C compiler: without a floor there is nothing to compare with.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("The benchmarks' floor needs a C compiler on PATH. Got none of cc, gcc, clang")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "floor.so"
        source = Path(__file__).with_name("floor.c")
        subprocess.run([compiler, "-O3", "-march=native", "-shared", "-fPIC", source, "-o", target], check=True)
        library = ctypes.CDLL(str(target))
    long = ctypes.c_long
    library.touch.argtypes = [ctypes.POINTER(_Rows), ctypes.POINTER(_Variant), long, long, ctypes.c_int64]
    library.touch.restype = ctypes.c_int64
    return library
