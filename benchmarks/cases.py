"""Which operations are measured, on what, against whom. Ours are always native: there is no fallback here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import baselines
import torch
from floor import Floor
from mapped import MappedInputs, read_files
from measure import Contender, Group, Inputs, Work
from torch import Tensor

from fedcmt import ops
from fedcmt.strategies.conflict_averse import cagrad_weights

F32, BF16 = torch.float32, torch.bfloat16
CLIENTS, TARGETS, SEGMENTS = 8, 4, 100
FULL_CLIENTS, FULL_LENGTH = 64, 50_000_000
STATE = 2  # vectors that a step with momentum reads and writes: parameters and momentum


class Prepare(Protocol):
    """Makes the work from the inputs."""

    def __call__(self, inputs: Any, dtype: torch.dtype) -> Work: ...


def all_groups(elements: int, full_mapped: bool = False) -> list[Group]:
    """Every group. `elements` is the length of 8 updates; other numbers of updates hold as many bytes."""
    return [
        read_floor(elements),
        gramian_of_eight(elements),
        step_of_eight(elements),
        whole_step_of_eight(elements),
        *new_operations(elements),
        *(gramian_of_many(count, CLIENTS * elements // count) for count in (8, 2, 16, 64)),  # 8 first: the same inputs
        mapped("mapped files", CLIENTS, elements),
        *([mapped("mapped files, 12.8 GB", FULL_CLIENTS, FULL_LENGTH, cycles=3)] if full_mapped else []),
    ]


# Ours


def gramian(inputs: Inputs, dtype: torch.dtype, segments: Sequence[int] | None = None) -> Work:
    rows = inputs.rows(dtype)
    return lambda: ops.gramian(rows, segments=segments, backend="native")


def gramian_append(inputs: Inputs, dtype: torch.dtype) -> Work:
    *rows, last = inputs.rows(dtype)
    gram = ops.gramian(rows, backend="native")
    return lambda: ops.gramian_append(gram, rows, last, backend="native")


def server_step(inputs: Inputs, dtype: torch.dtype, segments: Sequence[int] | None = None) -> Work:
    rows, (params, momentum) = inputs.rows(dtype), inputs.state(2)
    weights = inputs.weights if segments is None else [inputs.weights] * (len(segments) - 1)
    return lambda: ops.server_step(
        params, momentum, rows, weights, lr=baselines.LR, beta=baselines.BETA, segments=segments, backend="native"
    )


def adam_step(inputs: Inputs, dtype: torch.dtype) -> Work:
    rows, (params, momentum, second) = inputs.rows(dtype), inputs.state(3)
    return lambda: ops.server_step(
        params, momentum, rows, inputs.weights, lr=baselines.LR, beta=baselines.BETA, optimizer="adam", second=second,
        backend="native",
    )  # fmt: skip


def personal_step(inputs: Inputs, dtype: torch.dtype) -> Work:
    rows, state = inputs.rows(dtype), inputs.state(2 * TARGETS)
    weights = torch.tensor([inputs.weights] * TARGETS, dtype=torch.float64)
    return lambda: ops.server_step(
        state[::2], state[1::2], rows, weights, lr=baselines.LR, beta=baselines.BETA, backend="native"
    )


def whole_step(inputs: Inputs, dtype: torch.dtype) -> Work:
    """Gram matrix, CAGrad's solution, step."""
    rows, (params, momentum) = inputs.rows(dtype), inputs.state(2)
    mean = torch.tensor(inputs.weights, dtype=torch.float64)

    def work() -> ops.StepStats:
        gram = ops.gramian(rows, backend="native")
        weights = cagrad_weights(gram, mean, baselines.CONFLICT_AVERSION)
        return ops.server_step(params, momentum, rows, weights, lr=baselines.LR, beta=baselines.BETA, backend="native")

    return work


def weighted_mean(inputs: Inputs, dtype: torch.dtype) -> Work:
    rows = inputs.rows(dtype)
    return lambda: ops.weighted_mean(rows, inputs.weights, backend="native")


def screen(inputs: Inputs, dtype: torch.dtype, into: torch.dtype | None = None) -> Work:
    row = inputs.rows(dtype)[0]
    target = None if into is None else torch.empty_like(row, dtype=into)
    return lambda: ops.screen(row, into=target, backend="native")


