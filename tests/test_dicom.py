"""DICOM series: geometry against pydicom's numbers, Hounsfield units, and one line for what is no whole series."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_series import affine_by_pydicom, hounsfield, rotation, write_series
from pydicom.uid import generate_uid

from fedcmt.dicom import choose_series, dicom_cases, find_series, read_dicom, series_files
from fedcmt.dicom_seg import check_dicom_seg, dicom_segmentation, segment_names
from fedcmt.errors import InputError
from fedcmt.infer import main
from fedcmt.volume import read_volume, write_segmentation


@pytest.mark.parametrize("axis", [None, "axial", "sagittal", "reversed"])
def test_voxels_and_places(tmp_path: Path, axis: str | None) -> None:
    frames = {
        "axial": np.eye(3),
        "sagittal": np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]),
        "reversed": np.diag([1.0, -1, -1]),
    }
    voxels = hounsfield()
    files = write_series(tmp_path / "ct", voxels, frames.get(axis or "", rotation()))
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.data, voxels[None].astype(np.float32))
    np.testing.assert_allclose(volume.affine, affine_by_pydicom(files), atol=1e-5)
    np.testing.assert_allclose(volume.spacing, (2.5, 1.25, 0.75), rtol=1e-6)
    assert series_files(tmp_path / "ct") == tuple(files)
    write_segmentation(volume, (voxels > 0).astype(np.uint8), tmp_path / "labels.nii.gz")
    written = nibabel.load(tmp_path / "labels.nii.gz")
    np.testing.assert_allclose(written.affine, affine_by_pydicom(files), atol=1e-4)  # NIfTI stores float32
    np.testing.assert_array_equal(np.asarray(written.dataobj).T, voxels > 0)


def test_each_slice_is_rescaled_by_its_own_numbers(tmp_path: Path) -> None:
    files = write_series(tmp_path / "pet", hounsfield())
    stored = []
    for index, path in enumerate(files):
        dataset = pydicom.dcmread(path)
        dataset.RescaleSlope = 1 if index == 0 else 0.5 + 0.125 * index
        dataset.RescaleIntercept = 0
        dataset.save_as(path)
        stored.append(dataset.pixel_array * float(dataset.RescaleSlope))
    np.testing.assert_allclose(read_dicom(tmp_path / "pet").data[0], np.stack(stored), rtol=1e-6)


def test_a_single_slice_needs_its_thickness(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path / "one", hounsfield()[:1])
    assert read_dicom(tmp_path / "one").spacing == pytest.approx((2.5, 1.25, 0.75))
    dataset = pydicom.dcmread(path)
    del dataset.SliceThickness
    dataset.save_as(path)
    assert line_of(lambda: read_dicom(tmp_path / "one"), "SliceThickness")


def test_several_series_are_named_and_chosen(tmp_path: Path) -> None:
    first, second = hounsfield(seed=1), hounsfield(seed=2)[:4]
    write_series(tmp_path / "study", first)
    for index, path in enumerate(write_series(tmp_path / "other", second)):
        shutil.move(path, tmp_path / "study" / f"B{index}")
    uids = {len(series.files): series.uid for series in find_series(tmp_path / "study")}
    error = line_of(lambda: read_volume(tmp_path / "study"), "--series")
    assert all(uid in error and f"CT, made up, {count} files" in error for count, uid in uids.items())
    line_of(lambda: dicom_cases(tmp_path / "study", 1), "--series")
    line_of(lambda: dicom_cases(tmp_path / "study", 1, ["1.2.3"]), "--series")
    line_of(lambda: dicom_cases(tmp_path / "study", 2, [uids[4]]), "--series")
    (slice_of_it,) = dicom_cases(tmp_path / "study", 1, [uids[4]])["study"]
    np.testing.assert_array_equal(read_volume(slice_of_it).data[0], second)
    both = dicom_cases(tmp_path / "study", 2, [uids[6], uids[4]])["study"]
    line_of(lambda: read_volume(both), "shape")


def test_folders_of_series_are_cases(tmp_path: Path) -> None:
    for name in ("p2", "p1"):
        write_series(tmp_path / "all" / name, hounsfield())
    (tmp_path / "all" / "p1" / "notes.txt").write_text("not DICOM")
    (tmp_path / "all" / "empty").mkdir()
    assert list(dicom_cases(tmp_path / "all", 1)) == ["p1", "p2"]
    assert dicom_cases(tmp_path / "all" / "empty", 1) == {}
    line_of(lambda: dicom_cases(tmp_path / "all" / "empty", 1, ["1.2"]), "--series")
    assert dicom_cases(tmp_path / "all" / "p1" / "notes.txt", 1) == {}
    shutil.copy(next((tmp_path / "all" / "p1").glob("IM*")), tmp_path / "all" / "p1" / "DICOMDIR")
    assert len(choose_series(tmp_path / "all" / "p1").files) == 6


def change(index: int, **values: object) -> Callable[[list[Path]], None]:
    def apply(files: list[Path]) -> None:
        dataset = pydicom.dcmread(files[index])
        for name, value in values.items():
            if value is None:
                delattr(dataset, name)
            else:
                setattr(dataset, name, value)
        dataset.save_as(files[index])

    return apply


def cut(index: int, length: int) -> Callable[[list[Path]], None]:
    return lambda files: files[index].write_bytes(files[index].read_bytes()[:length]) and None


def without_samples(files: list[Path]) -> None:
    content, samples = files[0].read_bytes(), b"(\0\2\0US\2\0"
    assert content.count(samples + b"\1\0") == 1
    files[0].write_bytes(content.replace(samples + b"\1\0", samples + b"\0\0"))


def tilt(files: list[Path]) -> None:
    for index, path in enumerate(files):
        dataset = pydicom.dcmread(path)
        dataset.ImagePositionPatient = [float(v) + index * shift for v, shift in zip(
            dataset.ImagePositionPatient, rotation()[:, 1], strict=True)]  # fmt: skip
        dataset.save_as(path)


def with_report(files: list[Path]) -> None:
    """A structured report in the folder is no series of images."""
    dataset = pydicom.dcmread(files[0])
    for name in ("PixelData", "Rows", "Columns", "BitsAllocated"):
        delattr(dataset, name)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    dataset.SeriesInstanceUID, dataset.Modality = generate_uid(), "SR"
    dataset.save_as(files[0].with_name("report.dcm"))


FAULTS: dict[str, tuple[Callable[[list[Path]], None], str]] = {
    "gap": (lambda files: files[2].unlink(), "ImagePositionPatient"),
    "two at one place": (change(3, ImagePositionPatient=["-31.5", "17.25", "-400.125"]), "ImagePositionPatient"),
    "no position": (change(3, ImagePositionPatient=None), "ImagePositionPatient"),
    "bad position": (change(3, ImagePositionPatient=["1", "2"]), "ImagePositionPatient"),
    "another orientation": (change(0, ImageOrientationPatient=[1, 0, 0, 0, 1, 0]), "ImageOrientationPatient"),
    "no directions": (change(0, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "ImageOrientationPatient"),
    "another spacing": (change(1, PixelSpacing=[3, 3]), "PixelSpacing"),
    "zero spacing": (change(1, PixelSpacing=[0, 3]), "PixelSpacing"),
    "no spacing": (change(1, PixelSpacing=None), "PixelSpacing"),
    "another size": (change(4, Rows=5, PixelData=bytes(2 * 5 * 12)), "Rows, Columns"),
    "more than the file holds": (change(4, Rows=60000, Columns=60000), "dim"),
    "several frames": (change(2, NumberOfFrames=2, PixelData=bytes(480)), "NumberOfFrames"),
    "tilted gantry": (tilt, "affine"),
    "cut in the voxels": (cut(1, 1200), "images"),
    "cut in the header": (cut(1, 400), "images"),
    "no samples in a pixel": (without_samples, "images"),  # found by test_fuzz.py
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_whole_series_is_one_line(tmp_path: Path, fault: str) -> None:
    spoil, field = FAULTS[fault]
    files = write_series(tmp_path / "ct", hounsfield())
    spoil(files)
    line_of(lambda: read_volume(tmp_path / "ct"), field)


def test_reports_are_passed_over(tmp_path: Path) -> None:
    with_report(write_series(tmp_path / "ct", hounsfield()))
    assert read_volume(tmp_path / "ct").data.shape == (1, 6, 10, 12)


def line_of(action: Callable[[], object], field: str) -> str:
    with pytest.raises(InputError) as caught:
        action()
    first = caught.value.each()[0]
    assert "\n" not in str(first)
    assert first.fix
    assert first.field == field, str(first)
    return str(first)


def test_segmentation_object_refers_to_its_slices(tmp_path: Path) -> None:
    import highdicom

    voxels = hounsfield()
    files = write_series(tmp_path / "ct", voxels)
    labels = np.zeros(voxels.shape, np.uint8)
    labels[1:3, 2:5, 3:6], labels[4, 1:3, 1:3] = 4, 2
    (tmp_path / "seg.dcm").write_bytes(
        dicom_segmentation(labels, series_files(tmp_path / "ct"), {4: "organ", 2: "spot"})
    )
    written = highdicom.seg.segread(tmp_path / "seg.dcm")
    source = pydicom.dcmread(files[0], stop_before_pixels=True)
    assert [written.get_segment_description(i).segment_label for i in (1, 2)] == ["organ", "spot"]
    assert written.StudyInstanceUID == source.StudyInstanceUID
    assert written.FrameOfReferenceUID == source.FrameOfReferenceUID
    uids = [pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in files]
    masks = written.get_pixels_by_source_instance(
        uids, ignore_spatial_locations=False, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(masks[..., 0], labels == 4)
    np.testing.assert_array_equal(masks[..., 1], labels == 2)


def test_names_of_segments() -> None:
    plain = {"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}}
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
    assert segment_names(plain) == {1: "a", 2: "b"}
    assert segment_names(regions) == {1: "whole", 2: "core"}


def test_segmentation_objects_need_dicom_and_highdicom(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line_of(lambda: check_dicom_seg({}, "segmentation"), "--dicom-seg")
    line_of(lambda: check_dicom_seg({"a": (tmp_path,)}, "classification"), "--dicom-seg")
    check_dicom_seg({"a": (tmp_path,)}, "segmentation")
    monkeypatch.setitem(sys.modules, "highdicom", None)
    assert "pip install 'fedcmt[dicom]'" in line_of(
        lambda: check_dicom_seg({"a": (tmp_path,)}, "segmentation"), "--dicom-seg"
    )


def test_predicting_a_series(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_series(tmp_path / "patient", hounsfield((18, 22, 26)))
    options = ["--workspace", str(finished), "--client", "ct_plain", "-o", str(tmp_path / "out"), "--disable-mirroring"]
    assert main([*options, "-i", str(tmp_path / "patient"), "--dicom-seg"]) == 0, capsys.readouterr().err
    labels = nibabel.load(tmp_path / "out" / "patient.nii.gz")
    np.testing.assert_allclose(labels.affine, affine_by_pydicom(files), atol=1e-4)
    assert labels.shape == (26, 22, 18)
    segmentation = pydicom.dcmread(tmp_path / "out" / "patient.dcm")
    assert [item.SegmentLabel for item in segmentation.SegmentSequence] == ["organ", "lesion"]
    files[5].unlink()
    assert main([*options, "-i", str(tmp_path / "patient")]) == 2
    assert "case 'patient', field 'ImagePositionPatient'" in capsys.readouterr().err
    scan = tmp_path / "out" / "patient.nii.gz"
    assert main([*options, "-i", str(scan), "--dicom-seg"]) == 2


def test_a_folder_of_series_goes_on_after_a_bad_one(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        files = write_series(tmp_path / "patients" / name, hounsfield((18, 22, 26)))
        if name == "first":
            files[5].unlink()
    options = ["--workspace", str(finished), "--client", "ct_plain", "-o", str(tmp_path / "out"), "--disable-mirroring"]
    assert main([*options, "-i", str(tmp_path / "patients"), "--dicom-seg"]) == 1
    assert "case 'first', field 'ImagePositionPatient'" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["second.dcm", "second.nii.gz"]
