"""Volumes: the same voxels as nnU-Net's reader, the same geometry after writing, and refusal of damaged files."""

from __future__ import annotations

import copy
import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from fedcmt.errors import InputError
from fedcmt.nifti import GEOMETRY_FIELDS
from fedcmt.volume import Volume, geometry_difference, read_volume, write_segmentation, write_volume

SHAPE_XYZ = (5, 6, 4)


def rotation(degrees: float, axis: int) -> np.ndarray:
    angle = np.deg2rad(degrees)
    first, second = [index for index in range(3) if index != axis]
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def make_affine(kind: str) -> np.ndarray:
    cosines = {
        "plain": np.eye(3),
        "flipped": np.diag([-1.0, 1.0, -1.0]),
        "permuted": np.array([[0, 0, -1.0], [1, 0, 0], [0, 1, 0]]),
        "oblique": rotation(20, 0) @ rotation(-35, 2),
        "oblique_flipped": rotation(12, 1) @ rotation(50, 2) @ np.diag([-1.0, 1, 1]),
    }[kind]
    affine = np.eye(4)
    affine[:3, :3] = cosines * (0.7, 0.9, 5.0)
    affine[:3, 3] = (-31.5, 17.25, -400.125)
    return affine


def voxels_xyz(dtype: str = "int16") -> np.ndarray:
    return np.arange(np.prod(SHAPE_XYZ)).reshape(SHAPE_XYZ, order="F").astype(dtype)


def write_nifti(path: Path, affine: np.ndarray, *, qform: int = 1, sform: int = 1, dtype: str = "int16") -> Path:
    image = nib.Nifti1Image(voxels_xyz(dtype), None)
    image.set_qform(affine, qform)
    image.set_sform(affine, sform)
    image.header.set_xyzt_units("mm", "sec")
    image.to_filename(path)
    return path


def edit_header(path: Path, **fields: object) -> Path:
    """Writes header fields into an uncompressed NIfTI-1 file, with no repairs."""
    content = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", ["plain", "flipped", "permuted", "oblique", "oblique_flipped"])
@pytest.mark.parametrize(("qform", "sform"), [(1, 1), (1, 0), (0, 1), (2, 4), (0, 0)])
def test_segmentation_has_the_exact_geometry_of_the_image(tmp_path: Path, kind: str, qform: int, sform: int) -> None:
    source = write_nifti(tmp_path / "image.nii.gz", make_affine(kind), qform=qform, sform=sform)
    volume = read_volume(source)
    labels = (volume.data[0] > 50).astype(np.int64)
    write_segmentation(volume, labels, tmp_path / "labels.nii.gz")

    before, after = nib.load(source), nib.load(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(after.affine, before.affine)
    np.testing.assert_array_equal(volume.affine, before.affine)
    for field in GEOMETRY_FIELDS:
        assert after.header[field].tobytes() == before.header[field].tobytes(), field
    assert after.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(after.dataobj).T, labels)

    itk_before, itk_after = sitk.ReadImage(str(source)), sitk.ReadImage(str(tmp_path / "labels.nii.gz"))
    assert itk_after.GetSpacing() == itk_before.GetSpacing()
    assert itk_after.GetOrigin() == itk_before.GetOrigin()
    assert itk_after.GetDirection() == itk_before.GetDirection()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(itk_after), labels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.nii.gz", "labels.nii.gz"]