# Groups


def floor(
    dtype: torch.dtype,
    length: int,
    count: int = CLIENTS,
    updates: int = 0,
    writes: Sequence[torch.dtype] = (),
    threads: int = 1,
    passes: int = 1,
) -> Contender:
    """Reads each byte of `count` updates in each pass; in the last, reads and writes `updates` vectors of state."""

    def prepare(inputs: Inputs) -> Work:
        rows = list(inputs.rows(dtype))[:count]
        written = [torch.empty(length, dtype=target) for target in writes]
        last = Floor(rows, inputs.state(updates), written, threads)
        return last if passes == 1 else _Passes(Floor(rows, threads=threads), last)

    name = "floor: each byte once" if passes == 1 else "floor: both passes"
    amount = moved(length, dtype, count, updates, passes) + length * sum(target.itemsize for target in writes)
    return Contender(name, "floor", dtype, amount, prepare, threads)


class _Passes:
    """One floor after the other."""

    def __init__(self, *floors: Floor) -> None:
        self._floors = floors
        self.variant = "; then ".join(each.variant for each in floors)

    def __call__(self) -> None:
        for each in self._floors:
            each()


def moved(length: int, dtype: torch.dtype, count: int = CLIENTS, updates: int = 0, passes: int = 1) -> int:
    """Bytes to read and write: `count` updates in each pass, and `updates` float32 vectors read and written."""
    return length * (passes * count * dtype.itemsize + 8 * updates)


def ours_and_floors(work: Prepare, length: int, updates: int = 0, passes: int = 1) -> list[Contender]:
    """Ours and the floor in float32 and bfloat16, with one thread and with two."""
    contenders = []
    for dtype in (F32, BF16):
        amount = moved(length, dtype, updates=updates, passes=passes)
        for threads in (1, 2):
            contenders.append(Contender("ours", "ours", dtype, amount, partial(work, dtype=dtype), threads))
            contenders.append(floor(dtype, length, updates=updates, threads=threads, passes=passes))
    return contenders


def other(name: str, amount: int, work: Prepare, dtype: torch.dtype = F32, requires: tuple[str, ...] = ()) -> Contender:
    return Contender(name, "other", dtype, amount, partial(work, dtype=dtype), requires=requires)


def read_floor(length: int) -> Group:
    """The candidates for the floor of reading."""
    amount = moved(length, F32)
    candidates: dict[str, Callable[[Tensor], object]] = {
        "NumPy, largest int32": lambda row: row.numpy().view("int32").max(),
        "torch.dot": lambda row: torch.dot(row, row),
        "torch.sum": torch.sum,
    }

    def reduce_rows(inputs: Inputs, dtype: torch.dtype, reduce: Callable[[Tensor], object]) -> Work:
        rows = inputs.rows(dtype)
        return lambda: [reduce(row) for row in rows]

    others = [other(name, amount, partial(reduce_rows, reduce=reduce)) for name, reduce in candidates.items()]
    return Group("reading", CLIENTS, length, (floor(F32, length), *others))


def gramian_of_eight(length: int) -> Group:
    single, half = moved(length, F32), moved(length, BF16)
    others = [
        other("torch mm, stacked already", single, baselines.multiply_stacked),
        other("torch stack + mm", single, baselines.stack_and_multiply),
        other("torch stack + mm in pieces", single, baselines.multiply_chunks),
        other("torch.dot of pairs", single, baselines.dot_pairs),
        other("torch stack + mm", half, baselines.stack_and_multiply, BF16),
        other("torch stack + mm in pieces", half, baselines.multiply_chunks, BF16),
    ]
    return Group("gramian", CLIENTS, length, (*ours_and_floors(gramian, length), *others))


def step_of_eight(length: int) -> Group:
    single, half = moved(length, F32, updates=STATE), moved(length, BF16, updates=STATE)
    others = [
        other("torch, the same work", single, baselines.step_by_addition),
        other("torch, less work", single, baselines.step_into_momentum),
        other("torch, stacked already", single, baselines.step_by_product),
        other("torch, the same work", half, baselines.step_by_addition, BF16),
        other("torch, less work", half, baselines.step_into_momentum, BF16),
    ]
    return Group("server_step", CLIENTS, length, (*ours_and_floors(server_step, length, STATE), *others))


