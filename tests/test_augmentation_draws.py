"""Draws: the same whatever was drawn before, and as often and as large as nnU-Net's over many patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from test_augmentation_parity import rules_of

from fedcmt.data import sampling
from fedcmt.data.geometry import turned
from fedcmt.data.sampling import Draws, LabelKey, PatchRules, draw_patch
from fedcmt.seeding import sample_generator, seeded

COUNT, CHANNELS = 3000, 2
generator = partial(sample_generator, 1, client="site", round_index=1, purpose="training patches")


@dataclass(frozen=True)
class Facts:
    shape: tuple[int, int, int] = (40, 44, 50)
    foreground: Mapping[LabelKey, np.ndarray] = None


def drawn(rules: PatchRules, facts: Facts, indices: range = range(COUNT)) -> list[Draws]:
    facts = replace(facts, foreground=facts.foreground or {})
    return [draw_patch(generator(index=i), i, rules, ["a", "b", "c"], lambda name: facts) for i in indices]


def of_ours(rules: PatchRules) -> dict[str, np.ndarray]:
    """Every parameter of every patch as numbers, with what stands for "not applied" where it is not."""
    count, rows = rules.channels, []
    for d in drawn(rules, Facts()):
        matrix = turned(d.angles or (0, 0, 0), d.scales or (1, 1, 1))
        rows.append(
            {
                "matrix": matrix,
                "noise": d.noise,
                "blur": [s or (0, 0, 0) for s in d.blur or (None,) * count],
                "brightness": d.brightness or (1.0,) * count,
                "contrast": d.contrast or (1.0,) * count,
                "low resolution": [s or rules.patch_size for s in d.low_resolution or (None,) * count],
                "gamma inverted": d.gamma_inverted or (1.0,) * count,
                "gamma": d.gamma or (1.0,) * count,
                "mirror": [axis in d.mirror for axis in range(3)],
            }
        )
    return {name: np.array([np.ravel(row[name]) for row in rows], float) for name in rows[0]}


def of_nnunet(rules: PatchRules) -> dict[str, np.ndarray]:
    """The same from the transforms that nnU-Net composes, asked for parameters only."""
    flat = rules.in_plane
    composed = nnUNetTrainer.get_training_transforms(
        rules.patch_size, (-rules.rotation, rules.rotation), None, (0, 1, 2), flat
    )
    image = torch.zeros(rules.channels, *rules.patch_size)
    rows = []
    for _ in range(COUNT):
        names = iter(("noise", "blur", "brightness", "contrast", "low resolution", "gamma inverted", "gamma"))
        row = {}
        for transform in composed.transforms:
            kind = type(transform).__name__
            if kind == "SpatialTransform":
                found = transform.get_parameters(image=image.flatten(0, 1) if flat else image)["affine"]
                row["matrix"] = np.eye(3)
                if found is not None:
                    row["matrix"][3 - len(found) :, 3 - len(found) :] = found
            elif kind == "MirrorTransform":
                axes = transform.get_parameters(image=image)["axes"]
                row["mirror"] = [axis in axes for axis in range(3)]
            elif isinstance(transform, RandomTransform):
                name = next(names)
                applied = transform.get_parameters()["apply_transform"]
                row[name] = values(name, transform.transform.get_parameters(image=image) if applied else None, rules)
        rows.append(row)
    return {name: np.array([np.ravel(row[name]) for row in rows], float) for name in rows[0]}


def values(name: str, found: dict | None, rules: PatchRules) -> np.ndarray:
    count = rules.channels
    if name == "noise":
        return np.array(0.0 if found is None else found["sigmas"])
    if name == "blur":
        filled = np.zeros((count, 3))
        if found is not None and found["apply_to_channel"].any():
            filled[found["apply_to_channel"].numpy()] = found["sigmas"]
        return filled
    if name == "low resolution":
        filled = np.ones((count, 3))
        if found is not None and len(found["apply_to_channel"]):
            filled[found["apply_to_channel"].numpy()] = found["scales"].numpy()
        return np.round(filled * rules.patch_size)
    filled = np.ones(count)
    if found is not None:
        filled[:] = found["gamma" if "gamma" in name else "multipliers"].numpy()
    return filled


def surprises(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Largest distance, in standard errors, of the means of values, their squares and their being the default."""
    found = {}
    for name, mine in ours.items():
        default = np.median(theirs[name], axis=0)  # most transforms are not applied to most patches
        views: list[Callable[[np.ndarray], np.ndarray]] = [
            lambda x: x,
            lambda x: x**2,
            lambda x, usual=default: (np.abs(x - usual) < 1e-12).astype(float),
        ]
        for view in views:
            a, b = view(mine), view(theirs[name])
            error = np.sqrt((a.var(0) + b.var(0)) / COUNT) + 1e-9
            found[name] = max(found.get(name, 0.0), float((np.abs(a.mean(0) - b.mean(0)) / error).max()))
    return found


