"""Training patches: ours, on torch and on DALI, against nnU-Net's own loader, and change by change.

    python benchmarks/bench_data.py [--batches 60] [--sizes 64 96] [--channels 1 4] [--write]

All read the same preprocessed cases, made up here and stored as nnU-Net stores them, with the same transforms at the
same probabilities, on one thread each, batch by batch in turn in one process. CPU milliseconds are those of the whole
process (user and system); they stand on a busy machine, where patches a second do not. What is drawn decides what a
patch costs, so figures are means over many patches. --write puts the tables into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), "/nonexistent")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from measure import extra_memory
from report import machine_rows, table, write_tables
from scipy import ndimage

from fedcmt import ops
from fedcmt.data.backend import dali_missing
from fedcmt.data.sampling import PatchRules, Size
from fedcmt.data.source import CaseReader
from fedcmt.data.targets import TargetRules
from fedcmt.data.torch_pipeline import PatchSource, TorchMaker

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "benchmarks.md"
CASES = tuple(f"case_{number}" for number in range(4))
BATCH, ANGLE = 2, np.pi / 6  # nnU-Net's: two patches a batch, angles up to 30 degrees
LABELS = 3
MOST = {1: 0.6, 4: 0.7}  # of nnU-Net's CPU time: what we want at a number of channels

Work = Callable[[], object]


@dataclass
class Spent:
    """What a contender took, over all its patches."""

    cpu: list[float] = field(default_factory=list)  # seconds of each batch
    wall: float = 0.0
    memory: int | None = None

    def milliseconds(self) -> float:
        """CPU time of a patch."""
        return 1e3 * sum(self.cpu) / (BATCH * len(self.cpu))


def initial_size(size: int) -> int:
    """Of the region that a warp may read: nnU-Net's rule for cubes."""
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size

    angles = (-ANGLE, ANGLE)
    return int(get_patch_size((size,) * 3, angles, angles, angles, (0.85, 1.25))[0])


def make_cases(folder: Path, channels: int, size: int) -> None:
    """Smooth images with noise and nested labels, a little larger than a region."""
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    shape = (initial_size(size) + 20,) * 3
    for seed, case in enumerate(CASES):
        rng = np.random.default_rng(seed)
        smooth = ndimage.gaussian_filter(rng.normal(size=shape).astype(np.float32), 4)
        smooth /= smooth.std()
        image = np.stack([smooth + 0.1 * rng.normal(size=shape) for _ in range(channels)]).astype(np.float32)
        labels = np.digitize(smooth, (0.8, 1.6)).astype(np.int8)[None]
        voxels = {label: np.argwhere(labels == label)[::50] for label in range(1, LABELS)}
        chunks: dict[str, Any] = {}
        for name, maps in (("", image), ("_seg", labels)):
            block, chunk = comp_blosc2_params(maps.shape, (size,) * 3, maps.itemsize)
            chunks |= {f"chunks{name}": chunk, f"blocks{name}": block}
        nnUNetDatasetBlosc2.save_case(image, labels, {"class_locations": voxels}, str(folder / case), **chunks)


def scales() -> list[list[float]]:
    """Of deep supervision."""
    return [[1.0] * 3, [0.5] * 3, [0.25] * 3]


def nnunet_batches(folder: Path, channels: int, size: int) -> Work:
    """nnU-Net 2.8.1's loader with its default training transforms, as its trainer builds them."""
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    transforms = nnUNetTrainer.get_training_transforms(
        (size,) * 3, (-ANGLE, ANGLE), scales(), (0, 1, 2), False, use_mask_for_norm=[False] * channels
    )
    labels: Any = types.SimpleNamespace(all_labels=list(range(LABELS)), has_ignore_label=False)
    loader = nnUNetDataLoader(
        nnUNetDatasetBlosc2(str(folder), list(CASES)),
        BATCH,
        (initial_size(size),) * 3,
        (size,) * 3,
        labels,
        0.33,
        transforms=transforms,
    )
    np.random.seed(0)  # noqa: NPY002 (the generator that it draws from)
    torch.manual_seed(0)
    return loader.generate_train_batch


def our_batches(folder: Path, channels: int, size: int, backend: str) -> Work:
    """Batches one after the other."""
    cube: Size = (size, size, size)
    initial = (initial_size(size),) * 3
    rules = PatchRules(cube, initial, channels, BATCH, 0.33, None, True, False, False, ANGLE, (0, 1, 2))
    sizes = tuple((round(size * s[0]),) * 3 for s in scales())
    source = PatchSource("bench", folder, CASES, rules, TargetRules(sizes, True, None, ()))
    reader = CaseReader(folder, channels, "bench")
    generator = partial(_generator, 0)
    if backend == "dali":
        from fedcmt.data.dali import DaliMaker

        maker: Any = DaliMaker(source, reader, generator, torch.device("cpu"), 2)
    else:
        maker = TorchMaker(source, reader, generator, pinned=False)
    numbers = iter(range(10**9))
    return lambda: maker.make(next(numbers))


