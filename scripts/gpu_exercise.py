"""Calls every operation on small inputs, on each of its code paths, and compares with the torch definitions.

Needs torch and fedcmt.ops only, so that it runs under compute-sanitizer, where pytest would take minutes.

usage: python scripts/gpu_exercise.py [--device cuda] [--seed 0] [--once]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedcmt import ops
from fedcmt.ops import _native

# One row, both sides of the register kernels' limits, and more rows than a tile or a launch holds.
COUNTS = (1, 2, 3, 8, 9, 16, 17, 33, 64, 65)
LENGTHS = (0, 1, 1023, 9001)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Channels, source and patch.
PATCHES = ((1, (9, 20, 33), (8, 15, 40)), (3, (1, 12, 13), (1, 9, 17)), (2, (7, 1, 5), (4, 3, 1)))
OPTIMIZERS: tuple[ops.Optimizer, ...] = ("sgd", "adam", "yogi", "adagrad")


# A call runs an operation on a device with a backend, and returns all that it produced.
Call = Callable[[str, ops.Backend], Any]
# The same tensors on each device.
Rows = dict[str, list[Tensor]]


@dataclass
class Exercise:
    """Runs calls natively on a device and by their torch definition on the CPU, on equal inputs.

    Attributes:
        once: Make one native call and compare nothing: enough for a sanitizer.
        calls: Calls so far.
        failures: One line for each that went wrong.
    """

    device: str
    generator: torch.Generator
    once: bool = False
    calls: int = 0
    failures: list[str] = field(default_factory=list)

    def random(self, length: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
        """Values around 0 on the CPU, in a view that starts `offset` elements behind an aligned address."""
        return torch.randn(offset + length, generator=self.generator).to(dtype)[offset:]

    def rows(self, count: int, length: int, dtype: torch.dtype, offset: int = 0) -> Rows:
        rows = [self.random(length, dtype, offset * (i % 3)) for i in range(count)]
        return {device: [place(row, device) for row in rows] for device in {"cpu", self.device}}

    def compare(self, label: str, call: Call, tolerance: float) -> None:
        """Native results should be close to the definition's, and equal bit for bit in two calls."""
        self.calls += 1
        try:
            first, *others = [as_tensors(call(self.device, "native")) for _ in range(1 if self.once else 2)]
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            self.failures.append(f"{label}: {type(error).__name__}: {error}")
            return
        if self.once:
            return
        if not all(map(torch.equal, first, others[0])):
            self.failures.append(f"{label}: two calls differ")
        for found, wanted in zip(first, as_tensors(call("cpu", "reference")), strict=True):
            scale = float(wanted.abs().max()) if wanted.numel() else 0.0
            off = float((found - wanted).abs().max()) if wanted.numel() else 0.0
            if not off <= tolerance * (1.0 + scale):  # also where it is NaN
                self.failures.append(f"{label}: off by {off:.3g}, largest value {scale:.3g}")


def place(tensor: Tensor, device: str) -> Tensor:
    """A copy on a device at an address of the same alignment."""
    offset = tensor.storage_offset()
    copy = torch.empty(offset + tensor.numel(), dtype=tensor.dtype, device=device)[offset:]
    return copy.copy_(tensor)


def as_tensors(result: Any) -> list[Tensor]:
    """Everything in a result as float64 tensors on the CPU."""
    if isinstance(result, Tensor):
        return [result.double().cpu()]
    if isinstance(result, (list, tuple)):
        return [tensor for part in result for tensor in as_tensors(part)]
    if hasattr(result, "__dataclass_fields__"):
        return as_tensors([getattr(result, name) for name in result.__dataclass_fields__])
    return [torch.tensor([float(result)], dtype=torch.float64)]


