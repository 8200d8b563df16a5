"""NIfTI-1 and NIfTI-2 files, read from their bytes so that a damaged file is refused before memory is asked for.

nibabel repairs a header while it loads it (a zero spacing becomes 1, a missing qfac becomes 1). Here the header is
read as it stands: faults can be reported, and the geometry can be written back unchanged.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.spatialimages import HeaderDataError

from fedcmt.errors import InputError

# Everything in the header that says where a voxel lies. Copied verbatim from the input to what we write.
GEOMETRY_FIELDS = (
    "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units",
)  # fmt: skip

MAX_VOLUME_BYTES = 64 * 2**30
_MAX_HEADER_BYTES = 256 * 2**20  # header and extensions
_MAX_DEFLATE_RATIO = 1032  # the most that deflate can shrink anything
_CHUNK_BYTES = 16 * 2**20
_UNITS = {1: "metre", 3: "micrometre"}
_DAMAGED = "restore the file from its source"


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header]:
    """Reads a 3D NIfTI file as it is stored, without reorientation.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file.

    Returns:
        The voxels ``[D, H, W]`` (native integers, or float64 where ``scl_slope`` applies), the 4x4 float64 affine
        (voxel (x, y, z) -> mm, RAS+) and the unrepaired header.

    Raises:
        InputError: the file is damaged, not 3D, too large, or its geometry is unusable.
    """
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path.name} is empty (0 bytes)", fix=_DAMAGED)
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if compressed else raw  # type: ignore[assignment]
            header = _parse_header(stream.read(540), path)
            shape, dtype, offset = _layout(header, path)
            num_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
            check_claimed_size(shape, dtype, path)
            check_file_size(offset + num_bytes, size, compressed, path)
            affine = _affine(header, path)
            stream.seek(0)
            payload = _read_exactly(stream, offset + num_bytes, path)
            _drain(stream)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path.name} is truncated or damaged ({error})", fix=_DAMAGED) from error
    stored = np.frombuffer(payload, dtype, count=num_bytes // dtype.itemsize, offset=offset)
    return _scaled(stored.reshape(shape[::-1]), header, path), affine, header


def nifti_bytes(voxels: np.ndarray, geometry: nib.Nifti1Header) -> bytes:
    """Returns an uncompressed NIfTI file holding ``voxels [D, H, W]`` with the geometry fields of ``geometry``."""
    is_nifti2 = isinstance(geometry, nib.Nifti2Header)
    header = nib.Nifti2Header() if is_nifti2 else nib.Nifti1Header()
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape[::-1])
    for name in GEOMETRY_FIELDS:
        header[name] = geometry[name]
    header["magic"] = b"n+2\x00\r\n\x1a\n" if is_nifti2 else b"n+1"
    header["vox_offset"] = 544 if is_nifti2 else 352
    header["scl_slope"], header["scl_inter"] = 1, 0
    little_endian = voxels.astype(voxels.dtype.newbyteorder("<"), copy=False)
    return header.as_byteswapped("<").binaryblock + bytes(4) + np.ascontiguousarray(little_endian).tobytes()


def header_from_affine(affine: np.ndarray) -> nib.Nifti1Header:
    """Returns a header in mm whose qform and sform both hold ``affine`` (for volumes that did not come from NIfTI)."""
    header = nib.Nifti1Header()
    header.set_data_shape((1, 1, 1))
    header.set_qform(affine, code=1)
    header.set_sform(affine, code=1)
    header.set_xyzt_units("mm")
    return header


def check_claimed_size(shape: Sequence[int], dtype: np.dtype, path: Path) -> None:
    """Refuses a volume ``shape`` that would not fit into memory, before anything is allocated.

    Raises:
        InputError: the header claims more than 64 GiB or more than the machine's memory.
    """
    # Python integers: int64 products of a forged header would wrap around.
    num_bytes = int(np.prod([int(extent) for extent in shape], dtype=object)) * max(dtype.itemsize, 4)
    limit = min(MAX_VOLUME_BYTES, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if num_bytes > limit:
        raise InputError(
            f"the header of {path.name} claims {_extents(shape)} voxels ({num_bytes / 2**30:.1f} GiB), "
            f"at most {limit / 2**30:.1f} GiB can be read",
            field="dim",
            fix="check the header, or crop the volume",
        )


def check_file_size(needed: int, size: int, compressed: bool, path: Path) -> None:
    """Refuses a file of ``size`` bytes whose header claims more bytes (``needed``) than it can hold.

    Raises:
        InputError: the file is truncated, or its header is wrong.
    """
    most = size * _MAX_DEFLATE_RATIO if compressed else size
    if needed > most:
        kind = "compressed bytes" if compressed else "bytes"
        raise InputError(
            f"{path.name} is truncated: its header claims {needed} bytes, which {size} {kind} cannot hold",
            field="dim",
            fix=_DAMAGED,
        )


def check_affine(affine: np.ndarray, spacing_xyz: np.ndarray, path: Path, *, allow_shear: bool = False) -> None:
    """Refuses an affine that cannot place voxels, or that contradicts the spacing (mm, x, y, z).

    Raises:
        InputError: NaN or Inf, a singular or sheared matrix, or column lengths other than the spacing.
    """
    fix = "repair the orientation in the header of the file"
    if not np.isfinite(affine).all():
        raise InputError(f"the affine of {path.name} holds NaN or Inf", field="affine", fix=fix)
    lengths = voxel_sizes(affine)
    if (lengths <= 0).any() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise InputError(f"the affine of {path.name} is singular", field="affine", fix=fix)
    cosines = affine[:3, :3] / lengths
    shear = np.abs(cosines.T @ cosines - np.eye(3)).max()
    if shear > 5e-4 and not allow_shear:
        raise InputError(
            f"the axes of {path.name} are not perpendicular (largest cosine {shear:.4f}, expected 0)",
            field="affine",
            fix="resample the volume onto a grid without shear",
        )
    if not np.allclose(lengths, spacing_xyz, rtol=1e-2):
        raise InputError(
            f"{path.name} says {_mm(spacing_xyz)} mm in pixdim but {_mm(lengths)} mm in its affine",
            field="spacing",
            fix="make both the same",
        )


def _parse_header(block: bytes, path: Path) -> nib.Nifti1Header:
    first = block[:4]
    sizes = {int.from_bytes(first, "little"), int.from_bytes(first, "big")}
    if 348 in sizes and block[344:348] == b"n+1\x00":
        return nib.Nifti1Header(block[:348], check=False)
    if 540 in sizes and block[4:8] == b"n+2\x00" and len(block) == 540:
        return nib.Nifti2Header(block, check=False)
    raise InputError(
        f"{path.name} is not a single-file NIfTI image (no n+1 or n+2 magic in its first {len(block)} bytes)",
        fix="convert it to .nii.gz, or restore it from its source",
    )


def _layout(header: nib.Nifti1Header, path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """Returns the shape (x, y, z), the data type as stored and the offset of the first voxel in bytes."""
    dims = [int(extent) for extent in header["dim"]]
    extents = dims[1 : dims[0] + 1] if 0 < dims[0] <= 7 else []
    while len(extents) > 3 and extents[-1] == 1:
        extents.pop()
    if len(extents) != 3:
        raise InputError(
            f"{path.name} has {len(extents)} dimensions ({_extents(extents)}), expected 3",
            field="dim",
            fix="write one 3D file per channel or time point",
        )
    if min(extents) < 1:
        raise InputError(f"{path.name} has shape {_extents(extents)}, every extent must be positive", field="dim")
    offset = float(header["vox_offset"])
    if not header.sizeof_hdr <= offset <= _MAX_HEADER_BYTES:
        raise InputError(f"{path.name} says its voxels start at byte {offset:g}", field="vox_offset", fix=_DAMAGED)
    return tuple(extents), _stored_dtype(header, path), int(offset)


def _stored_dtype(header: nib.Nifti1Header, path: Path) -> np.dtype:
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise InputError(
            f"{path.name} has the unknown data type {int(header['datatype'])}", field="datatype"
        ) from error
    if dtype.kind not in "iuf":
        raise InputError(
            f"{path.name} holds {dtype} voxels, expected integers or real numbers",
            field="datatype",
            fix="convert it to one real value per voxel",
        )
    return dtype


def _affine(header: nib.Nifti1Header, path: Path) -> np.ndarray:
    spacing = np.asarray(header["pixdim"][1:4], np.float64)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise InputError(
            f"{path.name} has spacing {_mm(spacing)} mm, expected three positive numbers",
            field="spacing",
            fix="set pixdim to the voxel size in mm",
        )
    unit = _UNITS.get(int(header["xyzt_units"]) & 7)
    if unit:
        raise InputError(f"{path.name} gives its geometry in {unit}, expected mm", field="xyzt_units", fix="convert it")
    header = header.copy()
    if header["pixdim"][0] == 0:
        header["pixdim"][0] = 1  # the standard's default for qfac, which nibabel asks to be written out
    try:
        # Both forms are computed where set: a reader other than ours may prefer the other one.
        qform = header.get_qform(coded=True)[0]
        sform = header.get_sform(coded=True)[0]
    except (ValueError, HeaderDataError, np.linalg.LinAlgError) as error:
        raise InputError(f"the qform of {path.name} is invalid ({error})", field="affine", fix="repair it") from error
    for form in (qform, sform):
        if form is not None:
            check_affine(form, spacing, path, allow_shear=form is sform and qform is not None)
    # Without either form nibabel's affine is axis-aligned and centred.
    chosen = sform if sform is not None else qform if qform is not None else header.get_base_affine()
    return np.asarray(chosen, np.float64)


def _read_exactly(stream: IO[bytes], num_bytes: int, path: Path) -> bytearray:
    # In chunks: a forged header must not make us allocate more than the file really holds.
    payload = bytearray()
    while len(payload) < num_bytes:
        chunk = stream.read(min(_CHUNK_BYTES, num_bytes - len(payload)))
        if not chunk:
            raise EOFError(f"{len(payload)} of {num_bytes} bytes found in {path.name}")
        payload += chunk
    return payload


def _drain(stream: IO[bytes]) -> None:
    # gzip compares its checksum only at the end of the stream.
    while stream.read(_CHUNK_BYTES):
        pass


def _scaled(stored: np.ndarray, header: nib.Nifti1Header, path: Path) -> np.ndarray:
    native = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if np.isnan(slope) or slope == 0 or (slope == 1 and intercept == 0):
        return native
    if not (np.isfinite(slope) and np.isfinite(intercept)):
        raise InputError(f"{path.name} has intensity scaling {slope} x + {intercept}", field="scl_slope")
    try:
        with np.errstate(over="raise"):
            return native.astype(np.float64) * slope + intercept
    except FloatingPointError:
        raise InputError(
            f"{path.name} has intensity scaling {slope} x + {intercept}, too large for its values", field="scl_slope"
        ) from None


def _extents(shape: Sequence[int]) -> str:
    return " x ".join(str(extent) for extent in shape)


def _mm(values: np.ndarray) -> str:
    return " x ".join(f"{value:.5g}" for value in values)