def whole_step_of_eight(length: int) -> Group:
    """The step with its solve; TorchJD stops short of momentum and parameters, NVFlare and Flower at the mean."""
    amount = moved(length, F32, updates=STATE, passes=2)
    combination, mean = moved(length, F32, passes=2) + 4 * length, moved(length, F32) + 4 * length
    cagrad, upgrad = (partial(baselines.torchjd_aggregation, name=name) for name in ("CAGrad", "UPGrad"))
    others = [
        other("FedHCA2's solver + momentum", amount, baselines.fedhca2),
        other("TorchJD CAGrad, stacked already", combination, cagrad, requires=("torchjd", "cvxpy")),
        other("TorchJD UPGrad, stacked already", combination, upgrad, requires=("torchjd", "quadprog")),
        other("NVFlare weighted mean", mean, baselines.nvflare_mean, requires=("nvflare",)),
        other("Flower weighted mean", mean, baselines.flower_mean, requires=("flwr",)),
    ]
    ours = ours_and_floors(whole_step, length, STATE, passes=2)
    return Group("whole step", CLIENTS, length, (*ours, *others))


def new_operations(length: int) -> list[Group]:
    """One group an operation: ours, its floor, and torch doing the same."""
    bounds = [length * part // SEGMENTS for part in range(SEGMENTS + 1)]

    def group(name: str, ours: Prepare, lowest: Contender, torch_work: Prepare) -> Group:
        contenders = (
            Contender("ours", "ours", F32, lowest.amount, partial(ours, dtype=F32)),
            lowest,
            other("torch", lowest.amount, torch_work),
        )
        return Group(name, CLIENTS, length, contenders)

    reading = floor(F32, length)
    personal = partial(baselines.step_by_addition, targets=TARGETS)
    by_segment = partial(baselines.step_by_addition, segments=SEGMENTS)
    groups = [
        group("gramian_append, the 8th of 8", gramian_append, reading, baselines.dot_last),
        group("gramian, 100 segments", partial(gramian, segments=bounds), reading, baselines.multiply_chunks),
        group("weighted_mean", weighted_mean, floor(F32, length, writes=[F32]), baselines.mean_by_torch),
        group("server_step, Adam", adam_step, floor(F32, length, updates=3), baselines.adam_by_torch),
        group("server_step, 4 targets", personal_step, floor(F32, length, updates=STATE * TARGETS), personal),
        group(
            "server_step, 100 segments",
            partial(server_step, segments=bounds),
            floor(F32, length, updates=STATE),
            by_segment,
        ),
    ]
    for name, into in (("screen", None), ("screen into float32", F32), ("screen into bfloat16", BF16)):
        lowest = floor(F32, length, count=1, writes=[] if into is None else [into])
        groups.append(group(name, partial(screen, into=into), lowest, partial(baselines.screen_by_torch, into=into)))
    return groups


def gramian_of_many(count: int, length: int) -> Group:
    """Gram matrices between the bounds of memory and of arithmetic."""
    contenders: list[Contender] = []
    for dtype in (F32, BF16):
        amount = moved(length, dtype, count)
        contenders.append(Contender("ours", "ours", dtype, amount, partial(gramian, dtype=dtype)))
        contenders.append(floor(dtype, length, count))
    contenders.append(other("torch mm, stacked already", moved(length, F32, count), baselines.multiply_stacked))
    contenders.append(
        Contender("torch float64 mm", "peak", torch.float64, baselines.PEAK_PRODUCTS, baselines.float64_peak)
    )
    arithmetic = length * count * (count + 1) // 2
    return Group(f"gramian, N = {count}", count, length, tuple(contenders), products=arithmetic)


def mapped(name: str, count: int, length: int, cycles: int | None = None) -> Group:
    """Operations on updates in files; resident memory must not grow with them."""
    amount = moved(length, F32, count)
    contenders = (
        Contender("ours, gramian", "ours", F32, amount, partial(gramian, dtype=F32)),
        Contender("ours, server_step", "ours", F32, amount + 16 * length, partial(server_step, dtype=F32)),
        Contender("floor: read() of each file", "floor", F32, amount, partial(read_files, dtype=F32)),
    )
    return Group(name, count, length, contenders, make_inputs=MappedInputs, cycles=cycles)
