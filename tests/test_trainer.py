"""Local training: deterministic from the seed, continued exactly, and able to learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from phantoms import federation, write_dataset

from fedcmt.config import TrainingConfig, load_config
from fedcmt.errors import InputError, RunError
from fedcmt.federation import prepare_clients
from fedcmt.objective import Validation
from fedcmt.plans import ClientPlan
from fedcmt.seeding import derive_seed, seeded
from fedcmt.trainer import Trainer


@pytest.fixture(scope="module")
def plans(raw_datasets: Path, preprocessed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClientPlan]:
    return prepare_clients(load_config(federation(raw_datasets, preprocessed, tmp_path_factory.mktemp("none"))))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums depend on the number of threads, and so would how far a short training gets."""
    torch.set_num_threads(1)


def trainer(plan: ClientPlan, seed: int = 1, **settings: object) -> Trainer:
    training = TrainingConfig.model_validate({"learning_rate": 0.01, "validation_batches": 2, **settings})
    return Trainer(plan, training, client="site", seed=seed, rounds=20, device=torch.device("cpu"))


def quiet(step: int, loss: float) -> None:
    """Nobody watches."""


def test_decoders_of_all_clients_begin_alike(plans: dict[str, ClientPlan]) -> None:
    one, other = (
        Trainer(plans[name], TrainingConfig(), client=name, seed=1, rounds=2, device=torch.device("cpu")).network
        for name in ("ct_plain", "mr_two")
    )
    first, second = (dict(network.decoder.named_parameters()) for network in (one, other))
    alike = [name for name in first if first[name].shape == second[name].shape]
    assert len(alike) > len(first) / 2
    assert all(torch.equal(first[name], second[name]) for name in alike if "seg_layers" not in name)


@pytest.mark.parametrize("client", ["ct_plain", "ct_regions", "mr_two", "mr_class"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_restored_training_continues_bit_for_bit(
    plans: dict[str, ClientPlan], client: str, optimizer: str, tmp_path: Path
) -> None:
    running, other = (trainer(plans[client], optimizer=optimizer) for _ in range(2))
    running.fit(1, 2, quiet)
    other.restore({name: tensor.clone() for name, tensor in running.state().items()}, source=tmp_path)
    for each in (running, other):
        torch.randn(3)  # what happened before must not matter
        each.fit(2, 2, quiet)
    state = other.state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in running.state().items())


def test_seed_decides(plans: dict[str, ClientPlan]) -> None:
    flats = []
    for seed in (1, 1, 2):
        each = trainer(plans["ct_plain"], seed)
        each.fit(1, 2, quiet)
        flats.append(each.encoder.clone())
    assert torch.equal(flats[0], flats[1])
    assert not torch.equal(flats[0], flats[2])


@pytest.mark.parametrize(("client", "name"), [("ct_plain", "organ"), ("mr_class", "healthy"), ("mr_class", "tumour")])
def test_it_learns_phantoms(plans: dict[str, ClientPlan], client: str, name: str) -> None:
    plan = replace(plans[client], validation=plans[client].train)  # can it fit at all; two cases teach no more
    each = trainer(plan, learning_rate=0.003)
    before = each.validate()
    each.fit(1, 150, quiet)
    after = each.validate()
    assert after.loss < before.loss
    assert after.classes[name] >= 0.8, (before, after)


def test_regions_with_an_ignore_label_train_and_count_no_ignored_voxel(tmp_path: Path) -> None:
    write_dataset(tmp_path / "raw", "Dataset850_Partial", modality="CT", regions=True, ignore=True)
    for path in (tmp_path / "raw" / "Dataset850_Partial" / "labelsTr").iterdir():
        image = nibabel.load(path)
        labels = np.asarray(image.dataobj).copy()
        labels[: labels.shape[0] // 2] = 3
        nibabel.save(nibabel.Nifti1Image(labels, image.affine), path)
    settings = federation(tmp_path / "raw", tmp_path / "preprocessed", tmp_path / "none")
    settings["clients"] = [{"name": "part", "dataset": 850, "modality": "CT", "patch_size": [16, 16, 16]}]
    each = trainer(prepare_clients(load_config(settings))["part"])
    each.fit(1, 2, quiet)
    objective = each.objective
    target = torch.zeros(1, 3, 4, 4, 4, dtype=torch.bool)  # whole, lesion, ignored
    target[:, 0, :2] = True
    target[:, 2, 2:] = True
    everything = torch.full((1, 2, 4, 4, 4), 9.0)  # predicted everywhere
    assert objective._hard_counts(everything, target).tolist() == [[32, 0], [0, 32], [0, 0]]
    assert set(each.validate().classes) == {"whole", "lesion"}


def test_validation_is_the_same_every_time(plans: dict[str, ClientPlan]) -> None:
    each = trainer(plans["mr_two"])
    assert each.validate() == each.validate()


def test_learning_rate_follows_the_rounds(plans: dict[str, ClientPlan]) -> None:
    rates = [trainer(plans["ct_plain"]).fit(r, 1, quiet).learning_rate for r in (1, 11)]
    assert rates == pytest.approx([0.01, 0.01 * 0.5**0.9])
    constant = trainer(plans["ct_plain"], learning_rate_schedule="constant")
    assert constant.fit(11, 1, quiet).learning_rate == 0.01


def test_a_diverging_loss_names_client_and_cases(plans: dict[str, ClientPlan]) -> None:
    each = trainer(plans["ct_plain"])
    each.encoder.fill_(float("nan"))
    with pytest.raises(RunError, match=r"client 'site', round 3, step 1: loss nan.*case_"):
        each.fit(3, 1, quiet)


def test_state_of_another_network_is_refused(plans: dict[str, ClientPlan], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not fit the network"):
        trainer(plans["ct_plain"]).restore(trainer(plans["mr_two"]).state(), source=tmp_path)


def test_better_means_score_then_loss() -> None:
    base = Validation("dice", 0.5, 1.0, {})
    assert base.better_than(None)
    assert not base.better_than(base)
    assert Validation("dice", 0.5, 0.9, {}).better_than(base)
    assert not Validation("dice", 0.4, 0.1, {}).better_than(base)


def test_seeds_differ_in_every_part_and_generators_are_put_back() -> None:
    parts = [("a", 1, "x"), ("b", 1, "x"), ("a", 2, "x"), ("a", 1, "y")]
    seeds = {derive_seed(7, client=c, round_index=r, purpose=p) for c, r, p in parts}
    assert len(seeds) == 4
    torch.manual_seed(5)
    expected = torch.randn(2)
    torch.manual_seed(5)
    with seeded(1):
        torch.randn(10)
    assert torch.equal(torch.randn(2), expected)


def test_a_loss_that_is_no_number_ranks_last_and_survives_json() -> None:
    broken, sound = Validation("dice", 0.5, float("nan"), {}), Validation("dice", 0.5, 3.0, {})
    assert sound.better_than(broken)
    assert not broken.better_than(sound)
    assert broken.as_json()["loss"] is None
    assert not Validation.from_json(broken.as_json()).better_than(broken)
    assert Validation.from_json(sound.as_json()) == sound