def bounds_of(length: int) -> list[int]:
    """Three segments, one of them empty, with borders at odd places."""
    return [0, length // 3, length // 3, length]


def exercise_products(run: Exercise, rows: Rows, label: str) -> None:
    segments = bounds_of(rows["cpu"][0].numel())
    gram = ops.gramian(rows["cpu"], backend="reference")

    def append(device: str, backend: ops.Backend) -> Tensor:
        *before, last = rows[device]
        return ops.gramian_append(gram[:-1, :-1].to(device) if before else None, before, last, backend=backend)

    run.compare(f"gramian {label}", lambda device, b: ops.gramian(rows[device], backend=b), 1e-10)
    run.compare(
        f"gramian by segments {label}", lambda device, b: ops.gramian(rows[device], segments=segments, backend=b), 1e-10
    )
    run.compare(f"gramian_append {label}", append, 1e-10)
    run.compare(f"project_conflicts {label}", lambda device, b: ops.project_conflicts(gram.to(device), backend=b), 1e-8)


def exercise_step(
    run: Exercise, rows: Rows, label: str, optimizer: ops.Optimizer, targets: int, split: bool, offset: int
) -> None:
    length, count = rows["cpu"][0].numel(), len(rows["cpu"])
    segments = bounds_of(length) if split else None
    weights = torch.rand(targets, *([3] if split else []), count, generator=run.generator)
    state = [[run.random(length, offset=offset) for _ in range(targets)] for _ in range(3)]
    for second in state[2]:
        second.square_().add_(0.1)

    def step(device: str, backend: ops.Backend) -> list[Any]:
        params, momentum, second = [[place(value, device) for value in values] for values in state]
        adaptive: dict[str, Any] = {} if optimizer == "sgd" else {"second": second}
        stats = ops.server_step(
            params, momentum, rows[device], weights, lr=0.1, beta=0.9, optimizer=optimizer,
            segments=segments, backend=backend, **adaptive,
        )  # fmt: skip
        return [params, momentum, second, stats]

    kind = f"{optimizer}, {targets} targets{', by segments' if split else ''}"
    run.compare(f"server_step {kind} {label}", step, 2e-5)


def exercise_means(run: Exercise, rows: Rows, label: str) -> None:
    count = len(rows["cpu"])
    weights = torch.rand(count, generator=run.generator) + 0.1
    masks = torch.zeros(3, count, dtype=torch.bool)
    masks[0], masks[1, ::2], masks[2, -1] = True, True, True
    for name, groups in (("all", None), ("groups", masks)):

        def mean(device: str, backend: ops.Backend, groups: Tensor | None = groups) -> Any:
            return ops.weighted_mean(rows[device], weights, groups, backend=backend)

        run.compare(f"weighted_mean of {name} {label}", mean, 2e-5)


def exercise_screen(run: Exercise, length: int, dtype: torch.dtype, offset: int) -> None:
    update = run.random(length, dtype, offset)
    if length > 2:
        update[length // 2], update[-1] = float("nan"), float("inf")
    for rest in (None, *DTYPES):

        def screen(device: str, backend: ops.Backend, rest: torch.dtype | None = rest) -> list[Any]:
            into = None if rest is None else torch.zeros(length, dtype=rest, device=device)
            stats = ops.screen(place(update, device), into=into, backend=backend)
            return [stats, [] if into is None else torch.nan_to_num(into.float(), nan=1e6, posinf=2e6)]

        run.compare(f"screen {dtype} into {rest}, P = {length}, offset {offset}", screen, 1e-5)


def exercise_all(run: Exercise) -> None:
    for dtype in DTYPES:
        for count in COUNTS:
            for length, offset in ((1023, 0), (1023, 1)):
                rows = run.rows(count, length, dtype, offset)
                label = f"{dtype}, N = {count}, P = {length}, offset {offset}"
                exercise_products(run, rows, label)
                exercise_means(run, rows, label)
                exercise_step(run, rows, label, "sgd", 1, False, offset)
        for length in LENGTHS:
            rows = run.rows(3, length, dtype)
            label = f"{dtype}, N = 3, P = {length}"
            exercise_products(run, rows, label)
            exercise_means(run, rows, label)
            for optimizer in OPTIMIZERS:
                exercise_step(run, rows, label, optimizer, 1, False, 0)
                exercise_step(run, rows, label, optimizer, 3, True, 0)
            for offset in (0, 1):
                exercise_screen(run, length, dtype, offset)


def exercise_warp(run: Exercise, image: Tensor, labels: Tensor, affine: Any, shape: Sequence[int]) -> None:
    """Equal bit for bit, so without any tolerance."""

    def warp(device: str, backend: ops.Backend) -> Any:
        return ops.warp_patch(image.to(device), labels.to(device), affine, shape, backend=backend)

    run.compare(f"warp_patch {tuple(image.shape)} to {tuple(shape)}", warp, 0.0)


def exercise_intensities(run: Exercise, image: Tensor, name: str, changes: dict[str, Any]) -> None:
    def change(device: str, backend: ops.Backend) -> Tensor:
        changed = image.clone().to(device)
        ops.change_intensities(changed, backend=backend, **changes)
        return changed

    run.compare(f"change_intensities {name} {tuple(image.shape)}", change, 1e-4)


def exercise_patches(run: Exercise) -> None:
    """Odd sizes, single voxels, several channels."""
    for channels, source, shape in PATCHES:
        image = run.random(channels * math.prod(source)).reshape(channels, *source)
        labels = torch.randint(-1, 4, (1, *source), generator=run.generator).to(torch.int16)
        for turn in (None, rotation(run)):
            exercise_warp(run, image, labels, ops.patch_affine(turn, source, shape, (2,)), shape)
        for name, changes in intensity_changes(channels, source).items():
            exercise_intensities(run, image, name, changes)


def rotation(run: Exercise) -> Any:
    """A little turn about every axis, and a scale."""
    skew = torch.randn(3, 3, generator=run.generator, dtype=torch.float64) * 0.2
    return 1.1 * torch.matrix_exp(skew - skew.T).numpy()


def intensity_changes(channels: int, shape: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Each change alone, then all of them."""
    size = [max(1, n * 2 // 3) for n in shape]
    changes: dict[str, dict[str, Any]] = {
        "noise": {"noise": 0.1, "noise_seed": 5},
        "blur": {"blur": [(0.7, 0.9, 0.5)] * channels},
        "brightness": {"brightness": [1.2] * channels},
        "contrast": {"contrast": [0.8] * channels},
        "low resolution": {"low_resolution": [size] * channels, "mirrored_axes": (1,)},
        "gamma inverted": {"gamma_inverted": [0.8] * channels},
        "gamma": {"gamma": [1.4] * channels},
    }
    return changes | {"all": {name: value for change in changes.values() for name, value in change.items()}}


def exercise_launches(run: Exercise) -> None:
    """A whole step, Gram matrix and update, takes at most 3 launches up to 8 rows."""
    if not _native.has_cuda_kernels():
        return
    extension = _native.extension()
    for dtype in DTYPES:
        for count in range(1, 9):
            rows = run.rows(count, 4096, dtype)[run.device]
            params, momentum = torch.zeros(2, 4096, device=run.device)
            extension.take_launch_count()
            ops.gramian(rows, backend="native")
            ops.server_step(params, momentum, rows, [1.0] * count, lr=0.1, beta=0.9, backend="native")
            launches = extension.take_launch_count()
            if not 1 <= launches <= 3:
                run.failures.append(f"{dtype}, N = {count}: {launches} launches for a whole step")


def main() -> int:
    parser = argparse.ArgumentParser(description="Calls every operation on small inputs.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--once", action="store_true", help="one call each and nothing compared, for sanitizers")
    arguments = parser.parse_args()
    print(f"fedcmt.ops: {ops.backend_info()}")
    run = Exercise(arguments.device, torch.Generator().manual_seed(arguments.seed), arguments.once)
    exercise_all(run)
    exercise_patches(run)
    exercise_launches(run)
    for failure in run.failures[:40]:
        print(f"FAILED {failure}")
    print(f"{run.calls} calls{'' if run.once else ' compared'}, {len(run.failures)} failures")
    return 1 if run.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