@pytest.mark.parametrize("shape", ["isotropic", "anisotropic"])
def test_parameters_are_distributed_as_nnunets(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = replace(rules_of(shape, CHANNELS), rotation=0.5)
    with seeded(0):
        theirs = of_nnunet(rules)
    assert len(theirs) == 9
    found = surprises(of_ours(rules), theirs)
    assert max(found.values()) < 4.5, found
    for name, value, feature in (
        ("P_BLUR", 0.3, "blur"),
        ("SCALING", (0.5, 1.4), "matrix"),
        ("NOISE", (0.0, 0.15), "noise"),
        ("P_GAMMA", 0.4, "gamma"),
    ):
        monkeypatch.setattr(sampling, name, value)
        assert surprises(of_ours(rules), theirs)[feature] > 4.5, f"{name} could be wrong unnoticed"
        monkeypatch.undo()


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("case_shape", [(40, 44, 50), (18, 44, 31)])
@pytest.mark.parametrize("forced", [False, True])
def test_places_are_distributed_as_nnunets(case_shape: tuple[int, int, int], ignore: bool, forced: bool) -> None:
    """Regions as nnU-Net's loader chooses them, of cases larger and smaller than the region."""
    rng = np.random.default_rng(3)
    places = {
        key: rng.integers(0, case_shape, (n, 3)) // spread
        for key, n, spread in (((1, 2), 50, 1), (2, 30, 2), (3, 0, 1))
    }
    rules = replace(rules_of("isotropic", 1), batch_size=1, oversample_foreground=float(forced))
    if ignore:
        places[-1, 0, 1, 2, 3, 4] = rng.integers(0, case_shape, (40, 3)) // 3
        rules = replace(rules, annotated=(-1, 0, 1, 2, 3, 4))
    manager = SimpleNamespace(all_labels=[0, 1, 2, 3, 4], has_ignore_label=ignore)
    loader = nnUNetDataLoader(
        SimpleNamespace(identifiers=["a"]), 1, rules.initial_size, rules.patch_size, manager, float(forced)
    )
    listed = {key: np.c_[np.zeros(len(voxels), int), voxels] for key, voxels in places.items()}
    with seeded(1):
        theirs = np.array([loader.get_bbox(case_shape, forced, listed)[0] for _ in range(COUNT)], float)
    ours = [d.corner for d in drawn(rules, Facts(case_shape, places))]
    assert max(surprises({"corner": np.array(ours, float)}, {"corner": theirs}).values()) < 4.5
    assert (np.min(ours, 0) == theirs.min(0)).all()


def test_a_draw_depends_on_its_key_alone() -> None:
    rules, facts = rules_of("isotropic", 2), Facts()
    whole = drawn(rules, facts, range(40))
    assert drawn(rules, facts, range(25, 40)) == whole[25:]
    assert len({(d.case, d.corner, d.mirror, d.gamma) for d in whole}) == 40
    keys = [
        sample_generator(seed, client=client, round_index=r, purpose=purpose, index=i).random()
        for seed, client, r, purpose, i in [
            (1, "a", 1, "x", 1),
            (2, "a", 1, "x", 1),
            (1, "b", 1, "x", 1),
            (1, "a", 2, "x", 1),
            (1, "a", 1, "y", 1),
            (1, "a", 1, "x", 2),
        ]
    ]
    assert len(set(keys)) == len(keys)


def test_the_last_of_each_batch_hold_foreground() -> None:
    rules = replace(rules_of("isotropic", 1), batch_size=4, oversample_foreground=0.33)
    loader = SimpleNamespace(batch_size=4, oversample_foreground_percent=0.33)
    expected = [nnUNetDataLoader._oversample_last_XX_percent(loader, index) for index in range(4)]
    assert [d.forced for d in drawn(rules, Facts(), range(8))] == expected * 2


def test_validation_patches_are_only_placed() -> None:
    rules = replace(rules_of("isotropic", 1), augment=False, initial_size=(20, 24, 22))
    for draws in drawn(rules, Facts(), range(50)):
        assert draws == Draws(draws.index, draws.case, draws.corner, draws.forced)
