"""The phantom benchmark: what is drawn and rendered, presets, datasets, and a short comparison from end to end."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

from fedcmt import strategies
from fedcmt.config import load_config
from fedcmt.dataset import check_images, load_dataset
from fedcmt.errors import InputError
from fedcmt.plans import check_client

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "phantoms"
sys.path.insert(0, str(BENCHMARK))  # its scripts import each other by name

import anatomy  # noqa: E402
import compare as phantom_compare  # noqa: E402
import ct  # noqa: E402
import make  # noqa: E402
import mr  # noqa: E402
import raw_datasets  # noqa: E402
import tasks  # noqa: E402
import vessels  # noqa: E402

PRESETS = ["ci", "small", "full", "lone"]
CT_ORGANS = raw_datasets.DatasetSettings(number=1, name="CTOrgan", modality="CT", task="organ", train=2, test=1)
MR_LESIONS = raw_datasets.DatasetSettings(
    number=2, name="MRLesion", modality="MR", channels=list(mr.CHANNELS), task="lesion", train=2, test=1
)
MR_CLASSES = raw_datasets.DatasetSettings(
    number=3, name="MRClass", modality="MR", channels=["T1"], task="class", train=2, test=2
)


def subject(seed: int, **settings: int) -> anatomy.Anatomy:
    return anatomy.make_anatomy(
        np.random.default_rng(seed), **{"lesions": 2, "cysts": 2, "decoys": 2, "steatosis": False, **settings}
    )


def test_subjects_have_everything_where_it_belongs() -> None:
    for seed in range(5):
        drawn = subject(seed)
        for tissue in (*anatomy.ORGANS, anatomy.Tissue.BONE, anatomy.Tissue.FAT, anatomy.Tissue.VESSEL):
            assert (drawn.tissue == tissue).sum() > 100, (seed, tissue)
        assert (drawn.lesion > 0.5).sum() > 50
        assert drawn.lesion.max() <= 1
        assert not drawn.lesion[drawn.organ == 0].any()  # nodes elsewhere count as no lesion
        assert not (drawn.lesion * drawn.cyst > 0.25).any()


def test_livers_with_steatosis_look_different_and_are_as_large() -> None:
    healthy, fatty = subject(3), subject(3, steatosis=True)
    np.testing.assert_array_equal(healthy.organ, fatty.organ)
    liver = (fatty.organ == anatomy.Tissue.LIVER) & (healthy.tissue == anatomy.Tissue.LIVER)
    assert (fatty.tissue[liver] == anatomy.Tissue.FATTY_LIVER).all()
    np.testing.assert_array_equal(healthy.tissue[~liver], fatty.tissue[~liver])


def test_tubes_are_as_wide_and_long_as_asked() -> None:
    axes = [np.arange(-10.13, 10, 0.3)] * 3
    points = np.stack(np.meshgrid(*axes, indexing="ij"))
    tube = vessels.Tube(np.array([-5.0, 0, 0]), np.array([5.0, 0, 0]), 2.0)
    inside = vessels.draw_tubes(points, [tube])
    capsule = np.pi * 2**2 * 10 + 4 / 3 * np.pi * 2**3
    assert inside.sum() * 0.3**3 == pytest.approx(capsule, rel=0.03)


def test_vessels_branch() -> None:
    tubes = vessels.grow_trees(np.random.default_rng(0))
    ends = [tuple(tube.end.round(6)) for tube in tubes]
    starts = [tuple(tube.start.round(6)) for tube in tubes]
    assert sum(starts.count(end) == 2 for end in set(ends)) >= 10


def test_back_projection_gives_a_disk_back() -> None:
    y, x = np.ogrid[: anatomy.SHAPE[1], : anatomy.SHAPE[2]]
    disk = np.zeros(anatomy.SHAPE)
    disk[:, (y - 11.5) ** 2 + (x - 15.5) ** 2 < 9**2] = 1
    found = ct._reconstruct(ct._project(disk))
    assert found[:, 8:16, 12:20] == pytest.approx(1, abs=0.06)
    assert abs(found[:, :, :3]).max() < 0.1


def test_ct_is_in_hounsfield_units_with_cupping_and_the_noise_asked_for() -> None:
    drawn = subject(1)
    quiet = ct.CTScanner(noise=1e-6, hardening=0.0, enhancement=1.0, blur=0.4)
    clean = quiet.scan(drawn, np.random.default_rng(0))[0]
    assert clean.shape == anatomy.SHAPE
    assert clean.min() >= -1024
    assert clean[0, 0, 0] == pytest.approx(-1000, abs=1)
    assert clean.max() > 250  # bone
    assert np.array_equal(clean, clean.round())
    spleen = anatomy.coarse(drawn.tissue == anatomy.Tissue.SPLEEN) == 1
    assert 60 < clean[spleen].mean() < 190
    hard = ct.CTScanner(noise=1e-6, hardening=1.0, enhancement=1.0, blur=0.4)
    error = hard.scan(drawn, np.random.default_rng(0))[0] - clean
    body = anatomy.coarse(drawn.tissue > anatomy.Tissue.AIR) == 1
    centre = np.zeros_like(body)
    centre[6:18, 8:14, 12:20] = True
    assert error[body & centre].mean() < error[body & ~centre & (clean < 200)].mean() < 5
    noisy = ct.CTScanner(noise=30.0, hardening=0.0, enhancement=1.0, blur=0.4)
    assert (noisy.scan(drawn, np.random.default_rng(0))[0] - clean).std() == pytest.approx(30, rel=0.15)


def test_mr_noise_is_rician_and_contrasts_are_those_of_the_sequences() -> None:
    drawn = subject(2)
    image = mr.MRScanner(mr.CHANNELS, 0.03, 0.0, (1.0, 1.0), 1.0, 0.4).scan(drawn, np.random.default_rng(0))
    assert image.shape == (4, *anatomy.SHAPE)
    assert image.min() >= 0
    air = anatomy.coarse(drawn.tissue == anatomy.Tissue.AIR) == 1
    away = air & (np.indices(air.shape)[2] < 3)  # the point spread of the body ends before
    assert image[:, away].mean() == pytest.approx(1000 * 0.03 * np.sqrt(np.pi / 2), rel=0.1)  # of a Rayleigh variable
    means = {
        tissue: image[:, anatomy.coarse(drawn.tissue == tissue) > 0.9].mean(1)
        for tissue in (anatomy.Tissue.FAT, anatomy.Tissue.FLUID, anatomy.Tissue.MUSCLE)
    }
    t1, t2, _, flair = range(4)
    assert means[anatomy.Tissue.FAT][t1] > means[anatomy.Tissue.MUSCLE][t1] > means[anatomy.Tissue.FLUID][t1]
    assert means[anatomy.Tissue.FLUID][t2] > means[anatomy.Tissue.MUSCLE][t2]
    assert means[anatomy.Tissue.FLUID][flair] < 0.4 * means[anatomy.Tissue.FLUID][t2]  # inverted away


def test_bias_fields_are_smooth_and_as_strong_as_asked() -> None:
    field = np.log(mr._bias_field(np.random.default_rng(0), 0.2))
    assert field.std() == pytest.approx(0.2)
    assert max(abs(np.diff(field, axis=axis)).max() for axis in range(3)) < 0.15


@pytest.mark.parametrize("task", ["organ", "lesion", "vessel"])
def test_labels(task: tasks.TaskName) -> None:
    labels = tasks.make_labels(subject(4), task)
    assert labels.shape == anatomy.SHAPE
    assert set(np.unique(labels)) == set(tasks.LABELS[task].values())
    assert (labels > 0).mean() > 0.001


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for place, seed in (("a", 5), ("b", 5), ("c", 6)):
        (tmp_path / place).mkdir()
        for settings in (CT_ORGANS, MR_LESIONS, MR_CLASSES):
            assert raw_datasets.write_dataset(settings, seed, tmp_path / place)
    first, again, other = (read_all(tmp_path / place) for place in "abc")
    assert first == again
    assert first.keys() == other.keys()
    assert not any(first[name] == other[name] for name in first if name.endswith(".nii.gz"))
    assert raw_datasets.write_dataset(CT_ORGANS, 5, tmp_path / "a") is None
    with pytest.raises(InputError, match="seed"):
        raw_datasets.write_dataset(CT_ORGANS, 6, tmp_path / "a")
    assert read_all(tmp_path / "a") == first


def test_datasets_are_what_nnunet_expects(tmp_path: Path) -> None:
    for settings in (CT_ORGANS, MR_LESIONS, MR_CLASSES):
        raw_datasets.write_dataset(settings, 1, tmp_path)
        dataset = load_dataset(tmp_path, settings.folder)
        assert check_images(dataset) == []
        assert (len(dataset.train), len(dataset.test)) == (settings.train, settings.test)
        assert list(dataset.channel_names) == (settings.channels or ["CT"])
    organs, lesions, classes = (load_dataset(tmp_path, number) for number in (1, 2, 3))
    assert organs.labels == {"background": 0, "liver": 1, "spleen": 2, "kidney": 3}
    assert lesions.labels == {"background": 0, "lesion": 1}
    assert classes.class_names == ("healthy", "steatosis")
    with open(classes.folder / "cls_data.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["0", "1", "0", "1"]
    assert [row["split"] for row in rows] == ["train", "train", "test", "test"]


def test_subjects_do_not_depend_on_the_number_of_cases() -> None:
    more = CT_ORGANS.model_copy(update={"train": 9})
    image, labels, _ = raw_datasets.make_case(CT_ORGANS, 7, 1)
    same_image, same_labels, _ = raw_datasets.make_case(more, 7, 1)
    np.testing.assert_array_equal(image.data, same_image.data)
    np.testing.assert_array_equal(labels, same_labels)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_load_and_fit_their_data(preset: str) -> None:
    config = load_config(raw_datasets.preset_file(preset))
    datasets = {settings.number: settings for settings in raw_datasets.preset_datasets(preset)}
    assert sorted(datasets) == sorted(client.dataset for client in config.clients)
    strategies.create(config.strategy).check([client.name for client in config.clients])
    for client in config.clients:
        settings = datasets[client.dataset]
        assert client.modality == settings.modality
        assert (client.channels or 1) == max(1, len(settings.channels))
        assert (client.task == "classification") == (settings.task == "class")
        assert client.spacing == [anatomy.SPACING] * 3
    assert "{seed}" in str(config.raw)
    assert "{seed}" in str(config.preprocessed)


def combinations(preset: str) -> list[tuple[str, str]]:
    return [(settings.task, settings.modality) for settings in raw_datasets.preset_datasets(preset)]


def test_presets_are_what_they_claim() -> None:
    assert len(combinations("small")) == 4
    assert all(combinations("small").count(pair) == 2 for pair in combinations("small"))
    full = combinations("full")
    assert [modality for _, modality in full].count("CT") == 4 == [modality for _, modality in full].count("MR")
    assert {task for task, _ in full} == {"organ", "lesion", "vessel", "class"}
    assert all(full.count(pair) == 2 for pair in full)
    kinds = [(settings.modality, len(settings.channels)) for settings in raw_datasets.preset_datasets("lone")]
    assert len(set(kinds)) == len(kinds) == 4


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="MR only"):
        raw_datasets.DatasetSettings(number=1, name="A", modality="CT", channels=["T1"], task="organ", train=1, test=0)
    with pytest.raises(InputError, match=r"no preset 'smal'.*ci, full, lone, small"):
        raw_datasets.preset_file("smal")


def test_make_says_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["make.py", "ci", "--seed", "4", "-o", str(tmp_path)])
    assert make.main() == 0
    assert "Dataset001_CTOrgan" in capsys.readouterr().out
    assert make.main() == 0
    assert "nothing to do" in capsys.readouterr().out
    for client in load_config(raw_datasets.preset_file("ci")).clients:
        check_client(client, load_dataset(tmp_path, client.dataset))
    assert make.raw_folder("ci", 4) == Path("data/phantoms/ci/seed-4/raw")


def test_a_comparison_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    less = ["rounds=1", "training.local_steps=1", "training.validation_batches=1", "topology.features=[4,8,16]"]
    arguments = ["compare.py", "ci", "--strategies", "local", "--seeds", "1", "--tuning"]
    monkeypatch.setattr("sys.argv", [*arguments, *[part for setting in less for part in ("--set", setting)]])
    assert phantom_compare.main() == 0
    assert "| local |" in capsys.readouterr().out
    results = tmp_path / "workspace" / "phantoms-ci-compare" / "tuning" / "results.csv"
    assert results.read_text().count("\nlocal,1,") == 4
