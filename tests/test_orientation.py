"""Scans stored in another orientation than the training data: said, turned on request, and written as they came."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from fedcmt.errors import InputError
from fedcmt.files import read_json
from fedcmt.infer import Predictor, main
from fedcmt.orientation import ORIENTATIONS_KEY, fitted_scan, reoriented
from fedcmt.predictor import entropy_map
from fedcmt.volume import axis_codes, read_volume, write_segmentation, write_volume

OBLIQUE = np.array([[-0.7, 0.2, 0.1, 5.0], [0.15, 1.1, -0.3, -7.0], [0.1, 0.2, 3.0, 11.0], [0, 0, 0, 1]])


def write_scan(path: Path, affine: np.ndarray, seed: int = 0) -> Path:
    voxels = np.random.default_rng(seed).normal(0, 100, (6, 8, 5)).astype(np.float32)
    image = nibabel.Nifti1Image(voxels, orthogonal(affine))
    image.to_filename(path)
    return path


def orthogonal(affine: np.ndarray) -> np.ndarray:
    """The affine without shear."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    u, _, v = np.linalg.svd(affine[:3, :3] / lengths)
    result = affine.copy()
    result[:3, :3] = u @ v * lengths
    return result


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "PIL", "LAS"])
def test_turning_keeps_every_voxels_place_and_comes_back(tmp_path: Path, codes: str) -> None:
    volume = read_volume(write_scan(tmp_path / "a.nii.gz", OBLIQUE))
    turned = reoriented(volume, codes)
    assert axis_codes(turned.affine) == codes
    np.testing.assert_array_equal(turned.as_stored(turned.data), volume.data)
    np.testing.assert_allclose(np.linalg.norm(turned.affine[:3, :3], axis=0)[::-1], turned.spacing)
    for index in np.ndindex(volume.data.shape[1:]):
        place = volume.affine @ [*index[::-1], 1]
        there = np.round(np.linalg.solve(turned.affine, place)[:3]).astype(int)
        assert turned.data[(0, *there[::-1])] == volume.data[(0, *index)]
    with pytest.raises(ValueError, match="as it is stored"):
        reoriented(turned, "RAS")


def test_nibabel_turns_the_same_way(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "a.nii.gz", OBLIQUE)
    image = nibabel.load(path)
    transform = ornt_transform(io_orientation(image.affine), axcodes2ornt("LPI"))
    expected = image.as_reoriented(transform)
    turned = reoriented(read_volume(path), "LPI")
    np.testing.assert_array_equal(turned.data[0].T, expected.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(turned.affine, expected.affine, atol=1e-6)


def test_what_is_written_has_the_stored_axes(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "a.nii.gz", OBLIQUE)
    turned = reoriented(read_volume(path), "PIR")
    write_segmentation(turned, (turned.data[0] > 0).astype(np.uint8), tmp_path / "labels.nii.gz")
    write_volume(turned, tmp_path / "copy.nii.gz")
    before = nibabel.load(path)
    for name, expected in (("labels", before.get_fdata() > 0), ("copy", before.get_fdata(dtype=np.float32))):
        after = nibabel.load(tmp_path / f"{name}.nii.gz")
        np.testing.assert_array_equal(after.affine, before.affine)
        np.testing.assert_array_equal(after.get_fdata(dtype=np.float32), expected)


def test_only_an_unknown_orientation_is_remarked_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volume = read_volume(write_scan(tmp_path / "a.nii.gz", OBLIQUE))
    found = axis_codes(volume.affine)
    for plans in ({}, {ORIENTATIONS_KEY: {}}, {ORIENTATIONS_KEY: {"RAS": 2, found: 1}}):
        assert fitted_scan(volume, plans, ["CT"], "a", reorient=True) is volume
    assert capsys.readouterr().err == ""
    other = {ORIENTATIONS_KEY: {"SPR": 1, "SAR": 2}}
    assert fitted_scan(volume, other, ["CT"], "a") is volume
    assert f"case 'a': its axes point to {found}, those of the training data to SPR, SAR" in capsys.readouterr().err
    assert axis_codes(fitted_scan(volume, other, ["CT"], "a", reorient=True).affine) == "SAR"
    volume.data[:] = 7
    fitted_scan(volume, {}, ["CT"], "a")
    assert "channel 'CT' is constant (7)" in capsys.readouterr().err


@pytest.mark.parametrize("stored", [3, ["LPS"], {"LPS": "2"}, {"LLS": 1}, {"XYZ": 1}, {"": 1}])
def test_orientations_that_are_none_are_refused(tmp_path: Path, stored: object) -> None:
    volume = read_volume(write_scan(tmp_path / "a.nii.gz", OBLIQUE))
    with pytest.raises(InputError, match="has training_orientations"):
        fitted_scan(volume, {ORIENTATIONS_KEY: stored}, ["CT"], "a", reorient=True)


def test_a_turned_scan_gets_the_labels_of_the_unturned_one(
    finished: Path, raw_datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = tmp_path / "w"
    shutil.copytree(finished / "clients" / "ct_plain", workspace / "clients" / "ct_plain")
    assert read_json(workspace / "clients" / "ct_plain" / "plans.json")[ORIENTATIONS_KEY] == {"LPS": 2}
    scan = raw_datasets / "Dataset801_Plain" / "imagesTs" / "case_02_0000.nii.gz"
    image = nibabel.load(scan)
    turned = image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt("SRA")))
    turned.to_filename(tmp_path / "turned.nii.gz")
    shutil.copy(scan, tmp_path / "scan.nii.gz")
    options = [
        "--workspace",
        str(workspace),
        "--client",
        "ct_plain",
        "-o",
        str(tmp_path / "out"),
        "--disable-mirroring",
    ]
    assert main([*options, "-i", str(tmp_path / "scan.nii.gz"), "--reorient"]) == 0
    assert "warning" not in capsys.readouterr().err
    maps = ("--save-probabilities", "--save-entropy")
    assert main([*options, "-i", str(tmp_path / "turned.nii.gz"), "--reorient", *maps]) == 0
    expected, found = (nibabel.load(tmp_path / "out" / f"{name}.nii.gz") for name in ("scan", "turned"))
    np.testing.assert_array_equal(found.affine, turned.affine)
    back = found.as_reoriented(ornt_transform(io_orientation(found.affine), io_orientation(expected.affine)))
    assert len(np.unique(expected.dataobj)) > 1
    np.testing.assert_array_equal(np.asarray(back.dataobj), np.asarray(expected.dataobj))
    with np.load(tmp_path / "out" / "turned.npz") as stored:
        assert stored["probabilities"].shape[1:] == found.shape[::-1]
        expected_entropy = entropy_map(stored["probabilities"], regions=False)
    entropy = read_volume(tmp_path / "out" / "turned_entropy.nii.gz")
    np.testing.assert_allclose(entropy.data[0], expected_entropy, atol=1e-6)
    np.testing.assert_allclose(entropy.affine, turned.affine)
    assert main([*options, "-i", str(tmp_path / "turned.nii.gz")]) == 0
    assert "axes point to SRA" in capsys.readouterr().err
    predictor = Predictor.from_workspace(workspace, "ct_plain", device="cpu", mirroring=False)
    predictor.predict(read_volume(tmp_path / "turned.nii.gz"), case="turned")
    assert "case 'turned': its axes point to SRA" in capsys.readouterr().err