def test_header_bytes_that_nibabel_repairs_are_written_back_verbatim(tmp_path: Path) -> None:
    source = write_nifti(tmp_path / "image.nii", np.diag([1.0, 2, 3, 1]), qform=0, sform=1)
    edit_header(source, pixdim=[0, 1, 2, 3, 7, 0, 0, 0], xyzt_units=0)
    write_segmentation(read_volume(source), np.zeros(SHAPE_XYZ[::-1], int), tmp_path / "labels.nii")
    raw = nib.Nifti1Header((tmp_path / "labels.nii").read_bytes()[:348], check=False)
    assert raw["pixdim"].tolist() == [0, 1, 2, 3, 7, 0, 0, 0]
    assert raw["xyzt_units"] == 0


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize("scaling", [(1, 0), (0.3, -1024.7), (0, 0), (np.nan, np.nan)])
def test_voxels_equal_those_of_nnunets_reader(tmp_path: Path, dtype: str, scaling: tuple[float, float]) -> None:
    simpleitk_reader = pytest.importorskip("nnunetv2.imageio.simpleitk_reader_writer")
    path = write_nifti(tmp_path / "image.nii", make_affine("oblique"), dtype=dtype)
    edit_header(path, scl_slope=scaling[0], scl_inter=scaling[1])
    compressed = tmp_path / "image.nii.gz"
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    volume = read_volume(compressed)
    assert volume.data.dtype == np.float32
    if not np.isnan(scaling[0]):  # ITK multiplies by NaN; the standard and nibabel say unscaled
        expected, properties = simpleitk_reader.SimpleITKIO().read_images([str(compressed)])
        np.testing.assert_allclose(volume.data, expected, rtol=2e-7)
        np.testing.assert_allclose(volume.spacing, properties["spacing"], rtol=1e-12)
    np.testing.assert_allclose(volume.data[0].T, nib.load(compressed).get_fdata(), rtol=2e-7)


def test_nifti2_and_big_endian_files(tmp_path: Path) -> None:
    affine = make_affine("oblique_flipped")
    nib.Nifti2Image(voxels_xyz(), affine).to_filename(tmp_path / "two.nii.gz")
    big_endian = nib.Nifti1Image(voxels_xyz(), affine, nib.Nifti1Header(endianness=">"))
    big_endian.set_data_dtype(np.int16)
    big_endian.to_filename(tmp_path / "big.nii")
    for name in ("two.nii.gz", "big.nii"):
        volume = read_volume(tmp_path / name, dtype=None)
        np.testing.assert_array_equal(volume.data[0].T, voxels_xyz())
        assert volume.data.dtype == np.int16
        write_segmentation(volume, volume.data[0], tmp_path / "out.nii.gz")
        np.testing.assert_array_equal(nib.load(tmp_path / "out.nii.gz").affine, nib.load(tmp_path / name).affine)


@pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("kind", ["plain", "flipped", "oblique_flipped"])
def test_other_formats_keep_every_physical_point(tmp_path: Path, ending: str, kind: str) -> None:
    write_nifti(tmp_path / "source.nii.gz", make_affine(kind))
    source = sitk.ReadImage(str(tmp_path / "source.nii.gz"))
    sitk.WriteImage(source, str(tmp_path / f"image{ending}"))
    volume = read_volume(tmp_path / f"image{ending}")
    write_volume(volume, tmp_path / "copy.nii.gz")
    copied = sitk.ReadImage(str(tmp_path / "copy.nii.gz"))
    np.testing.assert_array_equal(volume.data[0], sitk.GetArrayFromImage(source))
    for index in [(0, 0, 0), (4, 0, 0), (0, 5, 0), (0, 0, 3), (4, 5, 3)]:
        lps = np.array(source.TransformIndexToPhysicalPoint(index))
        np.testing.assert_allclose((volume.affine @ (*index, 1))[:3], lps * (-1, -1, 1), atol=1e-4)
        np.testing.assert_allclose(copied.TransformIndexToPhysicalPoint(index), lps, atol=1e-4)


def test_channels_are_stacked_in_order(tmp_path: Path) -> None:
    for index in range(2):
        data = voxels_xyz() + index
        nib.Nifti1Image(data, make_affine("plain")).to_filename(tmp_path / f"case_000{index}.nii.gz")
    volume = read_volume([tmp_path / "case_0000.nii.gz", tmp_path / "case_0001.nii.gz"])
    assert volume.data.shape == (2, *SHAPE_XYZ[::-1])
    np.testing.assert_array_equal(volume.data[1] - volume.data[0], 1)
    with pytest.raises(ValueError, match="channel"):
        write_volume(volume, tmp_path / "out.nii.gz")
    write_volume(volume, tmp_path / "out.nii.gz", channel=1)
    np.testing.assert_array_equal(read_volume(tmp_path / "out.nii.gz").data[0], volume.data[1])


