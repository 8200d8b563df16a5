"""The one convention for axes, spacing and orientation, and the files it is read from and written to.

Voxels are ``[C, D, H, W]`` (channel, z, y, x) exactly as nnU-Net's ``SimpleITKIO`` returns them: nothing is
reoriented. ``spacing`` is (D, H, W) in mm. ``affine`` maps voxel indices (x, y, z) = (W, H, D) to mm in RAS+,
which is nibabel's convention.
"""

from __future__ import annotations

import gzip
import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.orientations import apply_orientation
from numpy.typing import DTypeLike

from fedcmt.errors import InputError, Problems
from fedcmt.nifti import check_affine, check_claimed_size, check_file_size, header_from_affine, nifti_bytes, read_nifti

NIFTI_ENDINGS = (".nii.gz", ".nii")
SIMPLEITK_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
READABLE_ENDINGS = NIFTI_ENDINGS + SIMPLEITK_ENDINGS

_META_HEADER_BYTES = 64 * 1024
_META_SYNONYMS = {
    "Position": "Offset",
    "Origin": "Offset",
    "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix",
}
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_ITK_DTYPES = {
    sitk.sitkUInt8: np.uint8, sitk.sitkInt8: np.int8, sitk.sitkUInt16: np.uint16, sitk.sitkInt16: np.int16,
    sitk.sitkUInt32: np.uint32, sitk.sitkInt32: np.int32, sitk.sitkUInt64: np.uint64, sitk.sitkInt64: np.int64,
    sitk.sitkFloat32: np.float32, sitk.sitkFloat64: np.float64,
}  # fmt: skip
_WRITABLE_DTYPES = tuple(
    np.dtype(name) for name in ("uint8", "int8", "uint16", "int16", "int32", "uint32", "float32", "float64")
)


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels and where they lie.

    Attributes:
        data: ``[C, D, H, W]``.
        spacing: voxel size in mm along (D, H, W).
        affine: ``[4, 4]`` float64, voxel (x, y, z) -> mm in RAS+.
        header: the NIfTI header the volume was read with, whose geometry fields are written back verbatim; None for
            other formats.
        axes_back: for a volume that was turned after reading, nibabel's orientation transform back to the stored axes
            (x, y, z); what is written is turned back.
    """

    data: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    header: nib.Nifti1Header | None = None
    axes_back: np.ndarray | None = None

    def as_stored(self, array: np.ndarray) -> np.ndarray:
        """Returns an array ``[..., D, H, W]`` on this volume's grid with the axes of the file it was read from."""
        return array if self.axes_back is None else turned_axes(array, self.axes_back)

    def __post_init__(self) -> None:
        if self.data.ndim != 4:
            raise ValueError(f"`data` should be [C, D, H, W]. Found shape {self.data.shape}.")
        if self.affine.shape != (4, 4):
            raise ValueError(f"`affine` should be [4, 4]. Found shape {self.affine.shape}.")


def has_ending(path: Path, endings: Sequence[str]) -> bool:
    """Returns whether the file's name ends with one of ``endings``, in whatever case."""
    return path.name.lower().endswith(tuple(endings))


def read_volume(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, dtype: DTypeLike | None = np.float32
) -> Volume:
    """Reads one 3D file, or one 3D file per channel, into a ``Volume``.

    Args:
        paths: ``.nii``, ``.nii.gz``, ``.nrrd``, ``.nhdr``, ``.mha`` or ``.mhd``, a folder with a DICOM series, or one
            slice of a series; a sequence is read as channels.
        dtype: type of the voxels returned; None keeps what is stored (float64 where intensities are scaled).

    Returns:
        ``Volume`` with data ``[C, D, H, W]``; its geometry is the first channel's.

    Raises:
        InputError: a file is missing, damaged, not 3D, too large, holds NaN or Inf, has no usable geometry, or the
            channels do not lie on the same grid.
    """
    names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not names:
        raise InputError("no image file given", field="images")
    problems, channels = Problems(), []
    for name in names:
        with problems.caught():
            channels.append(_read_channel(Path(name), dtype))
    problems.raise_any()
    first = channels[0]
    for name, channel in zip(names[1:], channels[1:], strict=True):
        difference = geometry_difference(first, channel)
        if difference is not None:
            field, text = difference
            reason = f"channels {Path(names[0]).name} and {Path(name).name} differ: {text}"
            problems.add(InputError(reason, field=field, fix="resample all channels of a case onto one grid"))
    problems.raise_any()
    if len(channels) == 1:
        return first
    return Volume(np.concatenate([channel.data for channel in channels]), first.spacing, first.affine, first.header)


