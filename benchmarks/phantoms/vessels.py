"""Vessels as branching tubes: an aorta, a vein, and trees into liver, spleen and kidneys."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Tube:
    """A straight piece of vessel in mm (z, y, x) of the standard body."""

    start: np.ndarray
    end: np.ndarray
    radius: float


# Where a tree leaves the aorta or the vein, and where its first bifurcation lies; radius and number of bifurcations.
_TREES = (
    ((16.0, 12.0, 2.0), (10.0, 0.0, -14.0), 3.6, 3),  # liver
    ((10.0, 13.0, 2.0), (14.0, 8.0, 26.0), 3.2, 2),  # spleen
    ((-16.0, 13.0, 2.0), (-21.0, 15.0, -19.0), 3.0, 1),  # kidneys
    ((-16.0, 13.0, 2.0), (-21.0, 15.0, 19.0), 3.0, 1),
)


def grow_trees(rng: np.random.Generator) -> list[Tube]:
    """Draw a subject's vessels."""
    tubes = _trunk(rng, (14.0, 4.0), rng.uniform(4.2, 5.2)) + _trunk(rng, (13.0, -9.0), rng.uniform(4.0, 5.0))
    for origin, target, radius, levels in _TREES:
        start, end = np.asarray(origin), rng.normal(target, 2.0)
        bend = (start + end) / 2 + rng.normal(0, 2.5, 3)
        radius = radius * rng.uniform(0.9, 1.1)
        tubes += [Tube(start, bend, radius), Tube(bend, end, radius)]
        tubes += _branches(rng, end, (end - start) / np.linalg.norm(end - start), radius * 0.85, 15.0, levels)
    return tubes


def _trunk(rng: np.random.Generator, place: tuple[float, float], radius: float) -> list[Tube]:
    """A winding vessel along the whole body."""
    heights = np.linspace(-60, 60, 9)
    sway = np.cumsum(rng.normal(0, 1.2, (9, 2)), 0)
    knots = np.column_stack([heights, np.asarray(place) + sway - sway.mean(0)])
    return [Tube(a, b, radius) for a, b in pairwise(knots)]


def _branches(
    rng: np.random.Generator, start: np.ndarray, direction: np.ndarray, radius: float, length: float, levels: int
) -> list[Tube]:
    """A bifurcation and what grows from it; radii shrink by Murray's law for equal branches, 2^(-1/3)."""
    if levels == 0:
        return []
    side = np.cross(direction, rng.normal(size=3))
    side /= np.linalg.norm(side)
    tubes = []
    for sign in (1.0, -1.0):
        heading = direction + sign * rng.uniform(0.5, 0.9) * side
        heading /= np.linalg.norm(heading)
        end = start + heading * length * rng.uniform(0.8, 1.2)
        tubes.append(Tube(start, end, radius))
        tubes += _branches(rng, end, heading, radius * 2 ** (-1 / 3), length * 0.8, levels - 1)
    return tubes


def draw_tubes(points: np.ndarray, tubes: list[Tube]) -> np.ndarray:
    """Voxels whose centres lie within a tube.

    Args:
        points: `[3, D, H, W]` positions in mm.
        tubes: The vessels.

    Returns:
        `[D, H, W]` bool.
    """
    places = points.reshape(3, -1)
    inside = np.zeros(places.shape[1], bool)
    for tube in tubes:
        low = np.minimum(tube.start, tube.end)[:, None] - tube.radius
        high = np.maximum(tube.start, tube.end)[:, None] + tube.radius
        near = np.flatnonzero(((places > low) & (places < high)).all(0))  # a tube fills little of the volume
        along = tube.end - tube.start
        offset = places[:, near] - tube.start[:, None]
        share = np.clip(along @ offset / (along @ along), 0, 1)
        away = offset - along[:, None] * share
        inside[near[np.einsum("ip,ip->p", away, away) < tube.radius**2]] = True
    return inside.reshape(points.shape[1:])
