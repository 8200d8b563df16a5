"""Prediction against stock nnU-Net: CPU seconds, memory, labels, and the stages that were replaced.

    python benchmarks/bench_infer.py [-m MODEL_FOLDER -i IMAGE] [--rounds 3] [--tta] [--json FILE]

Without a model and an image a network of 5.6 million parameters is trained for a minute on a made-up scan, and another
scan is made. Programs run one after the other, interleaved, each in a process of its own; figures are medians. CPU
seconds are those of the process and all its children, memory is the largest sum of resident memory over them: both
stand on a busy machine, where wall-clock times do not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from measure import extra_memory

ROOT = Path(__file__).resolve().parent.parent
STRUCTURES = 4  # labels of a made-up scan
TRAINING_STEPS = 150
STOCK_API = """
import sys, torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
model, image, output, tta = sys.argv[1:]
predictor = nnUNetPredictor(use_mirroring=tta == "1", device=torch.device("cpu"), allow_tqdm=False)
predictor.initialize_from_trained_model_folder(model, (0,))
predictor.predict_from_files_sequential([[image]], [output + "/case"])
"""
# Ends the process when the first network call begins.
UNTIL_FIRST_TILE = """
import os, sys, time, torch
def first(*_):
    print("FIRST", time.process_time(), flush=True)
    os._exit(0)
torch.nn.modules.module.register_module_forward_pre_hook(first)
"""


@dataclass(frozen=True)
class Usage:
    """What a program took."""

    cpu_seconds: float
    peak_mib: float


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # it ended meanwhile
            continue
    return found


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:  # it ended meanwhile
        return 0.0


def measured(command: Sequence[str]) -> tuple[Usage, str]:
    """Run a command to its end."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment())
        peak = 0.0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, sum(map(resident_mib, tree(process.pid))))
            time.sleep(0.05)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read()
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}:\n{text}")
    # Not the peak of `usage`, which counts what this program held when it started the other.
    return Usage(usage.ru_utime + usage.ru_stime, peak), text


def environment() -> dict[str, str]:
    """nnU-Net complains of folders that it does not need here."""
    folders = dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), "/nonexistent")
    return os.environ | folders | {"PYTHONPATH": str(ROOT)}


def programs(model: Path, image: Path, output: Path, tta: bool) -> dict[str, list[str]]:
    """The commands compared, by name; each writes into a folder of its name."""
    folder = image.parent
    stock = [str(model), str(image), str(output / "stock_api"), "1" if tta else "0"]
    entry = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as p; p()"
    cli = ["-i", str(folder), "-o", str(output / "stock_cli"), "-m", str(model), "-f", "0", "-device", "cpu"]
    ours = ["-m", str(model), "--folds", "0", "-i", str(image), "--device", "cpu"]
    ours = [sys.executable, "-m", "fedcmt.infer", *ours, *([] if tta else ["--disable-mirroring"])]
    faster = ["fast", "bf16"] if find_spec("openvino") else []
    return {
        "stock_api": [sys.executable, "-c", STOCK_API, *stock],
        "stock_cli": [sys.executable, "-c", entry, *cli, *([] if tta else ["--disable_tta"])],
        "ours": [*ours, "-o", str(output / "ours")],
        **{f"ours_{name}": [*ours, "--precision", name, "-o", str(output / f"ours_{name}")] for name in faster},
    }


