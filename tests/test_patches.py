"""Patches from nnU-Net's files: equal to nnU-Net's, the same from any place on, and one line for what is broken."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from augmentation import of_nnunet
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from phantoms import federation, write_slices

from fedcmt.config import DataConfig, load_config
from fedcmt.data import backend
from fedcmt.data.intensity import standard_noise
from fedcmt.data.nnunet_rules import NnunetRules
from fedcmt.data.patches import Patches
from fedcmt.data.sampling import Draws, draw_patch
from fedcmt.data.source import CaseReader
from fedcmt.data.torch_pipeline import Batch, PatchSource
from fedcmt.errors import InputError
from fedcmt.federation import prepare_clients
from fedcmt.plans import ClientPlan
from fedcmt.seeding import sample_generator

CPU, SEED = torch.device("cpu"), 4


@pytest.fixture(scope="module")
def plans(
    raw_datasets: Path, preprocessed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, ClientPlan]]:
    raw = tmp_path_factory.mktemp("raw")
    for folder in raw_datasets.iterdir():
        (raw / folder.name).symlink_to(folder)
    write_slices(raw, "Dataset805_Slices", modality="MR", train=3)
    settings = federation(raw, preprocessed, tmp_path_factory.mktemp("none"))
    settings["clients"] += [{"name": "mr_slices", "dataset": 805, "modality": "MR", "patch_size": [1, 16, 16]}]
    settings["topology"] = {**settings["topology"], "strides": [[1, 1, 1], [1, 2, 2], [1, 2, 2]]}
    return prepare_clients(load_config(settings))


def source_of(plan: ClientPlan, *, augment: bool = True, masked: tuple[int, ...] = ()) -> PatchSource:
    rules = NnunetRules(plan, deep_supervision=plan.task == "segmentation")
    targets = replace(rules.targets(), masked_channels=masked)
    return PatchSource("site", plan.folder, plan.train, rules.patches(0.33, augment=augment), targets)


def patches_of(source: PatchSource, **settings: object) -> Patches:
    return Patches(source, DataConfig.model_validate(settings), seed=SEED, purpose="training", device=CPU)


def batches_of(
    source: PatchSource, count: int, first: int = 0, round_index: int = 1, **settings: object
) -> list[Batch]:
    with patches_of(source, **settings).batches(round_index, count, first=first) as batches:
        return list(batches)


def same(a: Batch, b: Batch) -> bool:
    def listed(batch: Batch) -> list[torch.Tensor]:
        return [batch.data, *(batch.target if isinstance(batch.target, list) else [batch.target])]

    return a.cases == b.cases and all(torch.equal(x, y) for x, y in zip(listed(a), listed(b), strict=True))


def by_nnunet(plan: ClientPlan, source: PatchSource, draws: Draws) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A sample from nnU-Net's dataset and transforms, with our draws."""
    rules, trainer = source.rules, NnunetRules(plan, deep_supervision=source.targets.several)
    image, labels, _, _ = nnUNetDatasetBlosc2(str(plan.folder), list(plan.train)).load_case(draws.case)
    box = [[low, low + n] for low, n in zip(draws.corner, rules.initial_size, strict=True)]
    x, y = crop_and_pad_nd(image, box, 0), crop_and_pad_nd(labels, box, -1)[0].astype(np.int16)
    noise = standard_noise(rules.channels, rules.patch_size, draws.noise_seed)
    data = dict(zip(("image", "segmentation"), of_nnunet(x, y, draws, rules, noise), strict=True))
    data["segmentation"] = data["segmentation"][None].clone()
    data = MaskImageTransform(list(source.targets.masked_channels))(**data)
    if rules.slices:
        data = {name: part[:, 0] for name, part in data.items()}
    data = RemoveLabelTansform(-1, 0)(**data)
    manager = trainer.label_manager
    if manager.has_regions:
        ignored = [manager.ignore_label] if manager.has_ignore_label else []
        data = ConvertSegmentationToRegionsTransform(list(manager.foreground_regions) + ignored)(**data)
    scales = trainer._get_deep_supervision_scales()
    if scales is None:
        return data["image"], [data["segmentation"]]
    return data["image"], DownsampleSegForDSTransform(scales)(**data)["segmentation"]


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("client", ["ct_plain", "ct_regions", "mr_two", "mr_class", "mr_slices"])
def test_batches_hold_what_nnunet_would_make_of_the_draws(
    plans: dict[str, ClientPlan], client: str, augment: bool
) -> None:
    """Reading, padding, augmentation, masks, regions and deep supervision together, on ten batches."""
    plan = plans[client]
    source = source_of(plan, augment=augment, masked=(0,) if client == "mr_two" else ())
    rules, reader = source.rules, CaseReader(plan.folder, source.rules.channels, "site")
    off, count = 0, 0
    for index, batch in enumerate(batches_of(source, 10)):
        targets = batch.target if source.targets.several else [batch.target]
        for place in range(rules.batch_size):
            sample = index * rules.batch_size + place
            rng = sample_generator(SEED, client="site", round_index=1, purpose="training patches", index=sample)
            draws = draw_patch(rng, sample, rules, plan.train, reader.case)
            image, expected = by_nnunet(plan, source, draws)
            assert batch.cases[place] == draws.case
            assert torch.allclose(batch.data[place], image, rtol=0, atol=1e-4 if augment else 0), draws
            for target, wanted in zip(targets, expected, strict=True):
                assert target.dtype == wanted.dtype
                assert target[place].shape == wanted.shape
                off += int((target[place] != wanted).sum())
                count += wanted.numel()
    assert off <= (2e-4 * count if augment else 0)


