"""Regions of nnU-Net's preprocessed cases, decompressed straight from its blosc2 files."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import blosc2
import numpy as np
import numpy.typing as npt

from fedcmt.data.geometry import Reading
from fedcmt.data.sampling import LabelKey, Size
from fedcmt.errors import InputError

Image: TypeAlias = npt.NDArray[np.float32]  # [C, D, H, W]
Labels: TypeAlias = npt.NDArray[np.int16]  # [D, H, W]

OUTSIDE = -1  # label of voxels outside the case, and outside the mask that nnU-Net normalised within
_MOST_OPEN = 32  # cases; each holds two file handles
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("collections", "OrderedDict"),
}


@dataclass(frozen=True)
class Case:
    """An opened case.

    Attributes:
        image: blosc2 array `[C, D, H, W]` float32.
        labels: blosc2 array `[1, D, H, W]` int8 or int16.
        foreground: Label or region -> some voxels of it, `[n, 3]`.
        stamps: Size and time of the files when they were opened.
    """

    image: Any
    labels: Any
    foreground: Mapping[LabelKey, np.ndarray]
    stamps: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> Size:
        """`(D, H, W)`."""
        _, depth, height, width = self.image.shape
        return depth, height, width


class CaseReader:
    """Reads regions of a client's cases. Cases stay open; one reader serves one thread.

    Args:
        folder: nnU-Net's preprocessed cases.
        channels: That every case should have.
        client: For messages.
    """

    def __init__(self, folder: Path, channels: int, client: str) -> None:
        self._folder, self._channels, self._client = folder, channels, client
        self._open: OrderedDict[str, Case] = OrderedDict()
        blosc2.set_nthreads(1)  # the calls without a number of their own would take every core

    def case(self, name: str) -> Case:
        """The opened case.

        Raises:
            InputError: A file is missing, cannot be read, or does not fit the others.
        """
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        case = self._opened(name)
        if case.image.shape[0] != self._channels:
            raise self._fault(name, f"{case.image.shape[0]} channels, expected {self._channels}")
        if case.image.shape[1:] != case.labels.shape[1:]:
            raise self._fault(name, f"image of {case.image.shape[1:]} voxels, labels of {case.labels.shape[1:]}")
        self._open[name] = case
        if len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)
        return case

    def read(self, name: str, part: Reading) -> tuple[Image, Labels]:
        """A part of a case, padded with 0 (image) and -1 (labels) where it reaches beyond.

        Returns:
            Image `[C, d, h, w]` and labels `[d, h, w]`, writable and contiguous.

        Raises:
            InputError: A file cannot be read or the image holds a number that is not finite.
        """
        case = self.case(name)
        inside = [
            slice(max(low, 0), min(low + extent, end))
            for low, extent, end in zip(part.corner, part.size, case.shape, strict=True)
        ]
        place = tuple(slice(s.start - low, s.stop - low) for s, low in zip(inside, part.corner, strict=True))
        try:
            # To read a mapped file that has become shorter would end the process. Asking also lets a mount that no
            # longer answers block this thread alone, where the watchdog sees it, and not Python's lock.
            if self._stamps(name) != case.stamps:
                raise self._fault(name, "its files have changed since they were opened")
            image, labels = self._padded(case.image, case.labels, inside, place, part.size)
        except FileNotFoundError as error:
            raise self._fault(name, f"{Path(error.filename).name} is missing") from error
        except (RuntimeError, OSError) as error:
            raise self._fault(name, f"a file is damaged ({error})") from error
        # A sum finds NaN and Inf in one pass without a temporary; where it overflows, the exact look decides.
        if not np.isfinite(image.sum(dtype=np.float32)) and not np.isfinite(image).all():
            raise self._fault(name, "the image holds NaN or Inf")
        return image, labels

    def whole(self, name: str) -> Image:
        """The whole image of a case, `[C, D, H, W]`."""
        return self.read(name, Reading((0, 0, 0), self.case(name).shape))[0]

    @staticmethod
    def _padded(
        image: Any, labels: Any, inside: list[slice], place: tuple[slice, ...], size: Size
    ) -> tuple[Image, Labels]:
        channels = image.shape[0]
        if any(s.stop <= s.start for s in inside):  # the region lies beside the case
            return np.zeros((channels, *size), np.float32), np.full(size, OUTSIDE, np.int16)
        voxels = image[(slice(None), *inside)]
        marks = labels[(slice(0, 1), *inside)][0].astype(np.int16, copy=False)
        if voxels.shape[1:] == size:
            return voxels, marks
        padded, padded_marks = np.zeros((channels, *size), np.float32), np.full(size, OUTSIDE, np.int16)
        padded[(slice(None), *place)] = voxels
        padded_marks[place] = marks
        return padded, padded_marks

    def _opened(self, name: str) -> Case:
        try:
            stamps = self._stamps(name)
            image, labels = (_array(path) for path in self._files(name))
            properties = _properties(self._folder / f"{name}.pkl")
            foreground = {_key(key): _voxels(value) for key, value in properties["class_locations"].items()}
        except FileNotFoundError as error:
            raise self._fault(name, f"{Path(error.filename).name} is missing") from error
        except (RuntimeError, OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise self._fault(name, f"a file is damaged ({error})") from error
        return Case(image, labels, foreground, stamps)

    def _files(self, name: str) -> tuple[Path, Path]:
        return self._folder / f"{name}.b2nd", self._folder / f"{name}_seg.b2nd"

    def _stamps(self, name: str) -> tuple[tuple[int, int], ...]:
        found = [os.stat(path) for path in self._files(name)]
        return tuple((facts.st_size, facts.st_mtime_ns) for facts in found)

    def _fault(self, case: str, message: str) -> InputError:
        return InputError(
            message,
            client=self._client,
            case=case,
            field="preprocessed",
            fix=f"remove {self._folder} and preprocess again",
        )


def _array(path: Path) -> Any:
    # Mapped files read in half the time; nnU-Net found that mapping fails on Windows.
    mapped = {} if os.name == "nt" else {"mmap_mode": "r"}
    return blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, **mapped)


class _PlainUnpickler(pickle.Unpickler):
    """Builds NumPy arrays, containers, numbers and strings, and refuses to call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return super().find_class(module, name)


def _properties(path: Path) -> dict[str, Any]:
    """What nnU-Net keeps beside a case."""
    found = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    if not isinstance(found, dict):
        raise ValueError("no table of properties")
    return found


def _key(key: Any) -> LabelKey:
    return tuple(int(label) for label in key) if isinstance(key, (tuple, list)) else int(key)


def _voxels(listed: Any) -> np.ndarray:
    """nnU-Net lists voxels with the channel first, `[n, 4]`; an empty list stands for none."""
    found = np.asarray(listed)
    return found[:, -3:].astype(np.int32) if found.size else np.zeros((0, 3), np.int32)
