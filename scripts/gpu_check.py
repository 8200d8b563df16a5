"""The parts of gpu_check.sh that need Python: facts of the machine, the benchmark and the report.

usage: python scripts/gpu_check.py facts|bench|report FOLDER [--device cuda] [--elements 31000000] ...
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

COUNTS = (8, 2, 64)  # the most telling first, in case time runs out
DTYPES = (torch.float32, torch.bfloat16)
WARM_UP = 3

Work = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One operation on inputs of one kind.

    Attributes:
        moved: Bytes that it must read and write.
        native: Runs ours.
        others: The same work by other means, by name.
    """

    operation: str
    dtype: str
    count: int
    moved: int
    native: Work
    others: dict[str, Work]


class Clock:
    """Times work on one device: whole calls, and what the device did in them. On a CPU both are the wall clock's."""

    def __init__(self, device: str, repeats: int) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._repeats = repeats

    def times(self, work: Work) -> dict[str, float]:
        """Milliseconds of one call: ``call``, the median on an idle device, and ``device``, the mean of its work."""
        for _ in range(WARM_UP):
            work()
        call = statistics.median(self._once(work) for _ in range(self._repeats))
        return {"call": call, "device": self._device(work) if self._cuda else call}

    def extra_memory(self, work: Work) -> int | None:
        """Bytes that a call allocates on the GPU at its peak."""
        if not self._cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before

    def _device(self, work: Work) -> float:
        """Kernels and copies of a call, without the gaps between them, in which the host checks and launches."""
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            for _ in range(self._repeats):
                work()
            torch.cuda.synchronize()
        spent = [event.device_time for event in trace.events() if event.device_type == DeviceType.CUDA]
        return float(sum(spent)) / self._repeats / 1e3

    def _once(self, work: Work) -> float:
        if not self._cuda:
            begin = time.perf_counter()
            work()
            return (time.perf_counter() - begin) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def product_cases(rows: list[Tensor]) -> Iterator[Case]:
    """Gram matrix, against float32 mm of the stacked rows and against float64 in chunks."""
    from fedcmt import ops

    dtype, count, size = name_of(rows[0].dtype), len(rows), rows[0].numel() * rows[0].element_size()

    def stack_and_multiply() -> Tensor:
        stacked = torch.stack(rows).float()  # [N, P]
        return stacked @ stacked.T

    def native() -> Tensor:
        return ops.gramian(rows, backend="native")

    others = {"stack + mm": stack_and_multiply, "float64": lambda: ops.gramian(rows, backend="reference")}
    yield Case("gramian", dtype, count, count * size, native, others)


def update_cases(rows: list[Tensor]) -> Iterator[Case]:
    """Server steps and the weighted mean, against torch operations doing the same work."""
    from fedcmt import ops

    length, count, dtype = rows[0].numel(), len(rows), name_of(rows[0].dtype)
    read = count * length * rows[0].element_size()
    params, momentum, second = torch.zeros(3, length, device=rows[0].device)
    weights = [1.0 / count] * count

    def step(optimizer: ops.Optimizer, backend: ops.Backend) -> Work:
        adaptive: dict[str, Any] = {} if optimizer == "sgd" else {"second": second}
        return lambda: ops.server_step(
            params, momentum, rows, weights, lr=0.5, beta=0.9, optimizer=optimizer, backend=backend, **adaptive
        )

    for optimizer, state in (("sgd", 16), ("adam", 24)):
        others = {"torch": step(optimizer, "reference")}
        yield Case(f"server_step {optimizer}", dtype, count, read + state * length, step(optimizer, "native"), others)

    def mean(backend: ops.Backend) -> Work:
        return lambda: ops.weighted_mean(rows, weights, backend=backend)

    yield Case("weighted_mean", dtype, count, read + 4 * length, mean("native"), {"torch": mean("reference")})


