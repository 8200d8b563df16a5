"""What the project claims of its speed, each with the measurement it is judged by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Results = dict[tuple[str, str], dict[str, Any]]  # of a group's name and a contender's label
ONE, TWO, HALF = "ours, float32, 1 thread", "ours, float32, 2 threads", "ours, bfloat16, 1 thread"


@dataclass(frozen=True)
class Claim:
    """One line of the table of claims.

    Attributes:
        text: What is claimed.
        target: The least that holds it, or the most where `at_most`.
        wall: What was measured by the wall clock; None where it was not measured.
        cpu: By CPU time of the thread, where that means something.
        at_most: Whether less is better.
        percent: Whether the numbers are shares.
    """

    text: str
    target: float
    wall: float | None
    cpu: float | None = None
    at_most: bool = False
    percent: bool = False

    @property
    def verdict(self) -> str:
        if self.wall is None:
            return "not measured"
        return "yes" if (self.wall <= self.target if self.at_most else self.wall >= self.target) else "**no**"


def claims(results: Results, errors: list[float]) -> Iterator[Claim]:
    """All claims; what was skipped stays without a number."""

    def times(text: str, target: float, group: str, other: str, ours: str = ONE) -> Claim:
        ratio = results[group, ours]["times"].get(other, {})
        cpu = None if "2 threads" in ours + other else ratio.get("cpu")
        return Claim(text, target, ratio.get("wall"), cpu)

    share = results["gramian", ONE]["share_of_floor"]
    yield Claim("`gramian`, share of the read floor", 0.85, share["wall"], share["cpu"], percent=True)
    yield times("`gramian` against torch mm", 5, "gramian", "torch mm, stacked already, float32, 1 thread")
    yield times("`server_step` against torch", 5, "server_step", "torch, the same work, float32, 1 thread")
    for group in ("gramian", "server_step"):
        yield times(f"`{group}`, bfloat16 against float32", 1.7, group, ONE, ours=HALF)
    for name, target in (
        ("FedHCA2's solver + momentum", 15),
        ("TorchJD CAGrad, stacked already", 4),
        ("NVFlare weighted mean", 1),
    ):
        yield times(f"whole step against {name}", target, "whole step", f"{name}, float32, 1 thread")
    for group in ("gramian", "server_step"):
        yield times(f"`{group}`, two threads against one", 1.6, group, ONE, ours=TWO)
    for label, dtype in ((ONE, "float32"), (HALF, "bfloat16")):
        bound = results["gramian, N = 64", label].get("share_of_bound")
        yield Claim(f"`gramian` of 64 in {dtype}, share of its bound", 0.5, bound, percent=True)
    whole = results["whole step", ONE]
    updates = whole["N"] * whole["D"] * 4
    extra = None if whole["extra_memory"] is None else whole["extra_memory"] / updates
    yield Claim("extra memory of a whole step, share of the updates", 0.01, extra, at_most=True, percent=True)
    yield Claim("largest error of `gramian`", 1e-9, max(errors), at_most=True)
