"""A picture of a label map over its scan, for a first look at a prediction."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from fedcmt.files import write_bytes
from fedcmt.volume import Volume

_PLANES = ("axial", "coronal", "sagittal")


def write_preview(volume: Volume, labels: np.ndarray, path: Path) -> None:
    """Write a PNG of the three slices, one across each axis, that hold most labelled voxels.

    Args:
        volume: The scan; its first channel is shown  # [C, D, H, W]
        labels: `[D, H, W]`
        path: Where to.
    """
    from matplotlib.figure import Figure  # no pyplot: nothing global, any thread

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    image = volume.data[0]
    low, high = np.percentile(image, (1, 99))
    for axis, (name, place) in enumerate(zip(_PLANES, figure.subplots(1, 3), strict=True)):
        index = _fullest_slice(labels, axis)
        rows, columns = (volume.spacing[other] for other in range(3) if other != axis)
        view = {"aspect": rows / columns, "origin": "lower" if axis else "upper", "interpolation": "nearest"}
        place.imshow(image.take(index, axis), cmap="gray", vmin=low, vmax=max(high, low + 1e-6), **view)
        shown = labels.take(index, axis)
        overlay = np.ma.masked_equal(shown, 0)
        place.imshow(overlay, cmap="tab10", vmin=1, vmax=10, alpha=0.5, **view)
        place.set_title(f"{name}, slice {index}", fontsize=9)
        place.set_axis_off()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    write_bytes(path, content.getvalue())


def _fullest_slice(labels: np.ndarray, axis: int) -> int:
    """The slice across an axis with most labelled voxels; the middle one where there are none."""
    counts = np.count_nonzero(labels, axis=tuple(other for other in range(3) if other != axis))
    return int(counts.argmax()) if counts.any() else labels.shape[axis] // 2