def test_trailing_axis_of_length_one_is_dropped(tmp_path: Path) -> None:
    nib.Nifti1Image(voxels_xyz()[..., None], make_affine("plain")).to_filename(tmp_path / "image.nii.gz")
    assert read_volume(tmp_path / "image.nii.gz").data.shape == (1, *SHAPE_XYZ[::-1])


def test_large_labels_use_uint16_and_wrong_labels_are_refused(tmp_path: Path) -> None:
    volume = read_volume(write_nifti(tmp_path / "image.nii.gz", make_affine("plain")))
    labels = np.full(SHAPE_XYZ[::-1], 300)
    write_segmentation(volume, labels, tmp_path / "labels.nii.gz")
    assert nib.load(tmp_path / "labels.nii.gz").get_data_dtype() == np.uint16
    for wrong in (labels[1:], labels - 301, labels * 300, labels.astype(float)):
        with pytest.raises(ValueError, match="`labels` should"):
            write_segmentation(volume, wrong, tmp_path / "wrong.nii.gz")
    with pytest.raises(InputError, match=r"wrong\.png"):
        write_segmentation(volume, labels, tmp_path / "wrong.png")
    assert not (tmp_path / "wrong.nii.gz").exists()


def test_same_labels_give_the_same_bytes(tmp_path: Path) -> None:
    volume = read_volume(write_nifti(tmp_path / "image.nii.gz", make_affine("oblique")))
    for name in ("a.nii.gz", "b.nii.gz"):
        write_segmentation(volume, np.ones(SHAPE_XYZ[::-1], np.uint8), tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = read_volume(write_nifti(tmp_path / "image.nii.gz", make_affine("plain")))
    (tmp_path / "out.nii.gz").write_bytes(b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedcmt.volume.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_segmentation(volume, np.zeros(SHAPE_XYZ[::-1], int), tmp_path / "out.nii.gz")
    assert (tmp_path / "out.nii.gz").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.nii.gz", "out.nii.gz"]


def test_geometry_difference_names_the_field(tmp_path: Path) -> None:
    base = read_volume(write_nifti(tmp_path / "image.nii.gz", make_affine("plain")))

    def changed(affine: np.ndarray | None = None, spacing: tuple[float, float, float] = base.spacing) -> Volume:
        return Volume(base.data, spacing, base.affine if affine is None else affine)

    moved, flipped = base.affine.copy(), base.affine @ np.diag([-1.0, 1, 1, 1])
    moved[2, 3] += 1
    assert geometry_difference(base, changed()) is None
    assert geometry_difference(base, changed(moved))[0] == "origin"
    assert geometry_difference(base, changed(flipped)) == ("direction", "direction (axes RAS and LAS)")
    assert geometry_difference(base, changed(spacing=(5, 0.9, 0.8)))[0] == "spacing"
    assert geometry_difference(base, Volume(base.data[:, 1:], base.spacing, base.affine))[0] == "shape"


HEADER_FAULTS = {
    "zero spacing": ({"pixdim": [1, 0, 1, 1, 0, 0, 0, 0]}, "spacing"),
    "negative spacing": ({"pixdim": [1, -1, 1, 1, 0, 0, 0, 0]}, "spacing"),
    "NaN spacing": ({"pixdim": [1, np.nan, 1, 1, 0, 0, 0, 0]}, "spacing"),
    "spacing contradicts affine": ({"pixdim": [1, 3, 1, 1, 0, 0, 0, 0]}, "spacing"),
    "NaN affine": ({"srow_x": [np.nan, 0, 0, 0]}, "affine"),
    "Inf origin": ({"srow_z": [0, 0, 1, np.inf]}, "affine"),
    "singular affine": ({"srow_y": [1, 0, 0, 0]}, "affine"),
    "zero affine": ({"srow_x": [0] * 4, "srow_y": [0] * 4, "srow_z": [0] * 4}, "affine"),
    "sheared affine": ({"srow_x": [1, 0.1, 0, 0]}, "affine"),
    "bad quaternion": ({"qform_code": 1, "quatern_b": 4.0}, "affine"),
    "NaN quaternion": ({"qform_code": 1, "quatern_b": np.nan}, "affine"),
    "micrometres": ({"xyzt_units": 3}, "xyzt_units"),
    "4D": ({"dim": [4, 5, 6, 2, 2, 1, 1, 1]}, "dim"),
    "2D": ({"dim": [2, 5, 24, 1, 1, 1, 1, 1]}, "dim"),
    "empty axis": ({"dim": [3, 5, 0, 4, 1, 1, 1, 1]}, "dim"),
    "negative axis": ({"dim": [3, 5, -6, 4, 1, 1, 1, 1]}, "dim"),
    "no axes": ({"dim": [0, 5, 6, 4, 1, 1, 1, 1]}, "dim"),
    "terabytes": ({"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, "dim"),
    "more than the file holds": ({"dim": [3, 50, 60, 40, 1, 1, 1, 1]}, None),
    "voxels far away": ({"vox_offset": 1e30}, "vox_offset"),
    "voxels inside the header": ({"vox_offset": 8}, "vox_offset"),
    "NaN offset": ({"vox_offset": np.nan}, "vox_offset"),
    "colours": ({"datatype": 128, "bitpix": 24}, "datatype"),
    "complex": ({"datatype": 32, "bitpix": 64}, "datatype"),
    "unknown type": ({"datatype": 9999}, "datatype"),
    "infinite scaling": ({"scl_slope": np.inf, "scl_inter": 0}, "scl_slope"),
    "wrong magic": ({"magic": b"ni1"}, None),
    "not NIfTI": ({"sizeof_hdr": 0}, None),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_header_fault_is_one_line_with_the_file(tmp_path: Path, fault: str, compressed: bool) -> None:
    fields, field = HEADER_FAULTS[fault]
    path = write_nifti(tmp_path / "bad.nii", np.eye(4), qform=0)
    edit_header(path, **fields)
    if compressed:
        content = path.read_bytes()
        path = tmp_path / "bad.nii.gz"
        path.write_bytes(gzip.compress(content))
    assert expect_one_line(path, field)


def expect_one_line(path: Path, field: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read_volume(path)
    line = str(caught.value)
    assert path.name in line
    assert "\n" not in line
    if field is not None:
        assert caught.value.field == field, line
    return line


def test_scaling_beyond_what_numbers_hold_is_refused(tmp_path: Path) -> None:
    nib.Nifti1Image(np.full((5, 6, 4), 1e300), np.eye(4)).to_filename(tmp_path / "bad.nii")
    edit_header(tmp_path / "bad.nii", scl_slope=1e30, scl_inter=0)
    expect_one_line(tmp_path / "bad.nii", "scl_slope")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    data = voxels_xyz("float32")
    data[1, 2, 3] = value
    nib.Nifti1Image(data, np.eye(4)).to_filename(tmp_path / "bad.nii.gz")
    assert expect_one_line(tmp_path / "bad.nii.gz", "voxels")
    image = sitk.GetImageFromArray(data)
    sitk.WriteImage(image, str(tmp_path / "bad.nrrd"))
    assert expect_one_line(tmp_path / "bad.nrrd", "voxels")


def test_overflow_of_float32_is_refused(tmp_path: Path) -> None:
    nib.Nifti1Image(np.full((3, 3, 3), 1e300), np.eye(4)).to_filename(tmp_path / "bad.nii.gz")
    assert expect_one_line(tmp_path / "bad.nii.gz", "voxels")


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_every_truncation_is_refused(tmp_path: Path, ending: str) -> None:
    write_nifti(tmp_path / "source.nii.gz", np.eye(4))
    path = tmp_path / f"image{ending}"
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "source.nii.gz")), str(path), ending != ".mha")
    content = path.read_bytes()
    last = 20 if ending == ".nrrd" else 1  # ITK does not look at the checksum behind the voxels
    for length in {0, 1, 2, 10, 100, len(content) // 2, len(content) - last}:
        bad = tmp_path / f"bad{ending}"
        bad.write_bytes(content[:length])
        assert expect_one_line(bad)


def test_damaged_gzip_payload_is_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "bad.nii.gz", np.eye(4))
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF  # the checksum
    path.write_bytes(content)
    assert expect_one_line(path)


def test_other_formats_refuse_what_nifti_refuses(tmp_path: Path) -> None:
    nrrd = "NRRD0005\ntype: short\ndimension: 3\nsizes: {sizes}\nspace: left-posterior-superior\n"
    nrrd += "space directions: {directions}\nspace origin: (0,0,0)\nendian: little\nencoding: raw\n\n"
    good = {"sizes": "2 2 2", "directions": "(1,0,0) (0,1,0) (0,0,1)"}
    faults = {
        "huge": {"sizes": "90000 90000 90000"},
        "longer": {"sizes": "500 500 500"},
        "zero": {"directions": "(0,0,0) (0,1,0) (0,0,1)"},
        "nan": {"directions": "(nan,0,0) (0,1,0) (0,0,1)"},
        "singular": {"directions": "(1,0,0) (1,0,0) (0,0,1)"},
    }
    (tmp_path / "good.nrrd").write_bytes(nrrd.format(**good).encode() + bytes(16))
    assert read_volume(tmp_path / "good.nrrd").data.shape == (1, 2, 2, 2)
    for name, fault in faults.items():
        (tmp_path / f"{name}.nrrd").write_bytes(nrrd.format(**good | fault).encode() + bytes(16))
        assert expect_one_line(tmp_path / f"{name}.nrrd")
    for name, image in {
        "4d": sitk.Image([3, 3, 3, 2], sitk.sitkInt16),
        "2d": sitk.Image([3, 3], sitk.sitkInt16),
        "vector": sitk.Image([3, 3, 3], sitk.sitkVectorFloat32, 2),
    }.items():
        sitk.WriteImage(image, str(tmp_path / f"{name}.mha"))
        assert expect_one_line(tmp_path / f"{name}.mha")


META = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\n"
    "ElementSpacing = 1 1 1\nDimSize = 2 2 2\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
)


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("NDims = 3", "NDims = -1", "NDims"),
        ("NDims = 3", "NDims = 99999999999 inf nan", "NDims"),
        ("NDims = 3\n", "", "NDims"),
        ("DimSize = 2 2 2", "DimSize = 2 2 2 2 2 2 2 2 2 2 2 2", "DimSize"),
        ("ElementSpacing = 1 1 1", "ElementSpacing = 1", "ElementSpacing"),
        ("Offset = 0 0 0", "Position = 0 0", "Offset"),
        ("LOCAL", "../other.raw", "ElementDataFile"),
        ("ElementDataFile = LOCAL", "", "ElementDataFile"),
    ],
)
def test_meta_headers_that_would_crash_itk(tmp_path: Path, old: str, new: str, field: str) -> None:
    (tmp_path / "x.mha").write_bytes(META.encode() + bytes(16))
    assert read_volume(tmp_path / "x.mha").data.shape == (1, 2, 2, 2)
    (tmp_path / "x.mha").write_bytes(META.replace(old, new).encode() + bytes(16))
    expect_one_line(tmp_path / "x.mha", field)


