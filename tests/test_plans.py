"""nnU-Net's plan with the federation's topology: what is shared, what stays the client's, and the splits."""

from __future__ import annotations

import json
from pathlib import Path

import blosc2
import nibabel
import numpy as np
import pytest
from phantoms import write_dataset

from fedcmt.config import ClientConfig, TopologyConfig
from fedcmt.dataset import load_dataset
from fedcmt.errors import InputError
from fedcmt.plans import ClientPlan, TopologyContract, contract_digest, make_splits, prepare_client
from fedcmt.preprocessing import body_mask

CONTRACT = TopologyContract.of(TopologyConfig(features=[4, 8, 16], adaptor_width=4))


def prepare(raw: Path, preprocessed: Path, dataset: int, **settings: object) -> ClientPlan:
    client = ClientConfig.model_validate({"name": "site", "dataset": dataset, "modality": "CT", **settings})
    return prepare_client(client, load_dataset(raw, dataset), CONTRACT, preprocessed)


def test_contract_goes_into_the_plan_and_the_rest_stays_nnunets(raw_datasets: Path, preprocessed: Path) -> None:
    plan = prepare(raw_datasets, preprocessed, 801)
    stock = json.loads((preprocessed / "Dataset801_Plain" / "fedcmt_planned.json").read_text())
    ours, theirs = (p["configurations"]["3d_fullres"] for p in (plan.plans, stock))
    assert contract_digest(ours["architecture"]) == CONTRACT.digest()
    for key in ("spacing", "normalization_schemes", "resampling_fn_data", "use_mask_for_norm"):
        assert ours[key] == theirs[key]
    assert np.all(np.asarray(ours["patch_size"]) % CONTRACT.divisor == 0)


def test_preprocessed_cases_equal_nnunets_own(
    raw_datasets: Path, preprocessed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess_dataset,
    )

    plan = prepare(raw_datasets, preprocessed, 801)
    monkeypatch.setenv("nnUNet_raw", str(raw_datasets))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    extract_fingerprints([801], num_processes=1, verbose=False, show_progress_bar=False)
    plan_experiments([801])
    preprocess_dataset(801, configurations=("3d_fullres",), num_processes=(1,), show_progress_bar=False)
    for case in plan.dataset.train:
        for suffix in ("", "_seg"):
            ours = blosc2.open(str(plan.folder / f"{case}{suffix}.b2nd"), mode="r")[:]
            stock = tmp_path / "Dataset801_Plain" / "nnUNetPlans_3d_fullres" / f"{case}{suffix}.b2nd"
            assert np.array_equal(ours, blosc2.open(str(stock), mode="r")[:])


def test_preprocessing_is_done_once_and_again_when_a_file_changes(tmp_path: Path) -> None:
    raw, preprocessed = tmp_path / "raw", tmp_path / "preprocessed"
    folder = write_dataset(raw, "Dataset820_Changing", modality="CT", shape=(20, 18, 16))
    first = prepare(raw, preprocessed, 820)
    stamps = {path.name: path.stat().st_mtime_ns for path in first.folder.glob("*.b2nd")}
    prepare(raw, preprocessed, 820)
    assert {path.name: path.stat().st_mtime_ns for path in first.folder.glob("*.b2nd")} == stamps
    image = folder / "imagesTr" / "case_00_0000.nii.gz"
    image.write_bytes((folder / "imagesTr" / "case_01_0000.nii.gz").read_bytes())
    prepare(raw, preprocessed, 820)
    assert {path.name: path.stat().st_mtime_ns for path in first.folder.glob("*.b2nd")} != stamps


def test_new_test_cases_are_checked_without_preprocessing_again(tmp_path: Path) -> None:
    raw, preprocessed = tmp_path / "raw", tmp_path / "preprocessed"
    folder = write_dataset(raw, "Dataset821_NewTest", modality="CT", shape=(20, 18, 16))
    first = prepare(raw, preprocessed, 821)
    stamps = {path.name: path.stat().st_mtime_ns for path in first.folder.glob("*.b2nd")}
    broken = folder / "imagesTs" / "case_77_0000.nii.gz"
    broken.write_bytes((folder / "imagesTs" / "case_02_0000.nii.gz").read_bytes()[:400])
    with pytest.raises(InputError, match="case 'case_77'"):
        prepare(raw, preprocessed, 821)
    broken.unlink()
    prepare(raw, preprocessed, 821)
    assert {path.name: path.stat().st_mtime_ns for path in first.folder.glob("*.b2nd")} == stamps


