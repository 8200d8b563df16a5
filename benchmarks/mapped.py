"""Updates in files, and what reading those files costs at least."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from measure import Inputs, Work
from torch import Tensor

from fedcmt.ops import MappedUpdates

_BUFFER = 1 << 20
_MARGIN = 1 << 30  # of the disk, left free


class MappedInputs(Inputs):
    """Updates in raw files of a temporary folder, which goes with this object.

    The files hold the same random values, each file shifted, so that writing many of them does not take minutes.

    Raises:
        OSError: The disk has too little room; nothing is written then.
    """

    def __init__(self, count: int, length: int) -> None:
        super().__init__(count, length)
        self._folder = Path(tempfile.mkdtemp(prefix="fedcmt-benchmark-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self.paths: list[Path] = []
        self._mapped: MappedUpdates | None = None

    def rows(self, dtype: torch.dtype) -> Sequence[Tensor]:
        """The updates as float32 in files, written when first asked for  # N x [P]"""
        if dtype != torch.float32:
            raise ValueError(f"`dtype` should be float32. Got {dtype}")
        if self._mapped is None:
            self._write()
            self._mapped = MappedUpdates(self.paths)
        return self._mapped

    def _write(self) -> None:
        needed = self.count * self.length * 4
        free = shutil.disk_usage(self._folder).free
        if needed + _MARGIN > free:
            raise OSError(f"The files need {needed / 1e9:.1f} GB. {free / 1e9:.1f} GB are free in {self._folder}")
        values = next(self.made_rows()).numpy()
        for i in range(self.count):
            path = self._folder / f"update_{i}.bin"
            with path.open("wb") as file:
                file.write(values[i:].data)
                file.write(values[:i].data)
            self.paths.append(path)


def read_files(inputs: MappedInputs, dtype: torch.dtype) -> Work:
    """Reads each file once through a small buffer."""
    inputs.rows(dtype)
    buffer = bytearray(_BUFFER)

    def work() -> None:
        for path in inputs.paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return work
