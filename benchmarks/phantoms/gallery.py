"""Draw one subject as CT and as MR, with all labels: ``python benchmarks/phantoms/gallery.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from anatomy import SHAPE
from ct import CTScanner
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from mr import CHANNELS, MRScanner
from tasks import LABELS, TaskName, make_labels, make_subject

_SLICES = (6, 12, 16)
_COLOURS = ListedColormap(["#00000000", "#e6550d", "#31a354", "#3182bd"])
_TASKS: tuple[TaskName, ...] = ("organ", "lesion", "vessel")


def gallery(seed: int) -> Figure:
    """A contact sheet: three slices of one subject, CT, four MR contrasts, and the labels of three tasks on the CT."""
    rng = np.random.default_rng(seed)
    subject = make_subject(rng, steatosis=False)
    ct = CTScanner.draw(rng, 1.0).scan(subject, rng)[0]
    mr = MRScanner.draw(rng, 1.0, CHANNELS).scan(subject, rng)
    columns = len(CHANNELS) + len(_TASKS) + 1
    figure = Figure(figsize=(1.6 * columns, 1.3 * len(_SLICES)), layout="constrained", dpi=90)
    for row, z in zip(figure.subplots(len(_SLICES), columns), _SLICES, strict=True):
        _show(row[0], ct[z], "CT, -160 to 240 HU", (-160, 240))
        for axes, name, channel in zip(row[1:], CHANNELS, mr, strict=False):
            _show(axes, channel[z], f"MR {name}", (0, float(np.percentile(channel, 99.5))))
        for axes, task in zip(row[1 + len(CHANNELS) :], _TASKS, strict=True):
            names = [name for name in LABELS[task] if name != "background"]
            _show(axes, ct[z], ", ".join(names), (-160, 240))
            axes.imshow(make_labels(subject, task)[z], cmap=_COLOURS, vmin=0, vmax=3, alpha=0.6, interpolation="none")
    return figure


def _show(axes: Axes, image: np.ndarray, title: str, window: tuple[float, float]) -> None:
    axes.imshow(image, cmap="gray", vmin=window[0], vmax=window[1], interpolation="none", aspect="equal")
    axes.set_title(title, fontsize=7)
    axes.set_axis_off()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Draw one subject as CT and as MR, with its labels.")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("gallery.png"))
    options = parser.parse_args()
    gallery(options.seed).savefig(options.output)
    print(f"{options.output}: {len(_SLICES)} of {SHAPE[0]} slices, seed {options.seed}")


if __name__ == "__main__":
    main()
