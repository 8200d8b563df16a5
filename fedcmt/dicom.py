"""DICOM series as volumes: one file per slice, read by GDCM through SimpleITK.

A series is named by its folder, or, where the folder holds several, by any one of its slices.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from fedcmt.dicom_lengths import check_lengths
from fedcmt.errors import InputError, Problems
from fedcmt.nifti import check_affine, check_claimed_size, check_file_size
from fedcmt.volume import READABLE_ENDINGS, Volume, has_ending

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_UNCOMPRESSED = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"}
# Reports, presentation states, waveforms, documents, RT objects, segmentations, raw data, directories: no scans.
_NO_SCANS = re.compile(r"1\.2\.840\.10008\.(1\.3\.10|5\.1\.4\.1\.1\.(88|11|9|104|481|66)(\..*)?)")
_META_BYTES = 4096  # of the file; the meta group stands at its start
_SOP_CLASS, _TRANSFER_SYNTAX = b"\x02\x00\x02\x00UI", b"\x02\x00\x10\x00UI"
_SERIES_UID = "0020|000e"
_POSITION, _ORIENTATION, _PIXEL_SPACING = "0020|0032", "0020|0037", "0028|0030"
_BITS_ALLOCATED, _THICKNESS, _MODALITY, _DESCRIPTION = "0028|0100", "0018|0050", "0008|0060", "0008|103e"
# Scanners round positions; a missing slice is a whole step.
_STEP_TOLERANCE = 0.05
_STEP_TOLERANCE_MM = 0.02


@dataclass(frozen=True)
class Series:
    """The files of one series, in GDCM's order."""

    uid: str
    files: tuple[Path, ...]

    def described(self) -> str:
        """UID, modality, description and number of files, for messages."""
        try:
            tags = _read_header(self.files[0])[1]
        except InputError:
            tags = {}
        words = [tags.get(_MODALITY, ""), tags.get(_DESCRIPTION, ""), f"{len(self.files)} files"]
        return f"{self.uid} ({', '.join(word for word in words if word)})"


@dataclass(frozen=True)
class _Slice:
    """What a slice's header says; lengths in mm, directions in LPS."""

    path: Path
    size: tuple[int, int]  # columns, rows
    spacing: tuple[float, float]  # along a row, along a column
    axes: np.ndarray  # [2, 3] of a row and a column
    position: np.ndarray  # [3] of the first voxel
    thickness: float | None


