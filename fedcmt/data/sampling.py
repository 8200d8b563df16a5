"""What happens to a patch: every random number of it, drawn in NumPy from one generator of that patch alone.

This is the one definition of the training augmentation. It is nnU-Net's: the transforms, probabilities and ranges of
``nnUNetTrainer.get_training_transforms`` (nnunetv2 2.8.1, batchgeneratorsv2 0.3.6). Backends apply the drawn
parameters and draw nothing, except the noise field that belongs to :attr:`Draws.noise_seed`.

A patch is three-dimensional throughout, `[C, D, H, W]`: slices are patches with D = 1. The order is fixed:

1. A region of ``initial_size`` voxels at ``corner`` is cut from the case, 0 (image) and -1 (labels) outside of it.
2. Warp: rotation and scaling about the region's centre, resampled to ``patch_size``; without one, the central crop.
3. Gaussian noise, 4. Gaussian blur, 5. brightness, 6. contrast, 7. low resolution, 8. gamma of the inverted image,
   9. gamma. Statistics (mean, range, standard deviation) are those of one channel at that moment.
10. Mirroring of image and labels.
11. Channels normalised within a mask are set to 0 where the label is -1; label -1 becomes 0.
12. Labels become regions where there are regions, and are thinned for deep supervision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

Size: TypeAlias = tuple[int, int, int]  # along D, H, W
Axes: TypeAlias = tuple[float, float, float]  # one number each for D, H, W
LabelKey: TypeAlias = int | tuple[int, ...]  # a label, or the labels of a region

# Probabilities and ranges, in nnU-Net's order.
P_ROTATION, P_SCALING, SCALING = 0.2, 0.2, (0.7, 1.4)
P_NOISE, NOISE = 0.1, (0.0, 0.1)  # nnU-Net calls it a variance and uses it as a standard deviation
P_BLUR, P_BLUR_CHANNEL, BLUR = 0.2, 0.5, (0.5, 1.0)
P_BRIGHTNESS, BRIGHTNESS = 0.15, (0.75, 1.25)
P_CONTRAST, CONTRAST = 0.15, (0.75, 1.25)
P_LOW_RESOLUTION, P_LOW_RESOLUTION_CHANNEL, LOW_RESOLUTION = 0.25, 0.5, (0.5, 1.0)
P_GAMMA_INVERTED, P_GAMMA, GAMMA = 0.1, 0.3, (0.7, 1.5)
P_MIRROR = 0.5


class CaseFacts(Protocol):
    """What drawing must know of a case.

    Attributes:
        shape: `(D, H, W)`.
        foreground: Label or region -> voxels of it, `[n, 3]`; those that nnU-Net's preprocessing has listed.
    """

    @property
    def shape(self) -> Size: ...

    @property
    def foreground(self) -> Mapping[LabelKey, np.ndarray]: ...


@dataclass(frozen=True)
class PatchRules:
    """What a client's patches may undergo; the same for all of them."""

    patch_size: Size
    initial_size: Size  # of the region that a warp may read; the patch size where nothing is augmented
    channels: int
    batch_size: int
    oversample_foreground: float  # share of each batch that must hold foreground
    annotated: LabelKey | None  # with an ignore label: where patches lie that need no foreground
    augment: bool
    slices: bool  # the depth is no axis of the image: single slices
    in_plane: bool  # rotation, scaling and low resolution stay within slices: 2D, and nnU-Net's dummy-2D
    rotation: float  # largest angle in radians
    mirror_axes: tuple[int, ...]  # of D, H, W

    def forces_foreground(self, index: int) -> bool:
        """nnU-Net's rule: the last samples of each batch, rounded."""
        return index % self.batch_size >= round(self.batch_size * (1 - self.oversample_foreground))


@dataclass(frozen=True)
class Draws:
    """One patch's random numbers. Empty tuples and None stand for transforms that are not applied."""

    index: int  # in the round
    case: str
    corner: Size  # of the region in the case; may lie outside
    forced: bool  # a foreground voxel was asked for
    angles: Axes | None = None  # radians, about D, H, W
    scales: Axes | None = None  # > 1 makes objects smaller
    noise: float = 0.0  # standard deviation
    noise_seed: int = 0
    blur: tuple[Axes | None, ...] = ()  # a channel: standard deviations in voxels, 0 for none along an axis
    brightness: tuple[float, ...] = ()  # a channel: factor
    contrast: tuple[float, ...] = ()  # a channel: factor about the mean, kept within the range
    low_resolution: tuple[Size | None, ...] = ()  # a channel: size it is thinned to (nearest), then brought back from
    gamma_inverted: tuple[float, ...] = ()  # a channel: exponent, applied to the negated image; keeps mean and std
    gamma: tuple[float, ...] = ()  # a channel: exponent; keeps mean and standard deviation
    mirror: tuple[int, ...] = ()  # axes of D, H, W

    @property
    def warped(self) -> bool:
        """Whether the patch is resampled; otherwise it is the region's central crop."""
        return self.angles is not None or self.scales is not None


