"""Slices of a client's cases for the report: which case, which slice, which way up, which window.

A volume is read whole, one file at a time, and only the slice is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy.ndimage import binary_dilation

from fedcmt.errors import InputError
from fedcmt.report_figures import Outline, Panel, is_dashed, slice_panels, thumbnail
from fedcmt.volume import Volume, read_volume

MAX_PIXELS_PER_SIDE = 1024
# A volume whose slices are this much thicker than its pixels is shown in the plane it was acquired in.
THICK_SLICE_RATIO = 3.0
# A small structure is enlarged, but never so much that its surroundings are lost.
SMALLEST_SHARE_SHOWN = 0.5
MARGIN_AROUND_FOREGROUND = 0.15

SOFT_TISSUE_WINDOW = (-160.0, 240.0)
LUNG_WINDOW = (-1350.0, 150.0)
AIR_HU, LUNG_HU = -980.0, -500.0
# Wide enough that a nodule is seen as lying in lung, narrow enough that a heart is not.
PIXELS_OF_SURROUNDINGS = 8

# Index of the patient axis a slice is cut across -> name of the plane, letters at left, right, top and bottom.
PLANES = {0: ("sagittal", "APSI"), 1: ("coronal", "RLSI"), 2: ("axial", "RLAP")}
DIRECTIONS = {"R": "right", "L": "left", "A": "anterior", "P": "posterior", "S": "superior", "I": "inferior"}


@dataclass(frozen=True)
class LegendEntry:
    name: str
    colour: str
    dashed: bool
    filled: bool


@dataclass(frozen=True)
class SlicePicture:
    """A picture with its words; `source` is None where `left_out` says why there is none."""

    case: str
    caption: str = ""
    source: str | None = None
    left_out: str | None = None
    legend: Sequence[LegendEntry] = ()
    absent: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Cut:
    """A plane through a volume, in patient axes (right, anterior, superior)."""

    axis: int
    index: int

    def of(self, volume: Volume) -> NDArray[Any]:
        """Returns the slice ``[rows, columns]`` the way a radiologist looks at it."""
        plane = np.take(_in_patient_axes(volume), self.index, axis=self.axis)
        return plane[::-1, ::-1].T

    def aspect(self, volume: Volume) -> float:
        """Returns the height of a pixel over its width."""
        across, down = np.delete(_patient_spacing(volume), self.axis)
        return float(down / across)

    def words(self, volume: Volume) -> str:
        """Returns plane, number in the order of the file and slice distance."""
        count = _in_patient_axes(volume).shape[self.axis]
        order = nib.io_orientation(volume.affine)
        reversed_in_file = order[list(order[:, 0]).index(self.axis), 1] < 0
        number = count - self.index if reversed_in_file else self.index + 1
        distance = _patient_spacing(volume)[self.axis]
        return f"{PLANES[self.axis][0]} slice {number} of {count}, {distance:.1f} mm apart"


def representative_cases(cases: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the case with the median mean Dice and the one with the lowest, each with a word on why it is shown."""
    scored = sorted((dice, index) for index, case in enumerate(cases) if (dice := case_dice(case)) is not None)
    if not scored:
        return [("", case) for case in cases[:1]]
    if len(scored) == 1:
        return [("", cases[scored[0][1]])]
    if len(scored) == 2:
        return [("higher Dice", cases[scored[1][1]]), ("lower Dice", cases[scored[0][1]])]
    return [("median Dice", cases[scored[len(scored) // 2][1]]), ("lowest Dice", cases[scored[0][1]])]


def dice_of(scores: Mapping[str, Any] | None) -> float | None:
    """Returns the Dice among a class's scores; nnU-Net's summaries spell it ``Dice``."""
    return (scores or {}).get("Dice")


def case_dice(case: Mapping[str, Any]) -> float | None:
    """Returns the mean Dice over the classes of a segmented case, None where no class has one."""
    values = [dice_of(scores) for scores in (case.get("scores") or {}).values()]
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def segmentation_picture(
    workspace: Path, case: Mapping[str, Any], labels: Mapping[str, int | list[int]], modality: str
) -> SlicePicture:
    """Draws image, truth and prediction in the slice that shows most of the truth (or else of the prediction)."""
    if not case["images"]:
        return SlicePicture(case["case"], left_out="its files stay at the client's site")
    files = {"image": case["images"][0], "truth": case.get("truth"), "prediction": case.get("prediction")}
    paths = {role: find_file(workspace, name) for role, name in files.items() if name}
    if not files["truth"] and not files["prediction"]:
        return SlicePicture(case["case"], left_out="there is neither a truth nor a prediction")
    if not (drawn := _drawn_labels(labels)):
        return SlicePicture(case["case"], left_out="its classes are unknown")
    missing = [str(name) for role, name in files.items() if name and not paths[role].is_file()]
    if missing:
        return SlicePicture(case["case"], left_out=f"{' and '.join(missing)} is missing")
    try:
        return _draw_segmentation(case["case"], paths, drawn, modality)
    except InputError as error:
        return SlicePicture(case["case"], left_out=str(error))


def classification_picture(workspace: Path, case: Mapping[str, Any], modality: str) -> SlicePicture:
    """Draws the middle slice of a case's first channel."""
    if not case["images"]:
        return SlicePicture(case["case"], left_out="its files stay at the client's site")
    name = case["images"][0]
    path = find_file(workspace, name)
    if not path.is_file():
        return SlicePicture(case["case"], left_out=f"{name} is missing")
    try:
        volume = read_volume(path)
    except InputError as error:
        return SlicePicture(case["case"], left_out=str(error))
    axis = slice_axis(volume)
    cut = Cut(axis, _in_patient_axes(volume).shape[axis] // 2)
    image = _thinned(cut.of(volume))
    window, words = display_window(image, modality)
    source = thumbnail(image, cut.aspect(volume), window, PLANES[axis][1])
    return SlicePicture(case["case"], f"{cut.words(volume)}; {words}", source)


def find_file(workspace: Path, name: str) -> Path:
    """Returns where a file named in ``results.json`` lies: in the workspace, or raw data elsewhere."""
    inside = workspace / name
    return inside if inside.is_file() else Path(name)


def slice_axis(volume: Volume) -> int:
    """Returns the patient axis to cut across: axial, unless the volume consists of thick slices of another plane."""
    spacing = _patient_spacing(volume)
    thickest = int(np.argmax(spacing))
    return thickest if spacing[thickest] >= THICK_SLICE_RATIO * spacing.min() else 2


def display_window(
    image: NDArray[np.floating], modality: str, foreground: NDArray[np.bool_] | None = None
) -> tuple[tuple[float, float], str]:
    """Chooses the intensities shown black and white.

    CT in Hounsfield units gets the lung window where much of what is looked at has the density of lung, else the
    soft-tissue window. Everything else gets the percentiles 1 and 99.5 of what is not background.

    Args:
        image: ``[rows, columns]``.
        modality: As in the configuration; ``CT`` in any case of letters is treated as above.
        foreground: ``[rows, columns]`` what the picture is about, looked at with its nearest surroundings; the whole
            slice where there is none.
    """
    if modality.upper() == "CT" and image.min() < -200 and image.max() > 50:
        looked_at = image if foreground is None or not foreground.any() else image[_with_surroundings(foreground)]
        of_lung = float(np.mean((looked_at > AIR_HU) & (looked_at < LUNG_HU)))
        window, name = (LUNG_WINDOW, "lung") if of_lung > 0.2 else (SOFT_TISSUE_WINDOW, "soft tissue")
        return window, f"{name} window {window[0]:.0f} to {window[1]:.0f} HU".replace("-", "−")
    lowest = image.min()
    inside = image[image > lowest]
    if inside.size == 0:
        return (float(lowest), float(lowest) + 1.0), "uniform slice"
    low, high = (float(value) for value in np.percentile(inside, (1, 99.5)))
    return (low, max(high, low + 1e-6)), "window from percentiles 1 to 99.5"


def _with_surroundings(foreground: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.asarray(binary_dilation(foreground, iterations=PIXELS_OF_SURROUNDINGS))


def _draw_segmentation(
    name: str, paths: Mapping[str, Path], labels: Mapping[str, Sequence[int]], modality: str
) -> SlicePicture:
    guide = read_volume(paths.get("truth") or paths["prediction"], dtype=None)
    cut = _fullest_cut(guide, labels)
    shape = guide.data.shape
    maps = {role: cut.of(_on_grid(paths[role], shape)) for role in ("truth", "prediction") if role in paths}
    volume = _on_grid(paths["image"], shape, np.float32)
    image, letters = cut.of(volume), PLANES[cut.axis][1]
    outlines = {role: _outlines(plane, labels) for role, plane in maps.items()}
    foreground = np.any([outline.mask for some in outlines.values() for outline in some], axis=0)
    window, words = display_window(image, modality, foreground)
    view = _view_around(foreground)
    panels = [Panel("image"), *(Panel(role, _viewed(some, view)) for role, some in outlines.items())]
    source = slice_panels(_thinned(image[view]), panels, cut.aspect(volume), window, letters)
    drawn = {outline.index: outline for some in outlines.values() for outline in some if outline.mask.any()}
    legend = [
        LegendEntry(label, drawn[index].colour, is_dashed(index), drawn[index].filled)
        for index, label in enumerate(labels)
        if index in drawn
    ]
    sides = f"{DIRECTIONS[letters[0]]} is on the left, {DIRECTIONS[letters[2]]} at the top"
    cropped = ", enlarged" if image[view].shape != image.shape else ""
    return SlicePicture(
        name,
        f"{cut.words(volume)}{cropped}; {words}; {sides}",
        source,
        legend=legend,
        absent=[label for index, label in enumerate(labels) if index not in drawn],
    )


def _on_grid(path: Path, shape: tuple[int, ...], dtype: DTypeLike | None = None) -> Volume:
    volume = read_volume(path, dtype=dtype)
    if volume.data.shape != shape:
        raise InputError(f"{path.name} has shape (D, H, W) {volume.data.shape[1:]}, the label map {shape[1:]}")
    return volume


def _drawn_labels(labels: Mapping[str, int | list[int]]) -> dict[str, list[int]]:
    """Returns class or region -> its labels, without background and nnU-Net's ``ignore``."""
    lists = {name: list(value) if isinstance(value, list | tuple) else [value] for name, value in labels.items()}
    return {name: values for name, values in lists.items() if name != "ignore" and any(values)}


def _fullest_cut(guide: Volume, labels: Mapping[str, Sequence[int]]) -> Cut:
    """Returns the slice that shows most of all classes, each counted in shares of its own fullest slice.

    Counting voxels alone would let one large class choose a slice without the small ones.
    """
    axis = slice_axis(guide)
    slices = np.moveaxis(_in_patient_axes(guide), axis, 0)
    size = 1 + max((value for values in labels.values() for value in values), default=0)
    by_label = np.stack([np.bincount(_label_numbers(plane, size), minlength=size) for plane in slices])
    by_class = np.stack([by_label[:, list(values)].sum(axis=1) for values in labels.values()], axis=1)
    shares = (by_class / np.maximum(by_class.max(axis=0), 1)).sum(axis=1)
    return Cut(axis, int(np.argmax(shares)) if shares.any() else len(slices) // 2)


def _label_numbers(plane: NDArray[Any], size: int) -> NDArray[np.int64]:
    """Returns the labels of a plane in one row; those outside ``0 <= label < size`` count as background."""
    numbers = plane.ravel().astype(np.int64)
    return np.where((numbers >= 0) & (numbers < size), numbers, 0)


def _outlines(plane: NDArray[Any], labels: Mapping[str, Sequence[int]]) -> list[Outline]:
    flat = [value for values in labels.values() for value in values]
    overlapping = len(flat) != len(set(flat))
    return [
        Outline(np.isin(plane, values), index, filled=not overlapping) for index, values in enumerate(labels.values())
    ]


def _view_around(foreground: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Returns the rows and columns to show: all, or a part around a small foreground."""
    if not foreground.any():
        return slice(None), slice(None)
    view = []
    for size, other in zip(foreground.shape, (1, 0), strict=True):
        hit = np.flatnonzero(foreground.any(axis=other))
        wanted = (hit[-1] - hit[0] + 1) * (1 + 2 * MARGIN_AROUND_FOREGROUND)
        extent = math.ceil(max(wanted, SMALLEST_SHARE_SHOWN * size))
        start = min(max(int((hit[0] + hit[-1] + 1 - extent) // 2), 0), max(size - extent, 0))
        view.append((size, slice(start, start + extent)))
    # Enlarging in one direction only would distort the impression of where the structure lies.
    if any(part.stop - part.start > 0.8 * size for size, part in view):
        return slice(None), slice(None)
    return view[0][1], view[1][1]


def _viewed(outlines: Sequence[Outline], view: tuple[slice, slice]) -> list[Outline]:
    return [Outline(_thinned(outline.mask[view]), outline.index, outline.filled) for outline in outlines]


def _thinned(plane: NDArray[Any]) -> NDArray[Any]:
    step = math.ceil(max(plane.shape) / MAX_PIXELS_PER_SIDE)
    return plane[::step, ::step]


def _in_patient_axes(volume: Volume) -> NDArray[Any]:
    """Returns a view of the first channel with axes towards right, anterior and superior (the nearest ones)."""
    order = nib.io_orientation(volume.affine)
    xyz = volume.data[0].transpose(2, 1, 0)
    return np.asarray(nib.apply_orientation(xyz, order))


def _patient_spacing(volume: Volume) -> NDArray[np.float64]:
    order = nib.io_orientation(volume.affine)
    spacing = np.empty(3)
    spacing[order[:, 0].astype(int)] = volume.spacing[::-1]
    return spacing
