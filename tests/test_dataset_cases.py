"""Classes and images of raw datasets: what a good one becomes, and one clear line for every fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from organs_dataset import (
    AFFINE,
    SHAPE,
    complaint,
    edit,
    label_map,
    load,
    make_classification,
    save,
    scan,
)

from fedcmt.dataset import check_images

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
        assert complaint(lambda: load(folder))


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
    "truncated": (cut(IMAGE), "case_1", "images"),
    "empty file": (lambda folder: (folder / IMAGE).write_bytes(b"") and None, "case_1", "images"),
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
    "test label truncated": (cut(TEST_LABEL), "case_9", "labels"),
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


def test_images_of_few_voxels_are_one_line_and_slices_none(folder: Path) -> None:
    def rewrite(shape: tuple[int, int, int], *cases: str) -> list[str]:
        for path in [*folder.glob("images*/*"), *folder.glob("labels*/*")]:
            if path.name.startswith(cases):
                save(path, np.random.default_rng(len(path.name) + path.stat().st_size).integers(0, 3, shape, np.uint8))
        return [line for line in check_images(load(folder)) if "padded" in line]

    assert rewrite((12, 11, 10), "case") == []
    (line,) = rewrite((12, 11, 5), "case")
    assert "3 images have fewer than 8 voxels along an axis, 'case_1' is (5, 11, 12) (D, H, W)" in line
    (line,) = rewrite((12, 11, 10), "case_1", "case_9")
    assert "case 'case_2': the image is only (5, 11, 12) voxels" in line
    assert rewrite((12, 11, 1), "case") == []
    (line,) = rewrite((12, 11, 10), "case_1")
    assert "2 images have" in line
