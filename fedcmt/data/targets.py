"""From a patch's label map to what the loss is computed with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedcmt.data.sampling import LabelKey, Size
from fedcmt.data.source import Labels


@dataclass(frozen=True)
class TargetRules:
    """How label maps become targets.

    Attributes:
        sizes: Of each target, finest first; one without deep supervision.
        several: Whether targets are a list even where there is one.
        regions: Labels of each region, the ignore label last where there is one; None for plain labels.
        masked_channels: Image channels set to 0 outside the mask they were normalised in.
    """

    sizes: tuple[Size, ...]
    several: bool
    regions: tuple[LabelKey, ...] | None
    masked_channels: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Of a target."""
        return 1 if self.regions is None else len(self.regions)


def targets(labels: Labels, rules: TargetRules) -> list[npt.NDArray[np.int16 | np.bool_]]:
    """Targets `[1, D, H, W]` int16, or `[R, D, H, W]` bool for regions, one for each size.

    Args:
        labels: `[D, H, W]`; -1 counts as background.
        rules: The client's.
    """
    labels = np.maximum(labels, 0)
    thinned = [labels if size == labels.shape else labels[_nearest(labels.shape, size)] for size in rules.sizes]
    if rules.regions is None:
        return [part[None] for part in thinned]
    return [np.stack([np.isin(part, region) for region in rules.regions]) for part in thinned]


def nearest_exact(before: int, after: int) -> npt.NDArray[np.intp]:
    """torch's ``nearest-exact``: the voxel at ``floor((i + 0.5) before / after)``, in float32, `[after]`."""
    places = (np.arange(after, dtype=np.float32) + np.float32(0.5)) * (np.float32(before) / np.float32(after))
    return np.minimum(places.astype(np.intp), before - 1)


def _nearest(extent: Sequence[int], size: Size) -> tuple[npt.NDArray[np.intp], ...]:
    return np.ix_(*(nearest_exact(before, after) for before, after in zip(extent, size, strict=True)))


def mask_image(image: np.ndarray, labels: Labels, channels: Sequence[int]) -> None:
    """Set channels of an image `[C, D, H, W]` to 0 where the label is -1, in place."""
    if channels:
        outside = labels < 0
        for channel in channels:
            image[channel][outside] = 0
