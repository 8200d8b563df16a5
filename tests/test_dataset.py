"""Raw datasets: what a good one becomes, and one clear line for every fault of a bad one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from fedcmt.dataset import RawDataset, check_images, find_dataset, load_dataset
from fedcmt.errors import InputError

SHAPE = (12, 11, 10)
AFFINE = np.diag([-0.8, 0.8, 3.0, 1.0])
REGIONS = {"background": 0, "whole": [1, 2], "core": [2]}


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(data, affine).to_filename(path)


def scan(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-50, 900, SHAPE).astype(np.int16)


def label_map(highest: int = 2) -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    for value in range(1, highest + 1):
        labels[value * 2 : value * 2 + 2, 3:6, 3:6] = value
    return labels


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A raw folder with Dataset011_Organs (2 channels, 2 training cases, 1 test case)."""
    folder = tmp_path / "raw" / "Dataset011_Organs"
    for number, (split, identifier) in enumerate([("Tr", "case_1"), ("Tr", "case_2"), ("Ts", "case_9")]):
        for channel in range(2):
            save(folder / f"images{split}" / f"{identifier}_000{channel}.nii.gz", scan(10 * number + channel))
        save(folder / f"labels{split}" / f"{identifier}.nii.gz", label_map())
    document = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "liver": 1, "spleen": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(document))
    return folder.parent


@pytest.fixture
def folder(raw: Path) -> Path:
    return raw / "Dataset011_Organs"


def edit(folder: Path, **changes: Any) -> None:
    """Changes keys of dataset.json; ``None`` removes one."""
    document = json.loads((folder / "dataset.json").read_text()) | changes
    kept = {key: value for key, value in document.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(kept))


def make_classification(folder: Path, rows: str = "identifier,label\ncase_1,healthy\ncase_2,tumour\n") -> None:
    shutil.rmtree(folder / "labelsTr", ignore_errors=True)
    shutil.rmtree(folder / "labelsTs", ignore_errors=True)
    edit(folder, classification_labels={"healthy": 0, "tumour": 1})
    (folder / "cls_data.csv").write_text(rows)


def load(folder: Path) -> RawDataset:
    return load_dataset(folder.parent, 11, client="site_a")


def complaint(action: Callable[[], object]) -> InputError:
    with pytest.raises(InputError) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line
    assert "client 'site_a'" in line
    return caught.value


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
    complaint(lambda: load(folder))
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
    complaint(lambda: load(folder))


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new) and None