def is_dicom(path: Path) -> bool:
    """Whether a file carries DICOM's mark."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def is_scan(path: Path) -> bool:
    """Whether a file is DICOM and of a kind that holds slices."""
    if path.name == "DICOMDIR" or not is_dicom(path):
        return False
    return not _NO_SCANS.fullmatch(_meta_uid(path, _SOP_CLASS))


def find_series(folder: Path) -> list[Series]:
    """Lists the series of images in a folder, not below it.

    Raises:
        InputError: DICOM files are damaged.
    """
    marked = [path for path in folder.iterdir() if path.is_file() and is_dicom(path)]
    files = {path.name for path in marked if is_scan(path)}
    if not files:
        return []
    problems = Problems()
    for path in marked:  # GDCM reads them all
        with problems.caught():
            check_lengths(path)
    problems.raise_any()
    series: list[Series] = []
    try:
        uids = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    except RuntimeError as error:  # GDCM gives up at some damaged headers, and does not say whose
        raise InputError(
            f"a file in {folder.name} is truncated or damaged ({_reason(error)})",
            field="images",
            fix="restore it from its source",
        ) from error
    for uid in uids:
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
        found = tuple(path for path in map(Path, names) if path.name in files)
        if found:
            series.append(Series(uid, found))
    unlisted = sorted(files - {path.name for one in series for path in one.files})
    if unlisted:
        raise InputError(
            f"{unlisted[0]} in {folder.name} is truncated or damaged", field="images", fix="restore or remove it"
        )
    return series


def choose_series(folder: Path, uid: str | None = None) -> Series:
    """Returns a folder's only series, or the one with the UID.

    Raises:
        InputError: There is none, there are several, or none has the UID.
    """
    series = find_series(folder)
    if not series:
        raise InputError(f"{folder.name} holds no DICOM images", field="images", fix="name a folder of DICOM slices")
    found = [one for one in series if uid in (None, one.uid)]
    if len(found) == 1:
        return found[0]
    names = "; ".join(one.described() for one in series)
    what = "holds" if uid is None else f"has no series {uid}, it holds"
    raise InputError(f"{folder.name} {what} {len(series)} series: {names}", field="--series", fix="add --series UID")


def dicom_cases(source: Path, num_channels: int, uids: Sequence[str] = ()) -> dict[str, tuple[Path, ...]]:
    """The DICOM cases at a path: a folder of slices, or a folder of such folders.

    Args:
        source: The path.
        num_channels: Channels of a case. With several, each is a series of its own.
        uids: One series for each channel; may be left out where the folder holds one and the model takes one.

    Returns:
        Case, named after its folder -> what :func:`fedcmt.volume.read_volume` reads, by channel; empty without DICOM.

    Raises:
        InputError: The series are not the right ones, or DICOM files are damaged.
    """
    if source.is_file() and is_scan(source) and not uids:
        return {source.stem: (source,)}
    folders: list[Path] = []
    if source.is_dir() and not any(has_ending(path, READABLE_ENDINGS) for path in source.iterdir()):
        folders = [source] if _holds_dicom(source) else sorted(path for path in source.iterdir() if _holds_dicom(path))
    if uids and not folders:
        raise InputError(f"{source} is no folder of DICOM slices", field="--series", fix="leave --series out")
    problems, cases = Problems(), {}
    for folder in folders:
        case = folder.resolve().name
        with problems.caught(case=case):
            cases[case] = _channels(folder, num_channels, uids)
    problems.raise_any()
    return cases


def series_files(path: Path) -> tuple[Path, ...]:
    """The slices of a folder's series, or of the series a slice belongs to, in the order of the volume's axis D.

    Raises:
        InputError: As :func:`read_dicom`.
    """
    return tuple(one.path for one in _ordered(_series_at(path)))


def read_dicom(path: Path) -> Volume:
    """Reads a DICOM series.

    Args:
        path: A folder with one series, or one slice of a series.

    Returns:
        ``Volume`` with one channel, float32, intensities rescaled (CT: Hounsfield units).

    Raises:
        InputError: The series is incomplete, mixed, tilted or damaged, or the folder holds several.
    """
    slices = _ordered(_series_at(path))
    (columns, rows), (along_row, along_column) = slices[0].size, slices[0].spacing
    check_claimed_size((len(slices), rows, columns), np.dtype(np.float32), path)
    step = _step(slices, path)
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([slices[0].axes[0] * along_row, slices[0].axes[1] * along_column, step])
    affine[:3, 3] = slices[0].position
    affine = _LPS_TO_RAS @ affine
    thickness = float(np.linalg.norm(step))
    check_affine(affine, np.array([along_row, along_column, thickness]), path)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(one.path) for one in slices])
    reader.SetOutputPixelType(sitk.sitkFloat32)  # slices may be rescaled differently
    try:
        voxels = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise InputError(
            f"a slice of {path.name} is truncated or damaged ({_reason(error)})",
            field="PixelData",
            fix="restore it from its source",
        ) from error
    return Volume(voxels[None], (thickness, float(along_column), float(along_row)), affine)


def _holds_dicom(folder: Path) -> bool:
    return folder.is_dir() and any(is_scan(path) for path in folder.iterdir() if path.is_file())


def _meta_uid(path: Path, tag: bytes) -> str:
    """A UID of the file's meta group, whose encoding is always the same; empty where it is missing."""
    with path.open("rb") as file:
        start = file.read(_META_BYTES)
    place = start.find(tag)
    if place < 0:
        return ""
    length = int.from_bytes(start[place + 6 : place + 8], "little")
    return start[place + 8 : place + 8 + length].decode("ascii", "replace").strip("\0 ")


def _channels(folder: Path, num_channels: int, uids: Sequence[str]) -> tuple[Path, ...]:
    if not uids and num_channels == 1:
        choose_series(folder)
        return (folder,)
    if len(uids) != num_channels:
        names = "; ".join(one.described() for one in find_series(folder))
        reason = f"{len(uids)} series named, the model takes {num_channels} channels; {folder.name} holds {names}"
        raise InputError(reason, field="--series", fix="name one series for each channel, in their order")
    return tuple(choose_series(folder, uid).files[0] for uid in uids)


def _series_at(path: Path) -> Series:
    if path.is_dir():
        return choose_series(path)
    if not is_dicom(path):
        raise InputError(f"{path.name} is no DICOM file", field="images", fix="check the name")
    check_lengths(path)  # find_series does so for the others
    return choose_series(path.parent, _read_header(path)[1].get(_SERIES_UID, ""))


def _read_header(path: Path) -> tuple[sitk.ImageFileReader, dict[str, str]]:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(
            f"{path.name} is truncated, damaged or no image ({_reason(error)})",
            field="images",
            fix="restore or remove it",
        ) from error
    # GDCM hands over bytes in the file's own character set.
    return reader, {key: reader.GetMetaData(key).strip(" \0") for key in reader.GetMetaDataKeys()}


