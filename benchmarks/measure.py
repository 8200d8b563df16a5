"""Contenders measured side by side: one call of each in every cycle, so that noise meets all alike."""

from __future__ import annotations

import functools
import gc
import importlib.util
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedcmt import ops
from fedcmt.allocator import give_back_freed_blocks

Work = Callable[[], object]
Role = Literal["ours", "other", "floor", "peak"]
_WARM_UP = 1


class Inputs:
    """N updates of P elements and the server's state, each made when it is first asked for.

    The updates share a direction, as those of clients do; all seeds are fixed.
    """

    def __init__(self, count: int, length: int) -> None:
        self.count, self.length = count, length
        self.weights = [1.0 / count] * count
        self._rows: dict[torch.dtype, list[Tensor]] = {}
        self._stacked: dict[torch.dtype, Tensor] = {}
        self._state: list[Tensor] = []

    def rows(self, dtype: torch.dtype) -> Sequence[Tensor]:
        """The updates  # N x [P]"""
        if dtype not in self._rows:
            self._rows[dtype] = [ops.empty_buffer(self.length, dtype).copy_(row) for row in self.made_rows()]
        return self._rows[dtype]

    def made_rows(self) -> Iterator[Tensor]:
        """The updates in float32, one after the other  # N x [P]"""
        common = torch.randn(self.length, generator=torch.Generator().manual_seed(0))
        for i in range(self.count):
            row = torch.randn(self.length, generator=torch.Generator().manual_seed(i + 1))
            yield row.add_(common, alpha=0.3).mul_(1e-2)

    def stacked(self, dtype: torch.dtype) -> Tensor:
        """The updates as one matrix  # [N, P]"""
        if dtype not in self._stacked:
            matrix = ops.empty_buffer(self.count * self.length, dtype).view(self.count, self.length)
            self._stacked[dtype] = torch.stack(list(self.rows(dtype)), out=matrix)
        return self._stacked[dtype]

    def state(self, number: int) -> list[Tensor]:
        """Float32 vectors of the server: parameters, momentum and so on  # number x [P]"""
        while len(self._state) < number:
            self._state.append(ops.empty_buffer(self.length).fill_(1e-3))
        return self._state[:number]


@dataclass(frozen=True)
class Contender:
    """One way to do an operation.

    Attributes:
        name: What it is.
        role: Ours, another's, the floor of its dtype and threads, or the machine's peak of arithmetic.
        dtype: Of the updates.
        amount: Bytes that the operation has to read and write; for the peak, its multiply-adds.
        prepare: Makes the work from the inputs, outside of what is measured.
        threads: Threads it may use.
        requires: Packages without which it is left out.
    """

    name: str
    role: Role
    dtype: torch.dtype
    amount: int
    prepare: Callable[[Any], Work]
    threads: int = 1
    requires: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.name}, {short(self.dtype)}, {self.threads} thread{'s' * (self.threads > 1)}"

    @property
    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        return [package for package in self.requires if importlib.util.find_spec(package) is None]


@dataclass(frozen=True)
class Group:
    """Contenders that are measured side by side.

    Attributes:
        name: Of the operation.
        count: N.
        length: P.
        contenders: In the order of the table.
        products: Multiply-adds of the operation, where they may bound it.
        make_inputs: Of N and P.
        cycles: At most so many cycles.
    """

    name: str
    count: int
    length: int
    contenders: tuple[Contender, ...]
    products: int | None = None
    make_inputs: Callable[[int, int], Inputs] = Inputs
    cycles: int | None = None