def screen_cases(update: Tensor) -> Iterator[Case]:
    """Screening of one update, in place and while it is copied."""
    from fedcmt import ops

    def screen(into: Tensor | None, backend: ops.Backend) -> Work:
        return lambda: ops.screen(update, into=into, backend=backend)

    read = update.numel() * update.element_size()
    for label, into in (("screen", None), ("screen into bfloat16", torch.empty_like(update, dtype=torch.bfloat16))):
        moved = read + (0 if into is None else 2 * update.numel())
        yield Case(label, name_of(update.dtype), 1, moved, screen(into, "native"), {"torch": screen(into, "reference")})


def cases_for(rows: list[Tensor]) -> Iterator[Case]:
    yield from product_cases(rows)
    yield from update_cases(rows)
    if len(rows) == COUNTS[0]:
        yield from screen_cases(rows[0])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def copy_of(moved: int, device: str) -> Work:
    """A copy on the device that reads and writes as many bytes in all."""
    source, target = torch.zeros(2, moved // 2, dtype=torch.uint8, device=device)
    return lambda: target.copy_(source)


def measure(case: Case, clock: Clock, device: str) -> dict[str, Any]:
    native, copy = clock.times(case.native), clock.times(copy_of(case.moved, device))["device"]
    others = {name: clock.times(work) for name, work in case.others.items()}
    return {
        "operation": case.operation,
        "dtype": case.dtype,
        "count": case.count,
        "bytes": case.moved,
        "milliseconds": native,
        "gb_per_s": case.moved / native["device"] / 1e6,
        "copy_gb_per_s": case.moved / copy / 1e6,
        "share_of_copy": copy / native["device"],
        "others_milliseconds": others,
        "times_faster": {name: {kind: other[kind] / native[kind] for kind in native} for name, other in others.items()},
        "launches": count_launches(case.native),
        "extra_memory_bytes": clock.extra_memory(case.native),
    }


def count_launches(work: Work) -> int | None:
    """Kernels that a call launches; None where the extension has no CUDA kernels."""
    from fedcmt.ops import _native

    if not _native.has_cuda_kernels():
        return None
    _native.extension().take_launch_count()
    work()
    return int(_native.extension().take_launch_count())


def fits(count: int, length: int, dtype: torch.dtype, device: str) -> bool:
    """Whether the updates, as much again for the stacked ones in float32, and a copy's buffers find room."""
    if torch.device(device).type != "cuda":
        return True
    needed = count * length * (2 * dtype.itemsize + 4) + 24 * length
    return needed < 0.9 * torch.cuda.mem_get_info()[0]


def run_bench(folder: Path, device: str, elements: int, repeats: int, seconds: float) -> int:
    """Measures every case that fits into memory and time; fails where a case does, or where there is none."""
    clock, deadline = Clock(device, repeats), time.monotonic() + seconds
    bench = Bench(folder / "bench.json", elements, repeats)
    for count, dtype in ((count, dtype) for count in COUNTS for dtype in DTYPES):
        label = f"{name_of(dtype)}, N = {count}"
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
        if not fits(count, elements, dtype, device):
            bench.skipped.append(f"{label}: too large for this GPU's memory")
            continue
        updates = [torch.randn(elements, device=device).to(dtype) for _ in range(count)]
        for case in cases_for(updates):
            if time.monotonic() > deadline:
                bench.skipped.append(f"{case.operation}, {label}: out of time")
                continue
            try:
                bench.rows.append(measure(case, clock, device))
                print(describe(bench.rows[-1]), flush=True)
            except RuntimeError as error:
                bench.errors.append(f"{case.operation}, {label}: {error}")
                print(f"FAILED {bench.errors[-1]}", flush=True)
            bench.write()
    bench.write()
    return 0 if bench.rows and not bench.errors else 1


@dataclass
class Bench:
    """What was measured so far; written after each case, so that a stop loses nothing."""

    path: Path
    elements: int
    repeats: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def write(self) -> None:
        content = {name: value for name, value in vars(self).items() if name != "path"}
        self.path.write_text(json.dumps(content, indent=2))


def describe(row: dict[str, Any]) -> str:
    """One line of the table."""
    others = [f"{name} {times['device']:.1f} ({times['call']:.1f})" for name, times in row["times_faster"].items()]
    extra = row["extra_memory_bytes"]
    cells = [
        row["operation"],
        row["dtype"],
        row["count"],
        f"{row['milliseconds']['device']:.3f}",
        f"{row['milliseconds']['call']:.3f}",
        f"{row['gb_per_s']:.0f}",
        f"{row['share_of_copy']:.0%}",
        ", ".join(others),
        "-" if row["launches"] is None else row["launches"],
        "-" if extra is None else f"{extra / 1e6:.2f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


EXPLANATION = """`device`: mean of a call's kernels and copies. `call`: median of
whole calls on an idle device, checks and launches on the host among them. `of copy`: on the device, against a copy that
moves as many bytes. `times faster than`: on the device, and whole calls in brackets."""
HEADER = """| operation | updates | N | device ms | call ms | GB/s | of copy | times faster than | launches | extra MB |
|---|---|---|---|---|---|---|---|---|---|"""


def write_facts(folder: Path, device: str) -> int:
    """Versions of what is used, and the GPU; fails where a GPU is wanted and torch sees none."""
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    facts["cuda"] = torch.version.cuda
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    (folder / "facts.json").write_text(json.dumps(facts, indent=2))
    print(json.dumps(facts))
    missing = torch.device(device).type == "cuda" and not torch.cuda.is_available()
    if missing:
        print("torch sees no GPU")
    return 1 if missing else 0


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def write_report(folder: Path) -> int:
    """Joins steps.tsv, facts, bench and data.json into gpu_check.json and gpu_check.md; fails where a step has."""
    lines = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
    steps = [{"name": name, "result": result, "seconds": int(seconds)} for name, result, seconds in lines]
    facts, bench = read_json(folder / "facts.json"), read_json(folder / "bench.json")
    data = read_json(folder / "data.json")
    joined = {"facts": facts, "steps": steps, "bench": bench, "data": data}
    (folder / "gpu_check.json").write_text(json.dumps(joined, indent=2))
    lines = [*report_lines(facts, steps, bench), *data_lines(data)]
    (folder / "gpu_check.md").write_text("\n".join(lines) + "\n")
    return 1 if any(step["result"] == "failed" for step in steps) else 0


def report_lines(facts: dict[str, Any], steps: Sequence[dict[str, Any]], bench: dict[str, Any]) -> Iterator[str]:
    yield f"# GPU check: {facts.get('gpu', 'dry run on a CPU, whose times mean nothing')}"
    yield ", ".join(f"{name} {value}" for name, value in facts.items())
    yield "\n| step | result | s |\n|---|---|---|"
    yield from (f"| {step['name']} | {step['result']} | {step['seconds']} |" for step in steps)
    if bench:
        yield f"\n{bench['elements']:,} elements an update, {bench['repeats']} calls. {EXPLANATION}\n"
        yield HEADER
        yield from map(describe, bench["rows"])
        yield from (f"\nFailed: {error}" for error in bench["errors"])
        yield from (f"\nNot measured: {reason}" for reason in bench["skipped"])


def data_lines(data: dict[str, Any]) -> Iterator[str]:
    """What gpu_data.py found."""
    if data:
        yield "\n| patches by DALI |  |\n|---|---|"
        yield from (f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in data.items())


def main() -> int:
    parser = argparse.ArgumentParser(description="Facts, benchmark and report of the GPU check.")
    parser.add_argument("action", choices=["facts", "bench", "report"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--elements", type=int, default=31_000_000)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=90.0, help="start no measurement after this time")
    arguments = parser.parse_args()
    if arguments.action == "facts":
        return write_facts(arguments.folder, arguments.device)
    if arguments.action == "report":
        return write_report(arguments.folder)
    return run_bench(arguments.folder, arguments.device, arguments.elements, arguments.repeats, arguments.seconds)


if __name__ == "__main__":
    raise SystemExit(main())