def _read_slice(path: Path) -> _Slice:
    reader, tags = _read_header(path)
    size = reader.GetSize()
    if len(size) > 2 and any(extent != 1 for extent in size[2:]):
        raise InputError(
            f"{path.name} holds {size[2]} frames", field="NumberOfFrames", fix="export it as one file per slice"
        )
    if reader.GetNumberOfComponents() != 1:
        raise InputError(f"{path.name} is a colour image", field="SamplesPerPixel", fix="choose another series")
    bits = _numbers(tags, _BITS_ALLOCATED, "BitsAllocated", 1, path)[0]
    compressed = _meta_uid(path, _TRANSFER_SYNTAX) not in _UNCOMPRESSED
    check_file_size(int(size[0] * size[1] * bits // 8), path.stat().st_size, compressed, path)
    axes = _numbers(tags, _ORIENTATION, "ImageOrientationPatient", 6, path).reshape(2, 3)
    if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-3):
        raise InputError(
            f"the axes of {path.name} are not perpendicular directions",
            field="ImageOrientationPatient",
            fix="restore it from its source",
        )
    along_column, along_row = _numbers(tags, _PIXEL_SPACING, "PixelSpacing", 2, path)
    if not min(along_column, along_row) > 0:
        raise InputError(f"{path.name} has spacing 0 or less", field="PixelSpacing", fix="restore it from its source")
    position = _numbers(tags, _POSITION, "ImagePositionPatient", 3, path)
    thickness = _numbers(tags, _THICKNESS, "SliceThickness", 1, path)[0] if tags.get(_THICKNESS) else None
    return _Slice(path, (size[0], size[1]), (along_row, along_column), axes, position, thickness)


def _numbers(tags: dict[str, str], tag: str, name: str, count: int, path: Path) -> np.ndarray:
    text = tags.get(tag, "")
    try:
        values = np.array([float(part) for part in text.split("\\")])
    except ValueError:
        values = np.array([])
    if values.size != count or not np.isfinite(values).all():
        found = f"has {name} '{text[:60]}'" if text else f"has no {name}"
        raise InputError(f"{path.name} {found}, expected {count} numbers", field=name, fix="choose a series of slices")
    return values


def _ordered(series: Series) -> list[_Slice]:
    """The slices along their normal, all on one grid."""
    problems, slices = Problems(), []
    for path in series.files:
        with problems.caught():
            slices.append(_read_slice(path))
    problems.raise_any()
    for field, values in (
        ("Rows, Columns", [one.size for one in slices]),
        ("PixelSpacing", [tuple(np.round(one.spacing, 4).tolist()) for one in slices]),
        ("ImageOrientationPatient", [tuple((np.round(one.axes, 3) + 0.0).ravel().tolist()) for one in slices]),
    ):
        kinds = Counter(values)
        if len(kinds) > 1:
            (common, most), (other, few) = kinds.most_common(2)
            odd = slices[values.index(other)].path.name
            raise InputError(
                f"series {series.uid} mixes slices: {most} with {common}, {few} with {other} ({odd})",
                field=field,
                fix="remove the slices that do not belong, such as localisers",
            )
    normal = np.cross(*slices[0].axes)
    return sorted(slices, key=lambda one: float(one.position @ normal))


def _step(slices: Sequence[_Slice], path: Path) -> np.ndarray:
    """The vector `[3]` in mm from one slice to the next."""
    if len(slices) == 1:
        thickness = slices[0].thickness
        if not thickness or thickness <= 0:
            reason = f"the only slice of {path.name} has no thickness"
            raise InputError(reason, field="SliceThickness", fix="choose a series of several slices")
        return np.cross(*slices[0].axes) * thickness
    positions = np.stack([one.position for one in slices])
    distances = np.diff(positions @ np.cross(*slices[0].axes))
    usual = float(np.median(distances))
    tolerance = max(_STEP_TOLERANCE * usual, _STEP_TOLERANCE_MM)
    for index in np.flatnonzero(np.abs(distances - usual) > tolerance).tolist():
        names = f"{slices[index].path.name} and {slices[index + 1].path.name}"
        if distances[index] < tolerance:
            reason, fix = f"{names} lie at the same place", "keep one time point or reconstruction"
        else:
            reason = f"{names} are {distances[index]:.4g} mm apart, the other slices {usual:.4g} mm: slices are missing"
            fix = "restore them from their source"
        raise InputError(reason, field="ImagePositionPatient", fix=fix)
    if usual < _STEP_TOLERANCE_MM:
        reason = f"all {len(slices)} slices of {path.name} lie at the same place"
        raise InputError(reason, field="ImagePositionPatient", fix="keep one time point per series")
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    expected = positions[0] + np.arange(len(slices))[:, None] * step
    if np.abs(positions - expected).max() > 2 * tolerance:
        reason = f"the slices of {path.name} do not lie on one line"
        raise InputError(reason, field="ImagePositionPatient", fix="choose a series of one acquisition")
    return step


def _reason(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1].split("): ")[-1].replace(os.sep, "/")[-120:]