def _generator(seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng((seed, index))


def contenders(folder: Path, channels: int, size: int) -> dict[str, Work]:
    works = {
        "nnU-Net": nnunet_batches(folder, channels, size),
        "ours, torch": our_batches(folder, channels, size, "torch"),
    }
    if dali_missing() is None:
        works["ours, DALI"] = our_batches(folder, channels, size, "dali")
    return works


def measure(works: dict[str, Work], batches: int) -> dict[str, Spent]:
    """One batch of each in turn; the first of each warms up."""
    spent = {name: Spent() for name in works}
    for number in range(-1, batches):
        for name, work in works.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            if number >= 0:
                spent[name].cpu.append(time.process_time() - cpu)
                spent[name].wall += time.perf_counter() - wall
    for name, work in works.items():
        peaks = [extra_memory(work) for _ in range(4)]
        spent[name].memory = max((peak for peak in peaks if peak is not None), default=None)
    return spent


def loader_rows(sizes: Sequence[int], channels: Sequence[int], batches: int) -> Iterator[Sequence[str]]:
    for size in sizes:
        for count in channels:
            with tempfile.TemporaryDirectory() as folder:
                make_cases(Path(folder), count, size)
                spent = measure(contenders(Path(folder), count, size), batches)
                shown = (f"{name} {one.milliseconds():.1f} CPU ms a patch" for name, one in spent.items())
                print(f"{size}^3, {count} channels: {', '.join(shown)}", flush=True)
            stock = spent["nnU-Net"].milliseconds()
            for name, one in spent.items():
                share = one.milliseconds() / stock
                yield (
                    f"{size}^3", str(count), name, f"{one.milliseconds():.1f}",
                    "" if name == "nnU-Net" else f"{share:.2f}",
                    f"{MOST[count]:.1f}" if name == "ours, torch" and count in MOST else "",
                    f"{BATCH * len(one.cpu) / one.wall:.1f}",
                    "-" if one.memory is None else f"{one.memory / 2**20:.0f}",
                )  # fmt: skip


# --- change by change ---


def changes(size: int, channels: int) -> dict[str, tuple[Work, Work]]:
    """nnU-Net's work and ours for each change, with the same parameters; ours on a copy, as in the loader."""
    from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform, create_affine_matrix_3d

    region = initial_size(size)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(channels, region, region, region, generator=generator)
    coarse = torch.randint(LABELS, (1, *(region // 8 + 1,) * 3), generator=generator)
    for axis in (1, 2, 3):
        coarse = coarse.repeat_interleave(8, axis)
    labels = coarse[:, :region, :region, :region].to(torch.int16).contiguous()
    image = whole[:, :size, :size, :size].contiguous()
    affine = ops.patch_affine(create_affine_matrix_3d((0.3, -0.2, 0.4), (1.1,) * 3), (region,) * 3, (size,) * 3)
    spatial = SpatialTransform(
        (size,) * 3, 0, False, p_rotation=1, rotation=(0.2, 0.4), p_scaling=1, scaling=1.1,
        p_synchronize_scaling_across_axes=1, border_mode_seg="constant", padding_value_seg=-1,
    )  # fmt: skip
    copy = image.clone()

    def ours(**changed: Any) -> Work:
        return lambda: ops.change_intensities(copy.copy_(image), backend="native", **changed)

    def stock(transform: Any) -> Work:
        return lambda: transform(image=copy.copy_(image))

    half = (size // 2 + 3, size // 2 + 3, size // 2 + 3)
    sigma, ones = (0.75, 0.75, 0.75), [1.0] * channels
    return {
        "warp of image and labels": (
            lambda: spatial(image=whole, segmentation=labels),
            lambda: ops.warp_patch(whole, labels, affine, (size,) * 3, backend="native"),
        ),
        "noise": (stock(GaussianNoiseTransform(0.1, 1, True)), ours(noise=0.1, noise_seed=3)),
        "blur": (stock(GaussianBlurTransform(0.75, p_per_channel=1)), ours(blur=[sigma] * channels)),
        "contrast": (stock(ContrastTransform(1.2, True, False)), ours(contrast=[1.2 * one for one in ones])),
        "low resolution": (
            stock(SimulateLowResolutionTransform(half[0] / size, False, True, None)),
            ours(low_resolution=[half] * channels),
        ),
        "gamma": (stock(GammaTransform(1.3, 0, False, 1, 1)), ours(gamma=[1.3 * one for one in ones])),
    }


def change_rows(sizes: Sequence[int], channels: Sequence[int], cycles: int) -> Iterator[Sequence[str]]:
    for size in sizes:
        for count in channels:
            for name, works in changes(size, count).items():
                seconds: list[list[float]] = [[], []]
                for cycle in range(-1, cycles):
                    for work, times in zip(works, seconds, strict=True):
                        begin = time.process_time()
                        work()
                        if cycle >= 0:
                            times.append(time.process_time() - begin)
                stock, own = (1e3 * float(np.median(times)) for times in seconds)
                yield f"{size}^3", str(count), name, f"{stock:.2f}", f"{own:.2f}", f"{stock / own:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Training patches against nnU-Net's loader.")
    parser.add_argument("--batches", type=int, default=60, help=f"of {BATCH} patches, of each contender")
    parser.add_argument("--cycles", type=int, default=15, help="calls of each single change")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96])
    parser.add_argument("--channels", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.relative_to(ROOT)}")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # nnU-Net's
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    sizes, channels = arguments.sizes, arguments.channels
    lines = {
        "patch machine": list(table(("machine", ""), machine_rows(load))),
        "patches": list(
            table(
                ("patch", "channels", "loader", "CPU ms a patch", "of nnU-Net's", "at most", "patches/s", "extra MiB"),
                loader_rows(sizes, channels, arguments.batches),
            )
        ),
        "patch changes": list(
            table(
                ("patch", "channels", "change", "nnU-Net, CPU ms", "ours, CPU ms", "times faster"),
                change_rows(sizes, channels, arguments.cycles),
            )
        ),
    }
    print("\n\n".join("\n".join(rows) for rows in lines.values()))
    if arguments.write:
        write_tables(DOCUMENT, {name: iter(rows) for name, rows in lines.items()})


if __name__ == "__main__":
    main()