def geometry_difference(first: Volume, second: Volume) -> tuple[str, str] | None:
    """Compares two grids.

    Tolerances: spacing 0.1 %, direction cosines 1e-3, origin a tenth of the smallest voxel edge.

    Returns:
        None where they are the same, otherwise the field (``shape``, ``spacing``, ``direction`` or ``origin``) and a
        text with both values.
    """
    if first.data.shape[1:] != second.data.shape[1:]:
        return "shape", f"shape (D, H, W) {first.data.shape[1:]} and {second.data.shape[1:]}"
    if not np.allclose(first.spacing, second.spacing, rtol=1e-3):
        return "spacing", f"spacing (D, H, W) {_rounded(first.spacing)} and {_rounded(second.spacing)} mm"
    cosines = [volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0) for volume in (first, second)]
    if np.abs(cosines[0] - cosines[1]).max() > 1e-3:
        codes = [axis_codes(volume.affine) for volume in (first, second)]
        detail = f"axes {codes[0]} and {codes[1]}" if codes[0] != codes[1] else "rotated against each other"
        return "direction", f"direction ({detail})"
    distance = float(np.linalg.norm(first.affine[:3, 3] - second.affine[:3, 3]))
    if distance > 0.1 * min(first.spacing):
        return "origin", f"origin {_rounded(first.affine[:3, 3])} and {_rounded(second.affine[:3, 3])} mm"
    return None


def axis_codes(affine: np.ndarray) -> str:
    """Returns where voxel axes x, y and z point to, such as ``LPS`` or ``RAS`` (nibabel's codes), rounded for oblique
    grids.
    """
    return "".join(nib.aff2axcodes(affine))