@dataclass
class Timings:
    """Seconds of each call, cycle by cycle.

    Attributes:
        wall: By the wall clock.
        cpu: Of the calling thread; only for one thread.
        extra_memory: Growth of the resident memory during a call at its peak, bytes; None where unknown.
        variant: Which variant was used, where there are several.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    extra_memory: int | None = None
    variant: str = ""


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(group: Group, cycles: int) -> dict[str, Timings]:
    """Times the contenders that are installed, by label."""
    inputs = _inputs(group.make_inputs, group.count, group.length)
    contenders = [c for c in group.contenders if not c.missing]
    threads = torch.get_num_threads()
    try:
        works = {}
        for contender in contenders:
            torch.set_num_threads(contender.threads)
            works[contender.label] = contender.prepare(inputs)
        results = {label: Timings(variant=getattr(work, "variant", "")) for label, work in works.items()}
        _run_cycles(contenders, works, results, min(cycles, group.cycles or cycles))
        for contender in contenders:
            torch.set_num_threads(contender.threads)
            results[contender.label].extra_memory = extra_memory(works[contender.label])
        return results
    finally:
        torch.set_num_threads(threads)


@functools.lru_cache(maxsize=1)
def _inputs(make_inputs: Callable[[int, int], Inputs], count: int, length: int) -> Inputs:
    """Groups of the same N and P in succession share their inputs."""
    return make_inputs(count, length)


def _run_cycles(contenders: list[Contender], works: dict[str, Work], results: dict[str, Timings], cycles: int) -> None:
    """Each cycle in another order: what ran before must not favour the same one each time."""
    order = random.Random(0)
    gc.disable()
    try:
        for cycle in range(-_WARM_UP, cycles):
            for contender in order.sample(contenders, len(contenders)):
                torch.set_num_threads(contender.threads)
                wall, cpu = _timed(works[contender.label])
                if cycle >= 0:
                    results[contender.label].wall.append(wall)
                    results[contender.label].cpu.append(cpu)
            gc.collect()
    finally:
        gc.enable()


def _timed(work: Work) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.thread_time()
    result = work()
    seconds = time.perf_counter() - wall, time.thread_time() - cpu
    del result  # freeing is not the operation's work
    return seconds


def extra_memory(work: Work) -> int | None:
    """Bytes by which the resident memory grows during a call, at its peak; None where Linux's counters are missing."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    gc.collect()
    give_back_freed_blocks()  # what the allocator kept would hide growth
    clear.write_text("5")  # the peak is the present
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def facts(group: Group, results: dict[str, Timings], contender: Contender) -> dict[str, Any]:
    """What is reported of a contender beside its times; ratios are medians of those of the cycles."""
    own = results[contender.label]
    found: dict[str, Any] = {
        "role": contender.role, "name": contender.name, "dtype": short(contender.dtype), "threads": contender.threads,
        "N": group.count, "D": group.length, "bytes": contender.amount, "cycles": len(own.wall),
        "extra_memory": own.extra_memory, "variant": own.variant,
        "cpu_median": statistics.median(own.cpu) if contender.threads == 1 else None,
    }  # fmt: skip
    median = statistics.median(own.wall)
    if contender.role == "peak":
        return found | {"products_per_second": contender.amount / median}
    found["gigabytes_per_second"] = contender.amount / median / 1e9
    ours, floor = (_rival(group, contender, role) for role in ("ours", "floor"))
    if floor is not None and contender.amount == floor.amount:  # less work has another floor
        found["share_of_floor"] = ratio(results[floor.label], own)
    if ours is not None and contender.role == "other":
        found["times_ours"] = ratio(own, results[ours.label])
    if contender.role == "ours":
        found["times"] = {label: ratio(other, own) for label, other in results.items()}
        found |= _bound(group, results, contender)
    return found


def ratio(numerator: Timings, denominator: Timings) -> dict[str, float | None]:
    """Medians over the cycles, by wall clock and by CPU time (the latter for one thread each)."""

    def median(above: list[float], below: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(above, below, strict=True))

    return {"wall": median(numerator.wall, denominator.wall), "cpu": median(numerator.cpu, denominator.cpu)}


def _rival(group: Group, contender: Contender, role: Role) -> Contender | None:
    """The contender of a role with the same dtype and threads."""
    same = [c for c in group.contenders if (c.role, c.dtype, c.threads) == (role, contender.dtype, contender.threads)]
    return same[0] if same else None


def _bound(group: Group, results: dict[str, Timings], contender: Contender) -> dict[str, Any]:
    """What bounds the operation, memory or arithmetic, and the share of the bound that is reached."""
    peaks = [c for c in group.contenders if c.role == "peak"]
    lowest = _rival(group, contender, "floor")
    if group.products is None or not peaks or lowest is None:
        return {}
    own, peak, floor = (results[c.label] for c in (contender, peaks[0], lowest))
    arithmetic = [seconds * group.products / peaks[0].amount for seconds in peak.wall]
    bounds = [max(pair) for pair in zip(arithmetic, floor.wall, strict=True)]
    memory_bound = statistics.median(floor.wall) >= statistics.median(arithmetic)
    return {
        "memory_bound_s": statistics.median(floor.wall),
        "arithmetic_bound_s": statistics.median(arithmetic),
        "bound_by": "memory" if memory_bound else "arithmetic",
        "share_of_bound": statistics.median(b / s for b, s in zip(bounds, own.wall, strict=True)),
    }