@pytest.mark.parametrize("client", ["mr_two", "mr_class"])
def test_any_start_threads_and_ahead_give_the_same(plans: dict[str, ClientPlan], client: str) -> None:
    source = source_of(plans[client])
    whole = batches_of(source, 8)
    torch.manual_seed(0)  # nothing of it is used
    assert all(map(same, batches_of(source, 8, threads=3, ahead=5), whole))
    assert all(map(same, batches_of(source, 3, first=5, threads=2, ahead=1), whole[5:]))
    assert not any(map(same, batches_of(source, 8, round_index=2), whole))
    assert not any(map(same, batches_of(replace(source, client="other"), 8), whole))


def test_global_generators_are_left_alone(plans: dict[str, ClientPlan]) -> None:
    torch.manual_seed(1)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    batches_of(source_of(plans["ct_plain"]), 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


def test_cases_stay_open_between_rounds(plans: dict[str, ClientPlan], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    really = blosc2.open
    monkeypatch.setattr(blosc2, "open", lambda **settings: opened.append(settings) or really(**settings))
    source = source_of(plans["ct_plain"])
    patches = patches_of(source)
    for round_index in (1, 2, 3):
        with patches.batches(round_index, 6) as batches:
            list(batches)
    assert len(opened) == 2 * len(source.cases)


def test_waiting_and_working_are_told_apart(plans: dict[str, ClientPlan]) -> None:
    with patches_of(source_of(plans["ct_plain"])).batches(1, 5) as batches:
        list(batches)
        assert batches.seconds_worked > 0
        assert batches.seconds_waited > 0
        before = batches.seconds_waited
    assert batches.seconds_waited == before


@pytest.fixture
def broken(plans: dict[str, ClientPlan], tmp_path: Path) -> PatchSource:
    """A copy of a client's cases to damage."""
    source = source_of(plans["ct_plain"])
    shutil.copytree(source.folder, tmp_path / "cases")
    return replace(source, folder=tmp_path / "cases", cases=("case_00",))


def rewrite(path: Path, change: object) -> None:
    array = blosc2.open(str(path), mode="r")[:]
    path.unlink()
    blosc2.asarray(change(array), urlpath=str(path))


def poison(array: np.ndarray) -> np.ndarray:
    array[:, ::2] = np.nan
    return array


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def scramble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[200 : len(content) - 300] = bytes(len(content) - 500)
    path.write_bytes(content)


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (".b2nd", Path.unlink, "case_00.b2nd is missing"),
        ("_seg.b2nd", Path.unlink, "case_00_seg.b2nd is missing"),
        (".pkl", Path.unlink, "case_00.pkl is missing"),
        (".b2nd", truncate, "damaged"),
        ("_seg.b2nd", truncate, "damaged"),
        (".b2nd", scramble, "damaged"),
        (".pkl", truncate, "damaged"),
        (".pkl", lambda path: path.write_bytes(pickle.dumps(Evil())), "builtins.print does not belong there"),
        (".pkl", lambda path: path.write_bytes(pickle.dumps([])), "damaged"),
        (".b2nd", partial(rewrite, change=poison), "holds NaN or Inf"),
        (".b2nd", partial(rewrite, change=lambda a: np.concatenate([a, a])), "2 channels, expected 1"),
        ("_seg.b2nd", partial(rewrite, change=lambda a: a[:, :5]), r"labels of \(5, "),
    ],
)
def test_a_fault_names_client_and_case(
    broken: PatchSource, file: str, damage: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(broken.folder / f"case_00{file}")
    with pytest.raises(InputError, match=f"client 'site', case 'case_00'.*{message}.*preprocess again"):
        batches_of(broken, 2)
    assert "executed" not in capsys.readouterr().out


def test_a_case_that_changes_while_it_is_open_is_a_fault(broken: PatchSource) -> None:
    """Mapped files: to read beyond the end of one would kill the process."""
    patches = patches_of(broken)
    with patches.batches(1, 2) as batches:
        list(batches)
    path = broken.folder / "case_00.b2nd"
    with open(path, "r+b") as file:
        file.truncate(100)
    with (
        pytest.raises(InputError, match=r"client 'site', case 'case_00'.*changed since"),
        patches.batches(2, 2) as batches,
    ):
        list(batches)
    path.unlink()
    with (
        pytest.raises(InputError, match=r"case 'case_00'.*case_00.b2nd is missing"),
        patches.batches(3, 2) as batches,
    ):
        list(batches)


def test_backend_goes_by_device_and_dali_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(backend, "dali_missing", lambda: None)
    assert backend.resolve_backend("auto", CPU).name == "torch"
    assert backend.resolve_backend("auto", gpu).name == "dali"
    assert backend.resolve_backend("dali", CPU).name == "dali"
    assert backend.resolve_backend("torch", gpu).name == "torch"
    monkeypatch.setattr(backend, "dali_missing", lambda: "nvidia-dali is not installed")
    choice = backend.resolve_backend("auto", gpu)
    assert (choice.name, choice.reason) == ("torch", "nvidia-dali is not installed")
    with pytest.raises(InputError, match=r"field 'data.backend': nvidia-dali is not installed; install"):
        backend.resolve_backend("dali", CPU)
