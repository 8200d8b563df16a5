"""The DALI backend on a GPU: parity with torch, hand-over without a copy, how long a trainer waits for patches.

usage: python scripts/gpu_data.py FOLDER [--device cuda] [--size 128] [--channels 2] [--batches 60] [--parity 24]

Cases are made up in memory, so that reading is no part of it. Results: data.json in the folder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcmt.data import dali
from fedcmt.data.geometry import Reading, reading
from fedcmt.data.readahead import ReadAhead
from fedcmt.data.sampling import PatchRules, draw_patch
from fedcmt.data.source import Case
from fedcmt.data.targets import TargetRules
from fedcmt.data.torch_pipeline import Batch, PatchSource, TorchMaker

TOLERANCE = 2e-4  # of the standard deviation: the table in docs/data.md
LIMITS_OF_ZERO = ("unequal_target_voxels", "copied_tensors", "overwritten_batches")


class MadeCases:
    """Stands for a CaseReader: two cases of noise on a gradient, with three labels."""

    def __init__(self, rules: PatchRules) -> None:
        shape = tuple(3 * n // 2 for n in rules.initial_size)
        self._cases = {}
        for seed, name in enumerate(("one", "two")):
            rng = np.random.default_rng(seed)
            ramp = np.linspace(-1, 1, shape[2], dtype=np.float32)
            image = 0.3 * rng.standard_normal((rules.channels, *shape), np.float32) + ramp
            labels = np.broadcast_to(np.digitize(ramp, (-0.3, 0.4)).astype(np.int16), shape).copy()
            voxels: Mapping[int, np.ndarray] = {
                label: np.argwhere(labels == label)[::997].astype(np.int32) for label in (1, 2)
            }
            self._cases[name] = Case(image, labels[None], voxels, ())

    def case(self, name: str) -> Case:
        return self._cases[name]

    def read(self, name: str, part: Reading) -> tuple[np.ndarray, np.ndarray]:
        """As CaseReader.read: 0 and -1 where the part reaches beyond the case."""
        case = self._cases[name]
        image = np.zeros((len(case.image), *part.size), np.float32)
        labels = np.full(part.size, -1, np.int16)
        ends = [low + n for low, n in zip(part.corner, part.size, strict=True)]
        inside = [slice(max(low, 0), min(end, n)) for low, end, n in zip(part.corner, ends, case.shape, strict=True)]
        place = tuple(slice(s.start - low, s.stop - low) for s, low in zip(inside, part.corner, strict=True))
        image[(slice(None), *place)] = case.image[(slice(None), *inside)]
        labels[place] = case.labels[0][tuple(inside)]
        return image, labels


def client(size: int, channels: int) -> PatchSource:
    patch, region, half = (size,) * 3, (3 * size // 2,) * 3, (size // 2,) * 3
    rules = PatchRules(patch, region, channels, 2, 0.33, None, True, False, False, np.pi / 6, (0, 1, 2))
    return PatchSource("check", Path(), ("one", "two"), rules, TargetRules((patch, half), True, None, ()))


def generator(index: int) -> np.random.Generator:
    return np.random.default_rng((11, index))


def make_maker(source: PatchSource, cases: MadeCases, device: torch.device, ahead: int) -> dali.DaliMaker:
    reader: Any = cases
    return dali.DaliMaker(source, reader, generator, device, ahead)


def parity(source: PatchSource, cases: MadeCases, device: torch.device, batches: int) -> dict[str, float]:
    """DALI's batches on the device against the torch backend's of the same draws, in torch on the CPU."""
    reader: Any = cases
    makers = make_maker(source, cases, device, 2), TorchMaker(source, reader, generator, False)
    error, wrong = 0.0, 0
    for index in range(batches):
        there, here = (maker.make(index) for maker in makers)
        error = max(error, float((there.data.cpu() - here.data).abs().max() / here.data.std()))
        wrong += sum(int((a.cpu() != b).sum()) for a, b in zip(there.target, here.target, strict=True))
    return {"largest_error": error, "unequal_target_voxels": wrong}


def copies(source: PatchSource, cases: MadeCases, device: torch.device) -> int:
    """Tensors of a batch that do not lie where DALI wrote them; and a batch in use has to stay as it is."""
    pipeline = dali.build(source.rules, source.targets, device)
    samples = []
    for index in range(source.rules.batch_size):
        draws = draw_patch(generator(index), index, source.rules, source.cases, cases.case)
        part = reading(draws, source.rules)
        samples.append(dali.sample_inputs(*cases.read(draws.case, part), part, draws, source.rules, source.targets))
    buffers = [o.as_tensor() for o in pipeline.run(**{name: [s[name] for s in samples] for name in samples[0]})]
    tensors = [torch.from_dlpack(buffer) for buffer in buffers]
    return sum(t.data_ptr() != buffer.data_ptr() for t, buffer in zip(tensors, buffers, strict=True))


def overwritten(source: PatchSource, cases: MadeCases, device: torch.device) -> int:
    """Batches, held like a trainer holds them, that later batches wrote over."""
    maker = make_maker(source, cases, device, 1)
    before, kept, changed = maker.make(0), None, 0
    for index in range(1, 9):
        kept = before.data.clone()
        after = maker.make(index)
        changed += not torch.equal(kept, before.data)
        before = after
    return changed


class Step:
    """Stands for a training step: convolutions forwards and backwards."""

    def __init__(self, channels: int, device: torch.device) -> None:
        widths = (channels, 32, 32, 64)
        layers = [torch.nn.Conv3d(a, b, 3, padding=1) for a, b in pairwise(widths)]
        self._network = torch.nn.Sequential(*layers).to(device)
        self._device = device

    def __call__(self, data: Tensor) -> None:
        self._network(data).square().mean().backward()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def stall(source: PatchSource, cases: MadeCases, device: torch.device, batches: int, threads: int) -> dict[str, float]:
    """Share of the time that a trainer waits for patches, and patches a second without a trainer."""
    step, ahead = Step(source.rules.channels, device), max(2, threads)
    figures = {}
    for name, work in (("training", step), ("alone", None)):
        first = 3  # start of the pipelines and choice of algorithms
        items: ReadAhead[Batch] = ReadAhead(
            lambda: make_maker(source, cases, device, ahead),
            first=0, count=batches + first, threads=threads, ahead=ahead, timeout=60.0,
        )  # fmt: skip
        with items:
            for number, batch in enumerate(items):
                if number == first:
                    begin, waited = time.perf_counter(), items.seconds_waited
                if work is not None:
                    work(batch.data)
        seconds = time.perf_counter() - begin
        figures[f"patches_per_second_{name}"] = (batches - 1) * source.rules.batch_size / seconds
        if work is not None:
            figures["waited_share"] = (items.seconds_waited - waited) / seconds
            figures["milliseconds_waited_a_batch"] = 1e3 * (items.seconds_waited - waited) / batches
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks the DALI backend on a GPU.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--channels", type=int, default=2)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--parity", type=int, default=24, help="batches compared with the torch backend's")
    parser.add_argument("--threads", type=int, default=4)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    source = client(arguments.size, arguments.channels)
    cases = MadeCases(source.rules)
    found: dict[str, Any] = parity(source, cases, device, arguments.parity)
    found["copied_tensors"] = copies(source, cases, device)
    found["overwritten_batches"] = overwritten(source, cases, device)
    found |= stall(source, cases, device, arguments.batches, arguments.threads)
    found |= {"size": arguments.size, "channels": arguments.channels, "threads": arguments.threads}
    (arguments.folder / "data.json").write_text(json.dumps(found, indent=2))
    limits = {"largest_error": TOLERANCE} | dict.fromkeys(LIMITS_OF_ZERO, 0)
    wrong = [
        f"{name} should be {most} at most. Got {found[name]}"
        for name, most in limits.items()
        if not found[name] <= most
    ]
    print(json.dumps(found))
    print("\n".join(f"FAILED {line}" for line in wrong) or "no failures")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