def test_spacing_is_the_clients_and_lives_in_its_own_folder(raw_datasets: Path, preprocessed: Path) -> None:
    plan = prepare(raw_datasets, preprocessed, 801, spacing=[4, 4, 4], patch_size=[8, 8, 16])
    assert plan.folder.name == "fedcmt_4x4x4"
    assert [round(s) for s in plan.configuration.spacing] == [4, 4, 4]
    assert plan.configuration.patch_size == [8, 8, 16]


def test_classification_sees_whole_cases(raw_datasets: Path, preprocessed: Path) -> None:
    plan = prepare(raw_datasets, preprocessed, 804, modality="MR")
    shapes = [blosc2.open(str(plan.folder / f"{case}.b2nd"), mode="r").shape[1:] for case in plan.dataset.train]
    assert np.all(np.asarray(plan.configuration.patch_size) >= np.max(shapes, axis=0))
    assert plan.num_heads == 2
    with pytest.raises(InputError, match="whole cases"):
        prepare(raw_datasets, preprocessed, 804, modality="MR", patch_size=[16, 16, 16])


def test_heads_count_regions_and_leave_out_ignore(raw_datasets: Path, preprocessed: Path) -> None:
    assert prepare(raw_datasets, preprocessed, 802).num_heads == 2  # whole, lesion
    assert prepare(raw_datasets, preprocessed, 803, modality="MR").num_heads == 3  # background, organ, lesion


@pytest.mark.parametrize(("train", "folds", "validation"), [(1, 1, 1), (3, 3, 1), (5, 5, 1), (11, 5, 3)])
def test_splits_are_by_case(tmp_path: Path, train: int, folds: int, validation: int) -> None:
    write_dataset(tmp_path, "Dataset830_Split", modality="CT", train=train, test=0, shape=(4, 4, 4))
    dataset = load_dataset(tmp_path, 830)
    splits = make_splits(dataset, "segmentation")
    assert len(splits) == folds
    assert max(len(split["val"]) for split in splits) == validation
    assert sorted({case for split in splits for case in split["val"]}) == sorted(dataset.train)
    if train > 1:
        assert not any(set(split["train"]) & set(split["val"]) for split in splits)


def test_classification_splits_are_stratified(tmp_path: Path) -> None:
    write_dataset(tmp_path, "Dataset831_Strata", modality="MR", train=8, test=0, shape=(4, 4, 4), classification=True)
    dataset = load_dataset(tmp_path, 831)
    for split in make_splits(dataset, "classification"):
        assert {dataset.case_class[case] for case in split["val"]} == {0, 1}
        assert not set(split["train"]) & set(split["val"])


def test_a_users_splits_are_kept_and_checked(tmp_path: Path) -> None:
    raw, preprocessed = tmp_path / "raw", tmp_path / "preprocessed"
    write_dataset(raw, "Dataset832_Own", modality="CT", train=3, test=0, shape=(20, 18, 16))
    plan = prepare(raw, preprocessed, 832)
    path = plan.folder.parent / "splits_final.json"
    path.write_text(json.dumps([{"train": ["case_02"], "val": ["case_00", "case_01"]}]))
    assert prepare(raw, preprocessed, 832).validation == ("case_00", "case_01")
    path.write_text(json.dumps([{"train": ["case_02"], "val": ["case_77"]}]))
    with pytest.raises(InputError, match="unknown case 'case_77'"):
        prepare(raw, preprocessed, 832)


def test_a_dataset_without_foreground_is_one_line(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "raw", "Dataset840_Empty", modality="CT", shape=(12, 12, 12))
    for path in (folder / "labelsTr").iterdir():
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), path)
    with pytest.raises(InputError, match="client 'site', field 'labelsTr': no training case"):
        prepare(tmp_path / "raw", tmp_path / "preprocessed", 840)


def test_body_mask_is_one_solid_part() -> None:
    image = np.zeros((12, 12, 12))
    image[2:9, 2:9, 2:9] = 100
    image[4:6, 4:6, 4:6] = 0  # air inside
    image[11, 11, 11] = 100  # a speck outside
    mask = body_mask(image)
    assert mask.sum() == 7**3
    assert body_mask(np.ones((4, 4, 4))).all()
