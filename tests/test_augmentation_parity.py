"""Our patches against nnU-Net's own transforms with the same parameters. Tolerances: the table in docs/data.md."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from augmentation import case, of_nnunet

from fedcmt.data.geometry import reading
from fedcmt.data.intensity import standard_noise
from fedcmt.data.sampling import Draws, PatchRules
from fedcmt.data.torch_pipeline import augmented

SHAPES = {  # patch, region it is cut from, in-plane, slices
    "isotropic": ((20, 24, 22), (32, 39, 36), False, False),
    "anisotropic": ((6, 26, 24), (6, 41, 40), True, False),  # nnU-Net's dummy-2D
    "slices": ((1, 26, 24), (1, 41, 40), True, True),
}
ANGLES = {"isotropic": (0.4, -0.3, 0.5), "anisotropic": (2.5, 0.0, 0.0), "slices": (-1.2, 0.0, 0.0)}
# Largest difference of an intensity, as a share of the image's standard deviation (about 1).
TOLERANCES = {
    "crop": 0.0,
    "rotation": 2e-5,
    "scaling": 2e-5,
    "beyond the region": 5e-5,
    "noise": 1e-6,
    "blur": 2e-6,
    "brightness": 0.0,
    "contrast": 1e-6,
    "low resolution": 5e-6,
    "gamma inverted": 5e-6,
    "gamma": 5e-6,
    "mirror": 0.0,
    "all": 5e-5,
}


def rules_of(shape: str, channels: int) -> PatchRules:
    size, initial, in_plane, slices = SHAPES[shape]
    return PatchRules(size, initial, channels, 2, 0.33, None, True, slices, in_plane, 3.0, (0, 1, 2))


def draws_of(transform: str, shape: str, channels: int) -> Draws:
    size, _, in_plane, slices = SHAPES[shape]
    ramp = np.linspace(0, 1, channels)

    def scaled(factor: float) -> tuple[float, float, float]:
        return (1.0 if in_plane else factor), factor, factor

    sigmas = [(0.0 if slices else 0.5 + 0.4 * r, 0.98, 0.7) for r in ramp]
    sizes = [(size[0] if in_plane else round(size[0] * s), *(round(n * s) for n in size[1:])) for s in 0.5 + 0.4 * ramp]
    settings = {
        "rotation": {"angles": ANGLES[shape]},
        # Not 0.8: it puts points halfway between voxels, where rounding decides.
        "scaling": {"scales": scaled(0.83)},
        "beyond the region": {"angles": ANGLES[shape], "scales": scaled(1.4)},
        "noise": {"noise": 0.08, "noise_seed": 5},
        # Of several channels the second is left as it is.
        "blur": {"blur": tuple(None if c == 1 else s for c, s in enumerate(sigmas))},
        "brightness": {"brightness": tuple(0.8 + 0.4 * ramp)},
        "contrast": {"contrast": tuple(1.2 - 0.4 * ramp)},
        "low resolution": {"low_resolution": tuple(None if c == 1 else s for c, s in enumerate(sizes))},
        "gamma inverted": {"gamma_inverted": tuple(0.7 + 0.7 * ramp)},
        "gamma": {"gamma": tuple(1.4 - 0.6 * ramp)},
        "mirror": {"mirror": (1, 2) if slices else (0, 2)},
    }
    chosen = settings if transform == "all" else {transform: settings.get(transform, {})}
    merged = {key: value for name in chosen for key, value in chosen[name].items()}
    return replace(Draws(0, "case", (0, 0, 0), False), **merged)


def both(
    transform: str, shape: str, channels: int, labels: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]:
    rules, draws = rules_of(shape, channels), draws_of(transform, shape, channels)
    image, marks = case(channels, rules.initial_size, labels, seed)
    noise = standard_noise(channels, rules.patch_size, draws.noise_seed)
    part = reading(draws, rules)
    box = tuple(slice(low, low + n) for low, n in zip(part.corner, part.size, strict=True))
    ours = augmented(image[(slice(None), *box)].copy(), marks[box].copy(), part, draws, rules)
    return *ours, *of_nnunet(image, marks, draws, rules, noise)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transform", TOLERANCES)
def test_a_patch_is_nnunets(transform: str, shape: str, channels: int) -> None:
    ours, our_labels, theirs, their_labels = both(transform, shape, channels, labels=3)
    assert ours.shape == tuple(theirs.shape) == (channels, *SHAPES[shape][0])
    assert np.abs(ours - theirs.numpy()).max() <= TOLERANCES[transform] * theirs.std().item()
    assert (our_labels != their_labels.numpy()).mean() <= (2e-4 if draws_of(transform, shape, channels).warped else 0)


@pytest.mark.parametrize("labels", [1, 2, 3, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_warped_labels_follow_nnunets_rule(shape: str, labels: int) -> None:
    wrong = []
    for seed in range(4):
        _, ours, _, theirs = both("beyond the region", shape, 1, labels, seed)
        wrong.append((ours != theirs.numpy()).mean())
        assert set(np.unique(ours)) <= set(range(-1, labels))
    assert np.mean(wrong) <= 1e-4, wrong


def test_only_what_the_warp_needs_is_read() -> None:
    rules = rules_of("isotropic", 1)
    assert reading(draws_of("crop", "isotropic", 1), rules).size == rules.patch_size
    assert reading(draws_of("scaling", "isotropic", 1), rules).size == (18, 21, 20)
    assert reading(draws_of("beyond the region", "isotropic", 1), rules).size == rules.initial_size