def test_unknown_ending_missing_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "scan.png").write_bytes(b"x")
    (tmp_path / "folder.nii.gz").mkdir()
    assert expect_one_line(tmp_path / "scan.png")
    assert expect_one_line(tmp_path / "missing.nii.gz")
    assert expect_one_line(tmp_path / "folder.nii.gz")
    with pytest.raises(InputError, match="no image"):
        read_volume([])


def test_channels_on_different_grids_are_refused(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", make_affine("plain"))
    write_nifti(tmp_path / "b.nii.gz", make_affine("flipped"))
    nib.Nifti1Image(voxels_xyz()[1:], make_affine("plain")).to_filename(tmp_path / "c.nii.gz")
    for other, field in (("b", "direction"), ("c", "shape")):
        with pytest.raises(InputError, match=rf"a\.nii\.gz and {other}\.nii\.gz") as caught:
            read_volume([tmp_path / "a.nii.gz", tmp_path / f"{other}.nii.gz"])
        assert caught.value.field == field


def test_error_line_and_its_parts() -> None:
    error = InputError("spacing is 0,\nexpected more", field="spacing", fix="set it")
    assert str(error) == "field 'spacing': spacing is 0, expected more; set it"
    located = error.located(client="ct_a", case="lung\x1b01")
    assert str(located) == "client 'ct_a', case 'lung 01', field 'spacing': spacing is 0, expected more; set it"
    assert located.located(client="other").client == "ct_a"
    assert str(copy.copy(located)) == str(located)