def turned_axes(array: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Applies nibabel's orientation transform of the axes (x, y, z) to an array ``[..., D, H, W]``."""
    xyz_first = np.moveaxis(array, (-1, -2, -3), (0, 1, 2))
    return np.ascontiguousarray(np.moveaxis(apply_orientation(xyz_first, turn), (0, 1, 2), (-1, -2, -3)))


def write_segmentation(volume_like: Volume, labels: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Writes a label map on exactly the grid of ``volume_like``, atomically.

    Args:
        volume_like: the image the labels belong to.
        labels: ``[D, H, W]`` integers from 0 to 65535; stored as uint8, or uint16 where needed.
        path: ``.nii`` or ``.nii.gz``.

    Raises:
        ValueError: ``labels`` is not an integer map of the volume's shape.
        InputError: the path has another ending.
    """
    labels = np.asarray(labels)
    if labels.shape != volume_like.data.shape[1:]:
        raise ValueError(f"`labels` should have shape {volume_like.data.shape[1:]}. Found {labels.shape}.")
    if labels.dtype.kind not in "iub":
        raise ValueError(f"`labels` should be integers. Found {labels.dtype}.")
    lowest, highest = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    if lowest < 0 or highest > 65535:
        raise ValueError(f"`labels` should be in 0..65535. Found {lowest}..{highest}.")
    labels = volume_like.as_stored(labels)
    _write(volume_like, labels.astype(np.uint8 if highest <= 255 else np.uint16), Path(path))


def write_volume(volume: Volume, path: str | os.PathLike[str], *, channel: int | None = None) -> None:
    """Writes one channel of an image as NIfTI, with the geometry it was read with, atomically.

    Args:
        volume: data ``[C, D, H, W]``; other types than NIfTI's usual ones are stored as float32 or int32.
        path: ``.nii`` or ``.nii.gz``.
        channel: which channel; may be left out where there is only one.

    Raises:
        ValueError: the channel is not said for a volume of several, or the integers need more than 32 bits.
        InputError: the path has another ending.
    """
    if channel is None and volume.data.shape[0] != 1:
        raise ValueError(f"`channel` should say which of the {volume.data.shape[0]} channels to write. Found None.")
    voxels = volume.as_stored(volume.data[channel or 0])
    if voxels.dtype not in _WRITABLE_DTYPES:
        if voxels.dtype.kind in "iu" and voxels.size and max(-int(voxels.min()), int(voxels.max())) >= 2**31:
            raise ValueError(f"`volume` should fit into 32 bits. Found {voxels.min()}..{voxels.max()}.")
        voxels = voxels.astype({"i": np.int32, "u": np.int32, "b": np.uint8}.get(voxels.dtype.kind, np.float32))
    _write(volume, voxels, Path(path))


def _write(volume: Volume, voxels: np.ndarray, path: Path) -> None:
    if not has_ending(path, NIFTI_ENDINGS):
        raise InputError(f"cannot write {path.name}", field="path", fix="use .nii or .nii.gz")
    header = volume.header if volume.header is not None else header_from_affine(volume.affine)
    content = nifti_bytes(voxels, header)
    if has_ending(path, (".gz",)):
        content = gzip.compress(content, compresslevel=6, mtime=0)  # no time stamp: same voxels, same bytes
    _replace_file(path, content)


def _replace_file(path: Path, content: bytes) -> None:
    """Writes beside ``path`` and renames: a reader finds the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_channel(path: Path, dtype: DTypeLike | None) -> Volume:
    from fedcmt import dicom  # which makes volumes

    if (path.is_dir() and not has_ending(path, READABLE_ENDINGS)) or dicom.is_dicom(path):
        return _checked(dicom.read_dicom(path), dtype, path)
    if not has_ending(path, READABLE_ENDINGS):
        raise InputError(f"{path.name} is no known image format", fix=f"use one of {', '.join(READABLE_ENDINGS)}")
    if not path.is_file():
        raise InputError(f"file {path.name} does not exist", fix="check the name and the folder")
    try:
        stored = _read_itk(path) if has_ending(path, SIMPLEITK_ENDINGS) else _read_nifti_volume(path)
    except OSError as error:
        raise InputError(f"{path.name} cannot be read ({error.strerror or error})", fix="check the file") from error
    return _checked(stored, dtype, path)


def _checked(stored: Volume, dtype: DTypeLike | None, path: Path) -> Volume:
    voxels = stored.data
    if dtype is not None:
        with np.errstate(over="ignore"):  # an overflow becomes Inf, which is refused below
            voxels = voxels.astype(dtype, copy=False)
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        num_nan = int(np.isnan(voxels).sum())
        num_infinite = int(np.isinf(voxels).sum())
        raise InputError(
            f"{path.name} holds {num_nan} NaN and {num_infinite} Inf voxels, expected finite numbers",
            field="voxels",
            fix="replace them in the image",
        )
    return Volume(voxels, stored.spacing, stored.affine, stored.header)


def _read_nifti_volume(path: Path) -> Volume:
    voxels, affine, header = read_nifti(path)
    depth, height, width = (float(value) for value in header["pixdim"][3:0:-1])
    return Volume(voxels[None], (depth, height, width), affine, header)


def _read_itk(path: Path) -> Volume:
    if path.stat().st_size == 0:
        raise InputError(f"{path.name} is empty (0 bytes)", fix="restore the file from its source")
    if has_ending(path, (".mha", ".mhd")):
        _check_meta_header(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        size = _itk_size(reader, path)
        dtype = np.dtype(_ITK_DTYPES[reader.GetPixelID()])
        check_claimed_size(size, dtype, path)
        if has_ending(path, (".nrrd", ".mha")):  # the others keep their voxels in a second file
            check_file_size(math.prod(size) * dtype.itemsize, path.stat().st_size, True, path)
        image = reader.Execute()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].split("): ")[-1]
        raise InputError(f"{path.name} is truncated or damaged ({reason})", fix="restore it from its source") from error
    for _ in range(len(size) - 3):
        image = image[..., 0]
    spacing = np.array(image.GetSpacing())
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * spacing
    affine[:3, 3] = image.GetOrigin()
    affine = _LPS_TO_RAS @ affine
    check_affine(affine, spacing, path)
    depth, height, width = (float(value) for value in spacing[::-1])
    return Volume(sitk.GetArrayFromImage(image)[None], (depth, height, width), affine)


def _check_meta_header(path: Path) -> None:
    """Refuses what makes ITK's MetaImage reader write outside its memory: it believes every count in the header."""
    with path.open("rb") as file:
        text = file.read(_META_HEADER_BYTES).decode("latin-1")
    head, mark, rest = text.partition("ElementDataFile")
    fields: dict[str, list[str]] = {}
    for line in head.splitlines():
        key, _, value = line.partition("=")
        fields[key.strip()] = value.split()
    numbers = {"NDims": 1, "DimSize": 3, "ElementSpacing": 3, "Offset": 3, "TransformMatrix": 9}
    fields = {_META_SYNONYMS.get(key, key): values for key, values in fields.items()}
    if fields.get("NDims") == ["4"]:  # one more axis of length 1 may follow
        numbers |= {"DimSize": 4, "ElementSpacing": 4, "Offset": 4, "TransformMatrix": 16}
    wrong = [key for key, count in numbers.items() if key in fields and not _are_numbers(fields[key], count)]
    for key in ("NDims", "DimSize", "ElementType"):
        if not fields.get(key):
            wrong.append(key)
    if fields.get("NDims") not in (["3"], ["4"]):
        raise InputError(
            f"{path.name} has {' '.join(fields.get('NDims', ['no']))[:40]} dimensions, expected 3",
            field="NDims",
            fix="write one 3D file per channel or time point",
        )
    if wrong or not mark or not rest.strip(" =").split("\n")[0].strip():
        field = wrong[0] if wrong else "ElementDataFile"
        raise InputError(f"the header of {path.name} is damaged", field=field, fix="restore it from its source")
    if has_ending(path, (".mha",)) and rest.strip(" =").split("\n")[0].strip() != "LOCAL":
        raise InputError(f"{path.name} does not hold its own voxels", field="ElementDataFile", fix="name it .mhd")


def _are_numbers(values: Sequence[str], count: int) -> bool:
    try:
        return len(values) == count and all(math.isfinite(float(value)) for value in values)
    except ValueError:
        return False


def _itk_size(reader: sitk.ImageFileReader, path: Path) -> tuple[int, ...]:
    size = reader.GetSize()
    if len(size) < 3 or any(extent != 1 for extent in size[3:]):
        raise InputError(
            f"{path.name} has {len(size)} dimensions ({' x '.join(map(str, size))}), expected 3",
            field="dim",
            fix="write one 3D file per channel or time point",
        )
    if reader.GetNumberOfComponents() != 1 or reader.GetPixelID() not in _ITK_DTYPES:
        raise InputError(
            f"{path.name} holds {reader.GetNumberOfComponents()} components per voxel, expected one real number",
            field="datatype",
            fix="write one file per channel",
        )
    spacing = reader.GetSpacing()[:3]
    if not all(np.isfinite(value) and value > 0 for value in spacing):
        raise InputError(f"{path.name} has spacing {_rounded(spacing)} mm, expected positive numbers", field="spacing")
    return size


def _rounded(values: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)