def draw_patch(
    rng: np.random.Generator,
    index: int,
    rules: PatchRules,
    cases: Sequence[str],
    facts: Callable[[str], CaseFacts],
) -> Draws:
    """Draw everything about one patch.

    Args:
        rng: The patch's own generator, :func:`fedcmt.seeding.sample_generator`.
        index: Its place in the round.
        rules: The client's.
        cases: To choose from, with replacement.
        facts: Of a case, by its name.
    """
    case, forced = cases[int(rng.integers(len(cases)))], rules.forces_foreground(index)
    corner = _draw_corner(rng, rules, facts(case), forced)
    if not rules.augment:
        return Draws(index, case, corner, forced)
    angles, scales = _draw_warp(rng, rules)
    noise = float(rng.uniform(*NOISE)) if rng.random() < P_NOISE else 0.0
    return Draws(
        index,
        case,
        corner,
        forced,
        angles,
        scales,
        noise,
        noise_seed=int(rng.integers(2**63)) if noise > 0 else 0,
        blur=_draw_blur(rng, rules),
        brightness=_draw_factors(rng, rules, P_BRIGHTNESS, BRIGHTNESS),
        contrast=_draw_factors(rng, rules, P_CONTRAST, CONTRAST),
        low_resolution=_draw_low_resolution(rng, rules),
        gamma_inverted=_draw_factors(rng, rules, P_GAMMA_INVERTED, GAMMA),
        gamma=_draw_factors(rng, rules, P_GAMMA, GAMMA),
        mirror=tuple(axis for axis in rules.mirror_axes if rng.random() < P_MIRROR),
    )


def _draw_corner(rng: np.random.Generator, rules: PatchRules, case: CaseFacts, forced: bool) -> Size:
    """Corner of the region, after ``nnUNetDataLoader.get_bbox``.

    Regions overlap the case's border by half of what they exceed the patch by, and more where the case is smaller.
    """
    size = np.asarray(rules.initial_size)
    margin = np.maximum(size - np.asarray(rules.patch_size), size - np.asarray(case.shape))
    lowest = -margin // 2
    highest = np.asarray(case.shape) + margin // 2 + margin % 2 - size
    voxels = _candidates(rng, rules, case.foreground, forced)
    if voxels is None:
        corner = [int(rng.integers(low, high + 1)) for low, high in zip(lowest, highest, strict=True)]
    else:
        centre = voxels[rng.integers(len(voxels))]
        # As in nnU-Net, only the lower border holds the region back.
        corner = np.maximum(lowest, centre.astype(np.int64) - size // 2).tolist()
    return corner[0], corner[1], corner[2]


def _candidates(
    rng: np.random.Generator, rules: PatchRules, foreground: Mapping[LabelKey, np.ndarray], forced: bool
) -> np.ndarray | None:
    """Voxels `[n, 3]` that the region may be centred at; None for anywhere."""
    if not forced:
        voxels = None if rules.annotated is None else foreground[rules.annotated]
        return voxels if voxels is not None and len(voxels) else None
    present = [key for key, voxels in foreground.items() if len(voxels)]
    if len(present) > 1 and rules.annotated in present:
        present.remove(rules.annotated)
    return foreground[present[rng.integers(len(present))]] if present else None


def _draw_warp(rng: np.random.Generator, rules: PatchRules) -> tuple[Axes | None, Axes | None]:
    rotates, scales = rng.random() < P_ROTATION, rng.random() < P_SCALING
    limit = rules.rotation
    angles = factors = None
    if rotates:
        turn = [float(rng.uniform(-limit, limit)) for _ in range(1 if rules.in_plane else 3)]
        angles = (turn[0], 0.0, 0.0) if rules.in_plane else (turn[0], turn[1], turn[2])
    if scales:
        factor = float(rng.uniform(*SCALING))
        factors = (1.0 if rules.in_plane else factor, factor, factor)
    return angles, factors


def _draw_blur(rng: np.random.Generator, rules: PatchRules) -> tuple[Axes | None, ...]:
    if rng.random() >= P_BLUR:
        return ()
    chosen = rng.random(rules.channels) < P_BLUR_CHANNEL
    if not chosen.any():
        return ()
    sigmas = rng.uniform(*BLUR, (rules.channels, 3))
    if rules.slices:
        sigmas[:, 0] = 0
    return tuple((float(s[0]), float(s[1]), float(s[2])) if c else None for c, s in zip(chosen, sigmas, strict=True))


def _draw_factors(
    rng: np.random.Generator, rules: PatchRules, probability: float, limits: tuple[float, float]
) -> tuple[float, ...]:
    """A factor for each channel: below 1 as often as above, uniform on either side."""
    if rng.random() >= probability:
        return ()
    low, high = limits
    return tuple(
        float(rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high)) for _ in range(rules.channels)
    )


def _draw_low_resolution(rng: np.random.Generator, rules: PatchRules) -> tuple[Size | None, ...]:
    if rng.random() >= P_LOW_RESOLUTION:
        return ()
    chosen = rng.random(rules.channels) < P_LOW_RESOLUTION_CHANNEL
    scales = rng.uniform(*LOW_RESOLUTION, rules.channels)
    if not chosen.any():
        return ()
    return tuple(_thinned(rules, float(np.float32(s))) if c else None for c, s in zip(chosen, scales, strict=True))


def _thinned(rules: PatchRules, scale: float) -> Size:
    depth, height, width = (max(1, round(extent * scale)) for extent in rules.patch_size)
    return (rules.patch_size[0] if rules.in_plane else depth), height, width
