"""One subject: body, organs, vessel trees, lesions and cysts, as tissues on a grid finer than the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from vessels import draw_tubes, grow_trees

# Images are [D, H, W] = z, y, x: feet to head, front to back, right to left.
SHAPE = (24, 24, 32)
SPACING = 4.0  # mm
FINE = 2  # fine voxels along each edge of an image voxel


class Tissue(IntEnum):
    """What a fine voxel is made of, besides lesions and cysts, which replace a part of it."""

    AIR = 0
    FAT = 1
    MUSCLE = 2
    BONE = 3
    LIVER = 4
    SPLEEN = 5
    KIDNEY = 6
    FLUID = 7  # in the stomach
    VESSEL = 8
    LESION = 9
    CYST = 10
    FATTY_LIVER = 11


ORGANS = (Tissue.LIVER, Tissue.SPLEEN, Tissue.KIDNEY)
# Centre and radii in mm (z, y, x), before a subject's own deformation.
_ELLIPSOIDS = {
    Tissue.FLUID: [((12, -14, 18), (15, 11, 14))],
    Tissue.LIVER: [((10, -4, -24), (25, 23, 24))],
    Tissue.SPLEEN: [((14, 8, 35), (18, 15, 12))],
    Tissue.KIDNEY: [((-22, 15, -24), (16, 10, 11)), ((-22, 15, 24), (16, 10, 11))],
}


@dataclass(frozen=True)
class Anatomy:
    """A subject on the fine grid, all `[FINE D, FINE H, FINE W]`.

    Attributes:
        tissue: :class:`Tissue` without lesions and cysts, vessels included.
        organ: Liver, spleen and kidney as organs, whatever grows or flows in them; 0 elsewhere.
        lesion: Share of each voxel that is lesion, 0 to 1.
        cyst: Share that is cyst.
    """

    tissue: np.ndarray
    organ: np.ndarray
    lesion: np.ndarray
    cyst: np.ndarray


def make_anatomy(rng: np.random.Generator, *, lesions: int, cysts: int, decoys: int, steatosis: bool) -> Anatomy:
    """Draw a subject.

    Args:
        rng: Generator of everything about the subject.
        lesions: Number of lesions in the organs.
        cysts: Number of cysts in the organs.
        decoys: Number of nodes of lesion tissue outside the organs, which count as no lesion.
        steatosis: Whether the liver is fatty.
    """
    points = _subject_coordinates(rng)  # [3, D, H, W] in mm
    tissue = _outline(points)
    for organ, parts in _ELLIPSOIDS.items():
        for centre, radii in parts:
            inside = _scaled_distance(points, rng.normal(centre, 2.5), radii * rng.uniform(0.85, 1.15, 3)) < 1
            tissue[inside & (tissue == Tissue.MUSCLE)] = organ
    organ = np.where(np.isin(tissue, ORGANS), tissue, 0).astype(np.uint8)
    tissue[draw_tubes(points, grow_trees(rng)) & (tissue > Tissue.FAT) & (tissue != Tissue.BONE)] = Tissue.VESSEL
    if steatosis:
        tissue[tissue == Tissue.LIVER] = Tissue.FATTY_LIVER
    lesion, taken = _blobs(rng, points, organ > 0, lesions, (7.0, 11.5), np.zeros(organ.shape, bool))
    cyst, taken = _blobs(rng, points, organ > 0, cysts, (5.0, 8.5), taken)
    decoy, _ = _blobs(rng, points, tissue == Tissue.MUSCLE, decoys, (5.5, 9.0), taken)
    tissue[decoy > 0.5] = Tissue.LESION
    solid = tissue != Tissue.VESSEL
    return Anatomy(tissue, organ, lesion * (organ > 0) * solid, cyst * (organ > 0) * solid)


def _grid() -> np.ndarray:
    """Positions of the fine voxels in mm from the centre, `[3, D, H, W]`."""
    axes = [(np.arange(n * FINE) + 0.5) * (SPACING / FINE) - n * SPACING / 2 for n in SHAPE]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def _subject_coordinates(rng: np.random.Generator) -> np.ndarray:
    """Where each fine voxel lies in the standard body: turned, scaled, moved and smoothly deformed."""
    grid = _grid()
    points = np.einsum("ij,jzyx->izyx", _rotation(rng.uniform(-0.15, 0.15, 3)), grid)
    points = points / rng.uniform(0.9, 1.08, (3, 1, 1, 1)) + rng.uniform(-4, 4, (3, 1, 1, 1))
    for _ in range(4):
        direction, phase = rng.normal(0, 1.4, 3), rng.uniform(0, 2 * np.pi)
        wave = rng.uniform(0.03, 0.07) * _unit(rng.normal(size=3))
        points = points + direction[:, None, None, None] * np.sin(np.tensordot(wave, grid, 1) + phase)
    return points


def _rotation(angles: Sequence[float]) -> np.ndarray:
    matrix = np.eye(3)
    for (i, j), angle in zip(((0, 1), (1, 2), (0, 2)), angles, strict=True):
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _scaled_distance(points: np.ndarray, centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Squared distance from a centre, 1 on the ellipsoid of these radii."""
    scaled = (points - np.reshape(centre, (3, 1, 1, 1))) / np.reshape(radii, (3, 1, 1, 1))
    return np.einsum("izyx,izyx->zyx", scaled, scaled)


def _outline(points: np.ndarray) -> np.ndarray:
    """Skin, fat, muscle, spine and two ribs; all run through the whole length."""
    _, y, x = points
    tissue = np.zeros(x.shape, np.uint8)
    tissue[(x / 59) ** 2 + (y / 43) ** 2 < 1] = Tissue.FAT
    tissue[(x / 53) ** 2 + (y / 37) ** 2 < 1] = Tissue.MUSCLE
    for centre, radius in (((28.0, 0.0), 8.0), ((17.0, 45.0), 3.5), ((17.0, -45.0), 3.5)):
        tissue[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = Tissue.BONE
    return tissue


def _blobs(
    rng: np.random.Generator,
    points: np.ndarray,
    inside: np.ndarray,
    count: int,
    radii: tuple[float, float],
    taken: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Soft-edged ellipsoids centred in a region and apart from what is taken.

    Returns:
        Share of each voxel, 0 to 1, and what is taken now.
    """
    share = np.zeros(inside.shape)
    for _ in range(count):
        places = np.argwhere(inside & ~taken)
        if len(places) == 0:
            break
        place = tuple(places[rng.integers(len(places))])
        away = (points - points[(slice(None), *place)][:, None, None, None]) / rng.uniform(*radii, 3)[
            :, None, None, None
        ]
        distance = np.sqrt(np.einsum("izyx,izyx->zyx", away, away))
        share = np.maximum(share, np.clip((1.15 - distance) / 0.3, 0, 1))
        taken = taken | (distance < 1.6)
    return share, taken


def coarse(fine: np.ndarray) -> np.ndarray:
    """Mean over the fine voxels of each image voxel: `[FINE D, FINE H, FINE W]` to `[D, H, W]`."""
    depth, height, width = (n // FINE for n in fine.shape)
    return fine.reshape(depth, FINE, height, FINE, width, FINE).mean((1, 3, 5))
