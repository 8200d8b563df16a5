"""Whatever bytes a header, a document, a table or a model file holds: success or one clear line, never a traceback."""

from __future__ import annotations

import copy
import gzip
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from dicom_series import hounsfield, write_series
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from organs_dataset import REGIONS, edit, load, make_classification

from fedcmt.dataset import check_images
from fedcmt.errors import InputError
from fedcmt.files import read_tensors, write_tensors
from fedcmt.model_checks import check_model
from fedcmt.volume import read_volume

QUICK = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FEW = settings(QUICK, max_examples=40)  # these read several files each time
NAMES = st.sampled_from(
    ["background", "liver", "spleen", "ignore", "0", "1", "2", "", "case_1", "images", "label", "a\n"]
)
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, 1, 2, 3, -1, 65535, 2**31, 10**400, 1e308, float("nan")])
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, NAMES, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=8,
)


@contextmanager
def only_input_errors() -> Iterator[None]:
    """Lets ``InputError`` pass as success, provided each of its lines is one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    except InputError as error:
        for single in error.each():
            assert "\n" not in str(single)
            assert str(single).isprintable()


def changed(content: bytes, changes: list[tuple[int, bytes]], length: int | None = None) -> bytes:
    """Overwrites bytes at the given places, and cuts the rest off."""
    result = bytearray(content)
    for place, new in changes:
        result[place : place + len(new)] = new
    return bytes(result[:length])


def edits(last: int) -> st.SearchStrategy[list[tuple[int, bytes]]]:
    chunks = st.one_of(
        st.binary(min_size=1, max_size=8),
        st.sampled_from(
            [
                b"\xff\xff",
                b"\x00\x00\x00\x00",
                b"\x00\x00\xc0\x7f",
                b"\x00\x00\x80\x7f",
                b"\xff\x7f",
                b"\xff\xff\xff\x7f",
            ]
        ),
    )
    return st.lists(st.tuples(st.integers(0, last), chunks), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def nifti() -> dict[str, bytes]:
    one, two = (
        kind(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.diag([-1.0, 2, 3, 1])).to_bytes()
        for kind in (nib.Nifti1Image, nib.Nifti2Image)
    )
    return {"one": one, "two": two}


@given(kind=st.sampled_from(["one", "two"]), changes=edits(360), length=st.one_of(st.none(), st.integers(0, 700)))
@QUICK
def test_nifti_headers(
    nifti: dict[str, bytes], tmp_path: Path, kind: str, changes: list[tuple[int, bytes]], length: int | None
) -> None:
    content = changed(nifti[kind], changes, length)
    for name, written in (("x.nii", content), ("x.nii.gz", gzip.compress(content, 1))):
        (tmp_path / name).write_bytes(written)
        with only_input_errors():
            volume = read_volume(tmp_path / name)
            assert volume.data.ndim == 4
            assert np.isfinite(volume.data).all()
            assert np.isfinite(volume.affine).all()
            assert min(volume.spacing) > 0


@given(changes=edits(120), length=st.one_of(st.none(), st.integers(0, 200)))
@QUICK
def test_damaged_gzip_streams(
    nifti: dict[str, bytes], tmp_path: Path, changes: list[tuple[int, bytes]], length: int | None
) -> None:
    (tmp_path / "x.nii.gz").write_bytes(changed(gzip.compress(nifti["one"]), changes, length))
    with only_input_errors():
        read_volume(tmp_path / "x.nii.gz")


NRRD = (
    "NRRD0005\ntype: short\ndimension: 3\nsizes: 2 2 2\nspace: left-posterior-superior\n"
    "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\nendian: little\nencoding: raw\n\n"
)
MHA = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\n"
    "ElementSpacing = 1 1 1\nDimSize = 2 2 2\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
)

WORDS = st.sampled_from("0 -1 1e400 nan inf none 99999999999 4 short float gzip raw (0,0,0) x.raw ../x".split())  # noqa: SIM905


@given(form=st.sampled_from(["x.nrrd", "x.mha"]), line=st.integers(0, 9), words=st.lists(WORDS, max_size=4))
@QUICK
def test_text_headers(tmp_path: Path, form: str, line: int, words: list[str]) -> None:
    lines = (NRRD if form == "x.nrrd" else MHA).split("\n")
    line %= len(lines)
    separator = ":" if form == "x.nrrd" else "="
    lines[line] = f"{lines[line].split(separator)[0]}{separator} {' '.join(words)}"
    (tmp_path / form).write_bytes("\n".join(lines).encode() + bytes(16))
    with only_input_errors():
        assert read_volume(tmp_path / form).data.ndim == 4


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("dicom")
    return {path.name: path.read_bytes() for path in write_series(folder, hounsfield((3, 4, 5)))}


@given(changes=edits(1100), length=st.one_of(st.none(), st.integers(0, 1200)), which=st.integers(0, 2))
@FEW
def test_dicom_slices(
    series: dict[str, bytes], tmp_path: Path, changes: list[tuple[int, bytes]], length: int | None, which: int
) -> None:
    for index, (name, content) in enumerate(series.items()):
        (tmp_path / name).write_bytes(changed(content, changes, length) if index == which else content)
    with only_input_errors():
        volume = read_volume(tmp_path)
        assert np.isfinite(volume.data).all()
        assert min(volume.spacing) > 0


def places(document: Any) -> list[list[Any]]:
    """Every path into a JSON document."""
    entries = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    found = []
    for key, value in entries:
        found += [[key], *([key, *path] for path in places(value))]
    return found


def mutate(document: Any, data: st.DataObject) -> Any:
    """Replaces, removes or adds a few parts of a JSON document."""
    document = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(document) or [[]]))
        if not path:
            return data.draw(JSON)
        node = document
        for key in path[:-1]:
            node = node[key]
        action = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "remove":
            del node[path[-1]]
        elif action == "add" and isinstance(node, dict):
            node[data.draw(NAMES)] = data.draw(JSON)
        else:
            node[path[-1]] = data.draw(JSON)
    return document


LISTED = {
    f"case_{n}": {
        "images": [f"imagesTr/case_{n}_0000.nii.gz", f"imagesTr/case_{n}_0001.nii.gz"],
        "label": f"labelsTr/case_{n}.nii.gz",
    }
    for n in (1, 2)
}
FORMS: list[dict[str, Any]] = [
    {},
    {"labels": REGIONS | {"ignore": 3}, "regions_class_order": [1, 2]},
    {"dataset": LISTED},
    {"is_classification_dataset": True},
]


@given(form=st.sampled_from(FORMS), data=st.data())
@FEW
def test_dataset_json(folder: Path, form: dict[str, Any], data: st.DataObject) -> None:
    path = folder / "dataset.json"
    original = folder / "original.json"
    if not original.exists():
        original.write_bytes(path.read_bytes())
    path.write_text(json.dumps(mutate(json.loads(original.read_text()) | form, data)))
    with only_input_errors():
        dataset = load(folder)
        assert len(dataset.channel_names) == 2
        assert 0 in dataset.label_values
        check_images(dataset)


@given(content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "ignore"))))
@QUICK
def test_dataset_json_of_any_bytes(folder: Path, content: bytes) -> None:
    (folder / "dataset.json").write_bytes(content)
    with pytest.raises(InputError):
        load(folder)


CELLS = st.one_of(
    st.sampled_from(["case_1", "case_2", "case_9", "healthy", "tumour", "0", "1", "train", "test", "", '"', "²"]),
    st.text(max_size=4),
)


@given(
    rows=st.lists(st.lists(CELLS, max_size=4), max_size=5),
    listed=st.booleans(),
    separator=st.sampled_from([",", ",", ";", "\t", ", "]),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
)
@QUICK
def test_class_tables(folder: Path, rows: list[list[str]], listed: bool, separator: str, newline: str) -> None:
    make_classification(folder)
    if not listed:
        edit(folder, classification_labels=None)
    table = [["identifier", "label", "split"][: len(rows[0]) if rows else 2], *rows]
    text = newline.join(separator.join(row) for row in table)
    (folder / "cls_data.csv").write_bytes(text.encode("utf-8", "ignore"))
    with only_input_errors():
        dataset = load(folder)
        assert set(dataset.train) <= set(dataset.case_class)


@given(changes=edits(400), length=st.one_of(st.none(), st.integers(0, 500)))
@QUICK
def test_weights(tmp_path: Path, changes: list[tuple[int, bytes]], length: int | None) -> None:
    good = tmp_path / "good.safetensors"
    if not good.exists():
        write_tensors(good, {"a": torch.ones(3, 4), "b": torch.zeros(5)}, {"round": 1})
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(changed(good.read_bytes(), changes, length))
    with only_input_errors():
        _, facts = read_tensors(bad)
        assert isinstance(facts, dict)


PLANS = {
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}, "1": {"mean": 1.0}},
    "configurations": {
        "3d_fullres": {
            "patch_size": [16, 16, 16],
            "spacing": [1.0, 1, 1],
            "normalization_schemes": ["ZScoreNormalization"] * 2,
            "use_mask_for_norm": [False, False],
            "preprocessor_name": "DefaultPreprocessor",
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "architecture": {"network_class_name": "fedcmt.network.FedCMTNet", "arch_kwargs": {"n_stages": 3}},
        }
    },
}
DESCRIPTION = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "a": 1, "b": 2},
    "numTraining": 2,
    "file_ending": ".nii.gz",
    "dataset": LISTED,
}
FACTS = {"task": "segmentation", "num_heads": 3, "mirror_axes": [0, 1, 2], "class_names": []}


def model_files(folder: Path) -> dict[str, Path]:
    """The paths that messages name; only dataset.json is read."""
    return dict.fromkeys(("dataset_json", "plans", "facts", "weights"), folder / "dataset.json")


@given(data=st.data(), which=st.sampled_from(["plans", "facts", "document"]))
@QUICK
def test_plans_and_facts_of_a_model(folder: Path, data: st.DataObject, which: str) -> None:
    plans, document, facts = (
        mutate(content, data) if name == which else content
        for name, content in (("plans", PLANS), ("document", DESCRIPTION), ("facts", FACTS))
    )
    files = {
        "dataset_json": folder / "dataset.json",
        "plans": folder / "p",
        "facts": folder / "f",
        "weights": folder / "w",
    }
    with only_input_errors():
        check_model(files, plans, document, facts, "3d_fullres", {})
        assert facts["num_heads"] <= 4096
        assert len(plans["configurations"]["3d_fullres"]["patch_size"]) == 3


def test_the_unchanged_files_pass(folder: Path) -> None:
    files = {
        "dataset_json": folder / "dataset.json",
        "plans": folder / "p",
        "facts": folder / "f",
        "weights": folder / "w",
    }
    check_model(files, PLANS, DESCRIPTION, FACTS, "3d_fullres", {"w": torch.ones(3)})
    with pytest.raises(InputError, match="NaN or Inf"):
        check_model(files, PLANS, DESCRIPTION, FACTS, "3d_fullres", {"w": torch.tensor([np.nan])})