def whole_programs(model: Path, image: Path, rounds: int, tta: bool) -> dict[str, Any]:
    """Acceptance ratios 1 and 3, with OpenVINO also 4 and 5."""
    from fedcmt.volume import read_volume

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        commands = programs(model, image, output, tta)
        usages: dict[str, list[Usage]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                (output / name).mkdir(exist_ok=True)
                usages[name].append(measured(command)[0])
                print(name, usages[name][-1], flush=True)
        labels = {name: read_volume(next((output / name).glob("*.nii.gz"))).data for name in commands}
    result: dict[str, Any] = {
        name: {
            "cpu_seconds": statistics.median(usage.cpu_seconds for usage in runs),
            "peak_mib": statistics.median(usage.peak_mib for usage in runs),
        }
        for name, runs in usages.items()
    }
    result["voxels"] = int(labels["ours"].size)
    for name in list(commands)[2:]:
        for other, key in itertools.product(("stock_api", "stock_cli"), ("cpu_seconds", "peak_mib")):
            result[name][f"{key}_over_{other}"] = result[name][key] / result[other][key]
        result[name] |= agreement(labels[name], labels["stock_api"])
    return result


def agreement(ours: np.ndarray, stock: np.ndarray) -> dict[str, float]:
    """Voxels that differ, and the lowest Dice of a label that stock nnU-Net gives to 1000 voxels or more."""
    values, counts = np.unique(stock, return_counts=True)
    dice = [
        2 * int(((ours == value) & (stock == value)).sum()) / int((ours == value).sum() + count)
        for value, count in zip(values, counts, strict=True)
        if count >= 1000
    ]
    return {"voxels_unlike_stock_api": int((ours != stock).sum()), "lowest_dice": min(dice)}


def first_tile(model: Path, image: Path, rounds: int) -> dict[str, float]:
    """Acceptance ratio 6: CPU seconds until the network is called for the first time."""
    ours = "from fedcmt.infer import main; main(sys.argv[1:])"
    with tempfile.TemporaryDirectory() as output:
        commands = {
            "stock_api": [UNTIL_FIRST_TILE + STOCK_API, str(model), str(image), output, "0"],
            "ours": [
                UNTIL_FIRST_TILE + ours, "-m", str(model), "--folds", "0", "-i", str(image), "-o", output,
                "--device", "cpu",
            ],
        }  # fmt: skip
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                text = measured([sys.executable, "-c", *command])[1]
                seconds[name].append(float(text.split("FIRST")[1].split()[0]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def cpu_seconds(function: Callable[[], Any], rounds: int) -> float:
    """Median CPU seconds of a call."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def stages(rounds: int) -> dict[str, Any]:
    """Acceptance ratio 2: the two replaced stages by themselves."""
    import torch
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg

    from fedcmt import ops
    from fedcmt.resampling import axis_matrix, resample

    rng = np.random.default_rng(0)
    scan = rng.normal(0, 1, (1, 160, 160, 96)).astype(np.float32)
    fine = (160, 160, 144)

    def ours() -> np.ndarray:
        axis_matrix.cache_clear()
        return resample(scan, fine)

    def stock() -> np.ndarray:
        return resample_data_or_seg(scan, fine, False, None, 3, False)

    result: dict[str, Any] = {
        "order3_ratio": cpu_seconds(stock, rounds) / cpu_seconds(ours, rounds),
        "order3_voxels_unlike": int((ours() != stock()).sum()),
        "order3_voxels": int(np.prod(fine)),
    }
    for classes, size, target in ((5, (160, 160, 96), (160, 160, 144)), (24, (128, 128, 128), (192, 192, 192))):
        logits = torch.randn(classes, *size).half()
        weights = (torch.rand(size) * 10 + 1).half()

        def fused(logits: torch.Tensor = logits, weights: torch.Tensor = weights, target: Any = target) -> np.ndarray:
            return ops.logits_to_labels(logits, target, weights=weights).numpy()

        def separate(
            logits: torch.Tensor = logits, weights: torch.Tensor = weights, target: Any = target
        ) -> np.ndarray:
            divided = torch.div(logits, weights).numpy()
            return resample_data_or_seg(divided, target, False, None, 1, False).argmax(0)

        ours_labels = fused()
        grown = extra_memory(fused)
        result[f"labels_{classes}_extra_mib"] = None if grown is None else (grown - ours_labels.nbytes) / 2**20
        result[f"labels_{classes}_ratio"] = cpu_seconds(separate, 1) / cpu_seconds(fused, rounds)
        result[f"labels_{classes}_voxels_unlike"] = int((ours_labels != separate()).sum())
    return result


def made_up(folder: Path) -> tuple[Path, Path]:
    """A model of usual size, trained for a minute, and a scan of 48 tiles for it."""
    import SimpleITK as sitk

    sys.path.insert(0, str(ROOT / "tests"))
    from stock_models import write_model

    labels = {"background": 0, **{f"label_{i}": i for i in range(1, STRUCTURES + 1)}}
    model = write_model(
        folder / "model", spacing=(1.0, 1.0, 1.0), patch_size=(64, 64, 64), features=(32, 64, 128, 256, 320),
        labels=labels, train=_train,
    )  # fmt: skip
    spacing = (1.5, 1.0, 1.0)
    image = sitk.GetImageFromArray(structures((80, 160, 160), spacing, seed=1)[0])
    image.SetSpacing(spacing[::-1])
    path = folder / "scans" / "case_0000.nii.gz"
    path.parent.mkdir()
    sitk.WriteImage(image, str(path))
    return model, path


def structures(shape: Sequence[int], spacing: Sequence[float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy scan of ellipsoids and their labels `[D, H, W]`; each label has a brightness of its own."""
    rng = np.random.default_rng(seed)
    points = np.stack(np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij"), -1)
    labels = np.zeros(shape, np.int64)
    for index in range(5 * STRUCTURES):
        centre, radii = rng.uniform(0, points[-1, -1, -1]), rng.uniform(8, 20, 3)
        labels[(((points - centre) / radii) ** 2).sum(-1) < 1] = index % STRUCTURES + 1
    return (100 * labels + rng.normal(0, 20, shape)).astype(np.float32), labels


def _train(network: Any) -> None:
    """Enough that most labels are not close calls: bfloat16 is refused where they are."""
    import torch

    scan, labels = (torch.from_numpy(x) for x in structures((96, 96, 96), (1.0, 1.0, 1.0), seed=0))
    scan = (scan - scan.mean()) / scan.std()
    optimizer, rng = torch.optim.AdamW(network.parameters(), 1e-3), np.random.default_rng(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(TRAINING_STEPS):
            corner = tuple(slice(int(start), int(start) + 32) for start in rng.integers(0, 65, 3))
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(scan[corner][None, None]), labels[corner][None])
            loss.backward()
            optimizer.step()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("-i", "--image", type=Path, help="named CASE_0000.nii.gz, alone in its folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tta", action="store_true", help="with mirroring")
    parser.add_argument("--parts", nargs="+", default=["stages", "first_tile", "programs"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, image = (options.model, options.image) if options.model else made_up(Path(folder))
        result: dict[str, Any] = {}
        if "stages" in options.parts:
            result["stages"] = stages(options.rounds)
            print(json.dumps(result["stages"], indent=2), flush=True)
        if "first_tile" in options.parts:
            result["first_tile_cpu_seconds"] = first_tile(model, image, options.rounds)
            print(json.dumps(result["first_tile_cpu_seconds"], indent=2), flush=True)
        if "programs" in options.parts:
            result["programs"] = whole_programs(model, image, options.rounds, options.tta)
            print(json.dumps(result["programs"], indent=2), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
