"""Raw datasets: what a good one becomes, and one clear line for every fault of a bad one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from organs_dataset import (
    REGIONS,
    complaint,
    edit,
    load,
)

from fedcmt.dataset import check_images, find_dataset, load_dataset


def test_a_good_dataset(raw: Path) -> None:
    dataset = load_dataset(raw, "Dataset011_Organs")
    assert dataset.name == "Dataset011_Organs"
    assert dataset.channel_names == ("T1", "T2")
    assert dataset.labels == {"background": 0, "liver": 1, "spleen": 2}
    assert dataset.label_values == {0, 1, 2}
    assert (dataset.regions_class_order, dataset.ignore_label, dataset.class_names) == (None, None, None)
    assert list(dataset.train) == ["case_1", "case_2"]
    assert [path.name for path in dataset.train["case_2"].images] == ["case_2_0000.nii.gz", "case_2_0001.nii.gz"]
    assert dataset.test["case_9"].label == dataset.folder / "labelsTs" / "case_9.nii.gz"
    assert check_images(dataset) == []


def test_test_cases_need_no_label_and_other_files_are_left_alone(folder: Path) -> None:
    shutil.rmtree(folder / "labelsTs")
    (folder / "imagesTr" / "README.txt").write_text("notes")
    (folder / "imagesTr" / ".case_1_0000.nii.gz.part").write_text("")
    (folder / "imagesTr" / ".hidden.nrrd").write_text("")
    assert load(folder).test["case_9"].label is None
    shutil.rmtree(folder / "imagesTs")
    assert load(folder).test == {}


def test_regions_and_ignore(folder: Path) -> None:
    edit(folder, labels=REGIONS | {"ignore": 3}, regions_class_order=[1, 2])
    dataset = load(folder)
    assert dataset.labels == {"background": 0, "whole": (1, 2), "core": (2,), "ignore": 3}
    assert dataset.regions_class_order == (1, 2)
    assert dataset.ignore_label == 3
    assert check_images(dataset) == []


def test_several_channels_may_share_a_normalisation_name(folder: Path) -> None:
    edit(folder, channel_names={"0": "CT", "1": "CT"})
    assert load(folder).channel_names == ("CT", "CT")


def test_nnunets_readers_may_be_named(folder: Path) -> None:
    for reader in ("SimpleITKIO", "NibabelIO", "None"):
        edit(folder, overwrite_image_reader_writer=reader)
        assert load(folder).dataset_json["overwrite_image_reader_writer"] == reader


def test_file_list(folder: Path) -> None:
    (folder / "scans").mkdir()
    for path in [*(folder / "imagesTr").iterdir(), *(folder / "labelsTr").iterdir()]:
        path.rename(folder / "scans" / path.name)
    entries = {
        name: {
            "images": [f"scans/{name}_0000.nii.gz", f"scans/{name}_0001.nii.gz"],
            "label": f"scans/{name}.nii.gz",
        }
        for name in ("case_2", "case_1")
    }
    edit(folder, dataset=entries)
    dataset = load(folder)
    assert list(dataset.train) == ["case_1", "case_2"]
    assert dataset.train["case_1"].label == folder / "scans" / "case_1.nii.gz"
    assert check_images(dataset) == []


@pytest.mark.parametrize(
    ("dataset", "part"),
    [
        (12, "Dataset011_Organs"), ("Dataset011_Orgasn", "Dataset011_Organs"), ("../Dataset011_Organs", "found"),
        ("Dataset011_Organs/..", "found"), ("Dataset011_\0", "found"), ("Dataset011_" + "a" * 300, "found"),
        ("", "found"), (-1, "found"), (True, "found"), ("Organs", "found"), (7, "ambiguous"),
    ],
)  # fmt: skip
def test_dataset_names(raw: Path, dataset: int | str, part: str) -> None:
    for name in ("Dataset007_A", "Dataset007_B"):
        (raw / name).mkdir()
    error = complaint(lambda: find_dataset(raw, dataset, client="site_a"))
    assert error.field == "dataset"
    assert part in str(error)
    for good in (11, "11", "011", "Dataset011_Organs"):
        assert find_dataset(raw, good).name == "Dataset011_Organs"
    complaint(lambda: find_dataset(raw / "missing", 11, client="site_a"))


JSON_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no channel_names": ({"channel_names": None}, "channel_names"),
    "v1 modality": ({"channel_names": None, "modality": {"0": "T1"}}, "channel_names"),
    "no labels": ({"labels": None}, "labels"),
    "no numTraining": ({"numTraining": None}, "numTraining"),
    "no file_ending": ({"file_ending": None}, "file_ending"),
    "channel list": ({"channel_names": ["T1", "T2"]}, "channel_names"),
    "channel gap": ({"channel_names": {"0": "T1", "2": "T2"}}, "channel_names"),
    "channel not text": ({"channel_names": {"0": "T1", "1": 2}}, "channel_names"),
    "channel twice": ({"channel_names": {"0": "T1", "1": "T1"}}, "channel_names"),
    "no channels": ({"channel_names": {}}, "channel_names"),
    "too few channels": ({"channel_names": {"0": "T1"}}, "channel_names"),
    "too many channels": ({"channel_names": {"0": "T1", "1": "T2", "2": "T3"}}, "images"),
    "label list": ({"labels": ["background", "liver"]}, "labels"),
    "v1 labels": ({"labels": {"0": "background", "1": "liver"}}, "labels"),
    "label gap": ({"labels": {"background": 0, "liver": 1, "spleen": 3}}, "labels"),
    "no background": ({"labels": {"liver": 1, "spleen": 2}}, "labels"),
    "background is 1": ({"labels": {"background": 1, "liver": 0}}, "labels"),
    "label fraction": ({"labels": {"background": 0, "liver": 1.5}}, "labels"),
    "label text": ({"labels": {"background": 0, "liver": "1"}}, "labels"),
    "label true": ({"labels": {"background": 0, "liver": True}}, "labels"),
    "label negative": ({"labels": {"background": 0, "liver": -1}}, "labels"),
    "label twice": ({"labels": {"background": 0, "liver": 1, "spleen": 1}}, "labels"),
    "empty name": ({"labels": {"background": 0, " ": 1}}, "labels"),
    "line break in name": ({"labels": {"background": 0, "li\nver": 1}}, "labels"),
    "empty region": ({"labels": {"background": 0, "whole": []}}, "labels"),
    "region with 0": ({"labels": {"background": 0, "whole": [0, 1]}, "regions_class_order": [1]}, "labels"),
    "region twice": ({"labels": REGIONS | {"other": [2, 1]}, "regions_class_order": [1, 2, 2]}, "labels"),
    "region repeats": ({"labels": {"background": 0, "whole": [1, 1]}}, "labels"),
    "no order": ({"labels": REGIONS}, "regions_class_order"),
    "short order": ({"labels": REGIONS, "regions_class_order": [1]}, "regions_class_order"),
    "order twice": ({"labels": REGIONS, "regions_class_order": [2, 2]}, "regions_class_order"),
    "order outside": ({"labels": REGIONS, "regions_class_order": [1, 3]}, "regions_class_order"),
    "order no list": ({"labels": REGIONS, "regions_class_order": 1}, "regions_class_order"),
    "ignore not highest": ({"labels": {"background": 0, "ignore": 1, "liver": 2}}, "labels"),
    "ignore inside region": ({"labels": REGIONS | {"ignore": 2}, "regions_class_order": [1, 2]}, "labels"),
    "ignore after gap": ({"labels": {"background": 0, "liver": 1, "ignore": 3}}, "labels"),
    "ignore region": ({"labels": {"background": 0, "liver": 1, "ignore": [2, 3]}}, "labels"),
    "numTraining wrong": ({"numTraining": 3}, "numTraining"),
    "numTraining text": ({"numTraining": "2"}, "numTraining"),
    "numTraining true": ({"numTraining": True}, "numTraining"),
    "ending wrong": ({"file_ending": ".nii"}, "file_ending"),
    "ending other": ({"file_ending": ".nrrd"}, "file_ending"),
    "ending unknown": ({"file_ending": ".png"}, "file_ending"),
    "ending without dot": ({"file_ending": "nii.gz"}, "file_ending"),
    "ending list": ({"file_ending": [".nii.gz"]}, "file_ending"),
    "reader that turns": ({"overwrite_image_reader_writer": "NibabelIOWithReorient"}, "overwrite_image_reader_writer"),
    "reader unknown": ({"overwrite_image_reader_writer": {}}, "overwrite_image_reader_writer"),
    "classes null": ({"classification_labels": []}, "classification_labels"),
    "classes text": ({"classification_labels": "healthy"}, "classification_labels"),
    "class gap": ({"classification_labels": {"healthy": 0, "tumour": 2}}, "classification_labels"),
    "class id twice": ({"classification_labels": {"healthy": 1, "tumour": 1}}, "classification_labels"),
    "class name twice": ({"classification_labels": ["healthy", "healthy"]}, "classification_labels"),
    "class id fraction": ({"classification_labels": {"healthy": 0, "tumour": 1.5}}, "classification_labels"),
    "one class listed": ({"classification_labels": ["healthy"]}, "classification_labels"),
    "classes without CSV": ({"classification_labels": ["healthy", "tumour"]}, "cls_data.csv"),
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_dataset_json_faults(folder: Path, fault: str) -> None:
    changes, field = JSON_FAULTS[fault]
    edit(folder, **changes)
    assert complaint(lambda: load(folder)).field == field


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"labels": {"a": 1, "a": 2}}',
        b'{"numTraining": 1, "numTraining": 2}', b"{'labels': 1}",
    ],
)  # fmt: skip
def test_dataset_json_that_cannot_be_read(folder: Path, content: bytes) -> None:
    (folder / "dataset.json").write_bytes(content)
    assert complaint(lambda: load(folder))
    (folder / "dataset.json").unlink()
    assert complaint(lambda: load(folder)).field == "dataset.json"


IMAGES = ["imagesTr/case_1_0000.nii.gz", "imagesTr/case_1_0001.nii.gz"]


@pytest.mark.parametrize(
    "entries",
    [
        [],
        {"case_1": ["a"]},
        {"case_1": {"label": "labelsTr/case_1.nii.gz"}},
        {"case_1": {"images": IMAGES[:1], "label": "labelsTr/case_1.nii.gz"}},
        {"case_1": {"images": IMAGES}},
        {"case_1": {"images": ["imagesTr/missing_0000.nii.gz", IMAGES[1]], "label": "labelsTr/case_1.nii.gz"}},
        {"case_1": {"images": [IMAGES[0], "imagesTr/case_1_0001.nrrd"], "label": "labelsTr/case_1.nii.gz"}},
        {"case_1": {"images": [IMAGES[0], 3], "label": "labelsTr/case_1.nii.gz"}},
        {"../case_1": {"images": IMAGES, "label": "labelsTr/case_1.nii.gz"}},
        {"": {"images": IMAGES, "label": "labelsTr/case_1.nii.gz"}},
        {"a" * 300: {"images": IMAGES, "label": "labelsTr/case_1.nii.gz"}},
        *(
            {"case_1": {"images": IMAGES, "label": label}}
            for label in (
                "/etc/case_1.nii.gz", "../case_1.nii.gz", "labelsTr/../../x.nii.gz", "$HOME/x.nii.gz",
                "${HOME}/x.nii.gz", "~/x.nii.gz", "C:\\x.nii.gz", "..\\x.nii.gz", "%HOME%/x.nii.gz",
                "\\\\host\\x.nii.gz", "a\0.nii.gz", "",
            )
        ),
    ],
)  # fmt: skip
def test_file_list_faults(folder: Path, entries: Any) -> None:
    edit(folder, dataset=entries, numTraining=1)
    assert complaint(lambda: load(folder))


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new) and None


STRUCTURE_FAULTS: dict[str, tuple[Callable[[Path], None], str | None, str | None]] = {
    "channel missing": (remove("imagesTr/case_2_0001.nii.gz"), "case_2", "images"),
    "test channel missing": (remove("imagesTs/case_9_0000.nii.gz"), "case_9", "images"),
    "label missing": (remove("labelsTr/case_2.nii.gz"), "case_2", "labelsTr"),
    "labels missing": (lambda folder: shutil.rmtree(folder / "labelsTr"), None, "labelsTr"),
    "images missing": (lambda folder: shutil.rmtree(folder / "imagesTr"), None, "imagesTr"),
    "label without image": (rename("labelsTs/case_9.nii.gz", "labelsTr/case_9.nii.gz"), "case_9", "imagesTr"),
    "no channel number": (rename("imagesTr/case_1_0000.nii.gz", "imagesTr/case_1.nii.gz"), None, "images"),
    "test ending": (rename("imagesTs/case_9_0000.nii.gz", "imagesTs/case_9_0000.mha"), None, "file_ending"),
    "bad identifier": (rename("imagesTr/case_1_0000.nii.gz", "imagesTr/a$b_0000.nii.gz"), None, "identifier"),
}


@pytest.mark.parametrize("fault", STRUCTURE_FAULTS)
def test_structure_faults(folder: Path, fault: str) -> None:
    change, case, field = STRUCTURE_FAULTS[fault]
    change(folder)
    error = complaint(lambda: load(folder))
    assert (error.case, error.field) == (case, field)


def test_case_in_train_and_test(folder: Path) -> None:
    for channel in range(2):
        shutil.copy(folder / f"imagesTr/case_1_000{channel}.nii.gz", folder / "imagesTs")
    assert complaint(lambda: load(folder)).case == "case_1"


def test_same_image_under_another_name(folder: Path) -> None:
    for channel in range(2):
        shutil.copy(folder / f"imagesTr/case_1_000{channel}.nii.gz", folder / f"imagesTr/case_2_000{channel}.nii.gz")
    assert "same as that of case 'case_1'" in check_images(load(folder))[0]
    for channel in range(2):
        shutil.copy(folder / f"imagesTr/case_1_000{channel}.nii.gz", folder / f"imagesTs/case_9_000{channel}.nii.gz")
    error = complaint(lambda: check_images(load(folder), client="site_a"))
    assert error.case == "case_9"
    assert "'case_1'" in error.message


def test_empty_dataset(folder: Path) -> None:
    for path in [*(folder / "imagesTr").iterdir(), *(folder / "labelsTr").iterdir()]:
        path.unlink()
    edit(folder, numTraining=0)
    assert complaint(lambda: load(folder)).field == "imagesTr"