STRUCTURE_FAULTS: dict[str, tuple[Callable[[Path], None], str | None, str | None]] = {
    "channel missing": (remove("imagesTr/case_2_0001.nii.gz"), "case_2", "images"),
    "test channel missing": (remove("imagesTs/case_9_0000.nii.gz"), "case_9", "images"),
    "label missing": (remove("labelsTr/case_2.nii.gz"), "case_2", "labelsTr"),
    "labels missing": (lambda folder: shutil.rmtree(folder / "labelsTr"), "case_1", "labelsTr"),
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


# Classification


@pytest.mark.parametrize(
    "classes",
    [
        {"healthy": 0, "tumour": 1},
        {"0": "healthy", "1": "tumour"},
        ["healthy", "tumour"],
        {"tumour": 1, "healthy": 0},
    ],
)
@pytest.mark.parametrize(
    "rows",
    [
        "identifier,label\ncase_1,healthy\ncase_2,tumour\ncase_9,tumour\n",
        "identifier,label,split\ncase_1,0,train\ncase_2,1,train\ncase_9,tumour,test\n",
        "\ufeffidentifier,label,split,age\r\n\r\ncase_9 , 1,test,3\r\ncase_2,1,,4\r\ncase_1,healthy,train,5",
    ],
)
def test_classes(folder: Path, classes: Any, rows: str) -> None:
    make_classification(folder)
    edit(folder, classification_labels=classes)
    (folder / "cls_data.csv").write_text(rows, encoding="utf-8")
    dataset = load(folder)
    assert dataset.class_names == ("healthy", "tumour")
    assert dataset.case_class == {"case_1": 0, "case_2": 1, "case_9": 1}
    assert dataset.train["case_1"].label is None
    assert check_images(dataset) == []


def test_classification_needs_no_segmentation_labels(folder: Path) -> None:
    make_classification(folder)
    edit(folder, labels=None)
    dataset = load(folder)
    assert dataset.labels == {"background": 0}
    assert dataset.case_class == {"case_1": 0, "case_2": 1}


@pytest.mark.parametrize(
    ("labels", "names", "case_class"),
    [(("0", "1"), ("0", "1"), [0, 1]), (("1", "0"), ("0", "1"), [1, 0]), (("sick", "fit"), ("fit", "sick"), [1, 0])],
)
def test_classes_from_the_csv_alone(
    folder: Path, labels: tuple[str, str], names: tuple[str, ...], case_class: list[int]
) -> None:
    make_classification(folder, f"identifier,label\ncase_1,{labels[0]}\ncase_2,{labels[1]}\n")
    edit(folder, classification_labels=None)
    dataset = load(folder)
    assert dataset.class_names == names
    assert list(dataset.case_class.values()) == case_class


def test_older_form_takes_the_class_from_the_whole_map(folder: Path) -> None:
    edit(folder, is_classification_dataset=True)
    save(folder / "labelsTr" / "case_1.nii.gz", np.zeros(SHAPE, np.uint8))
    dataset = load(folder)
    assert dataset.class_names == ("background", "liver", "spleen")
    assert dataset.case_class == {"case_1": 0, "case_2": 2, "case_9": 2}
    save(folder / "labelsTr" / "case_1.nii.gz", np.full(SHAPE, 3, np.uint8))
    assert complaint(lambda: load(folder)).field == "labels"


CSV_FAULTS = {
    "no header": ("case_1,healthy\ncase_2,tumour\n", None, "cls_data.csv"),
    "semicolons": ("identifier;label\ncase_1;healthy\ncase_2;tumour\n", None, "cls_data.csv"),
    "empty": ("", None, "cls_data.csv"),
    "no rows": ("identifier,label\n", None, "cls_data.csv"),
    "column twice": ("identifier,label,label\ncase_1,healthy,healthy\n", None, "cls_data.csv"),
    "short row": ("identifier,label\ncase_1\ncase_2,tumour\n", None, "cls_data.csv"),
    "long row": ("identifier,label\ncase_1,healthy,x\ncase_2,tumour\n", None, "cls_data.csv"),
    "no identifier": ("identifier,label\n,healthy\ncase_2,tumour\n", None, "cls_data.csv"),
    "open quote": ('identifier,label\n"case_1,healthy\ncase_2,tumour\n', None, "cls_data.csv"),
    "unknown case": ("identifier,label\ncase_1,healthy\ncase_2,tumour\ncase_3,tumour\n", "case_3", "identifier"),
    "unknown label": ("identifier,label\ncase_1,healty\ncase_2,tumour\n", "case_1", "label"),
    "empty label": ("identifier,label\ncase_1,\ncase_2,tumour\n", "case_1", "label"),
    "id too high": ("identifier,label\ncase_1,2\ncase_2,tumour\n", "case_1", "label"),
    "id fraction": ("identifier,label\ncase_1,1.0\ncase_2,tumour\n", "case_1", "label"),
    "id negative": ("identifier,label\ncase_1,-1\ncase_2,tumour\n", "case_1", "label"),
    "one class": ("identifier,label\ncase_1,tumour\ncase_2,tumour\ncase_9,healthy\n", None, "label"),
    "duplicate row": ("identifier,label\ncase_1,healthy\ncase_1,healthy\ncase_2,tumour\n", "case_1", "cls_data.csv"),
    "train row missing": ("identifier,label\ncase_1,healthy\ncase_9,tumour\n", "case_2", "label"),
    "wrong split": ("identifier,label,split\ncase_1,healthy,test\ncase_2,tumour,train\n", "case_1", "identifier"),
    "unknown split": ("identifier,label,split\ncase_1,healthy,val\ncase_2,tumour,train\n", "case_1", "split"),
}


@pytest.mark.parametrize("fault", CSV_FAULTS)
def test_csv_faults(folder: Path, fault: str) -> None:
    rows, case, field = CSV_FAULTS[fault]
    make_classification(folder, rows)
    error = complaint(lambda: load(folder))
    assert (error.case, error.field) == (case, field)


def test_csv_that_is_no_text(folder: Path) -> None:
    make_classification(folder)
    for content in (b"\xff\xfe\x00\x01", b"identifier,label\ncase\x00_1,healthy\n"):
        (folder / "cls_data.csv").write_bytes(content)
        complaint(lambda: load(folder))


# Images


def put(name: str, data: np.ndarray, affine: np.ndarray = AFFINE) -> Callable[[Path], None]:
    return lambda folder: save(folder / name, data, affine)


def with_value(value: float) -> np.ndarray:
    data = label_map().astype(np.float32)
    data[5, 5, 5] = value
    return data


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


SHIFTED = AFFINE + np.array([[0, 0, 0, 5.0]] + [[0] * 4] * 3)
IMAGE, LABEL, TEST_LABEL = "imagesTr/case_1_0000.nii.gz", "labelsTr/case_1.nii.gz", "labelsTs/case_9.nii.gz"
IMAGE_FAULTS: dict[str, tuple[Callable[[Path], None], str, str | None]] = {
    "truncated": (cut(IMAGE), "case_1", None),
    "empty file": (lambda folder: (folder / IMAGE).write_bytes(b"") and None, "case_1", None),
    "NaN": (put(IMAGE, with_value(np.nan)), "case_1", "voxels"),
    "Inf": (put(IMAGE, with_value(np.inf)), "case_1", "voxels"),
    "4D": (put(IMAGE, np.zeros((*SHAPE, 2), np.int16)), "case_1", "dim"),
    "channel shapes": (put(IMAGE, scan(5)[1:]), "case_1", "shape"),
    "channel spacing": (put(IMAGE, scan(5), np.diag([-0.8, 0.8, 2.0, 1.0])), "case_1", "spacing"),
    "label shape": (put(LABEL, label_map()[:, 1:]), "case_1", "shape"),
    "label spacing": (put(LABEL, label_map(), np.diag([-0.8, 0.9, 3.0, 1.0])), "case_1", "spacing"),
    "label flipped": (put(LABEL, label_map(), np.diag([0.8, 0.8, 3.0, 1.0])), "case_1", "direction"),
    "label shifted": (put(LABEL, label_map(), SHIFTED), "case_1", "origin"),
    "label fraction": (put(LABEL, with_value(1.5)), "case_1", "labels"),
    "label unknown": (put(LABEL, with_value(3)), "case_1", "labels"),
    "label negative": (put(LABEL, with_value(-1)), "case_1", "labels"),
    "label NaN": (put(LABEL, with_value(np.nan)), "case_1", "voxels"),
    "label huge": (put(LABEL, with_value(1e30)), "case_1", "labels"),
    "test label unknown": (put(TEST_LABEL, with_value(7)), "case_9", "labels"),
    "test label truncated": (cut(TEST_LABEL), "case_9", None),
}


@pytest.mark.parametrize("fault", IMAGE_FAULTS)
def test_image_faults(folder: Path, fault: str) -> None:
    change, case, field = IMAGE_FAULTS[fault]
    change(folder)
    error = complaint(lambda: check_images(load(folder), client="site_a"))
    assert (error.case, error.field) == (case, field)


def test_warnings(folder: Path) -> None:
    save(folder / IMAGE, np.full(SHAPE, 7, np.int16))
    save(folder / LABEL, np.zeros(SHAPE, np.uint8))
    for name in ("imagesTs/case_9_0000.nii.gz", "imagesTs/case_9_0001.nii.gz", TEST_LABEL):
        save(folder / name, scan(3)[:, :, :4] % 2)
    warnings = check_images(load(folder), client="site_a")
    assert [line.split(": ")[0] for line in warnings] == ["client 'site_a', case 'case_1'"] * 2 + [
        "client 'site_a', case 'case_9'"
    ]
    assert "constant" in warnings[0]
    assert "background" in warnings[1]
    assert "voxels" in warnings[2]


def test_only_ignore_counts_as_all_background(folder: Path) -> None:
    edit(folder, labels={"background": 0, "liver": 1, "spleen": 2, "ignore": 3})
    save(folder / LABEL, np.full(SHAPE, 3, np.uint8))
    assert "background" in check_images(load(folder))[0]
