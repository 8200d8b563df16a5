"""Runs the benchmarks and writes their tables and plot.

usage: python benchmarks/report.py [--elements 31000000] [--cycles 7] [--mapped-full] [-o docs]

writes benchmarks.md (what stands between its markers) and benchmarks.png into the folder.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

from claims import Claim, Results, claims
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedcmt import files, ops

HERE = Path(__file__).parent
TEMPLATE = HERE.parent / "docs" / "benchmarks.md"
ACCURACY = "accuracy of gramian"
COLOURS = {"ours": "#0072b2", "other": "#999999", "floor": "#009e73"}
MANY = (2, 8, 16, 64)


def run(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Runs the benchmarks in a process of their own; what pytest-benchmark reports of each.

    Raises:
        SystemExit: A benchmark failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "benchmarks.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(HERE / "bench_ops.py"),
            "-q",
            "-rs",
            f"--benchmark-json={report}",
        ]
        finished = subprocess.run(
            [*command, "--benchmark-columns=min,median", *arguments], cwd=HERE.parent, check=False
        )  # fmt: skip
        if finished.returncode != 0:
            raise SystemExit("A benchmark failed: nothing was written.")
        found: list[dict[str, Any]] = json.loads(report.read_text())["benchmarks"]
    return found


def by_group(found: list[dict[str, Any]]) -> Results:
    """Measurements with their median, in the order in which they were made."""
    results = {}
    for one in found:
        if one["group"] != ACCURACY:
            facts = one["extra_info"] | {"median": one["stats"]["median"]}
            threads = f"{facts['threads']} thread{'s' * (facts['threads'] > 1)}"
            results[one["group"], f"{facts['name']}, {facts['dtype']}, {threads}"] = facts
    return results


# Tables


def table(columns: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def machine_rows(load: float) -> Iterator[tuple[str, str]]:
    info = ops.backend_info()
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    yield "processor", model[1] if model else platform.processor()
    yield "cores", str(os.cpu_count())
    yield "other load (processes, before the run)", f"{load:.1f}"
    yield "instruction set in use", str(info.cpu_path)
    yield "system", f"{platform.system()} {platform.release()}, {platform.python_compiler()}"
    for package in ("torch", "numpy", "scipy", "torchjd", "nvflare", "flwr"):
        yield package, installed(package)
    yield "date", datetime.datetime.now(datetime.UTC).date().isoformat()


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def claim_rows(found: list[Claim]) -> Iterator[Sequence[str]]:
    def shown(value: float | None, claim: Claim) -> str:
        if value is None:
            return "-"
        if claim.percent:
            return f"{value:.0%}" if value >= 0.01 else f"{value:.3%}"
        return f"{value:.1e}" if value < 1e-3 else f"{value:.2f}"

    for claim in found:
        target = f"{'at most' if claim.at_most else 'at least'} {shown(claim.target, claim)}"
        yield claim.text, target, shown(claim.wall, claim), shown(claim.cpu, claim), claim.verdict


def time_rows(results: Results) -> Iterator[Sequence[str]]:
    for (group, _), facts in results.items():
        if facts["role"] == "peak":
            continue
        yield (
            group, facts["name"], facts["dtype"], str(facts["threads"]), f"{facts['median'] * 1e3:.1f}",
            milliseconds(facts["cpu_median"]), f"{facts['gigabytes_per_second']:.1f}",
            percent(facts.get("share_of_floor")), factors(facts.get("times_ours")), extra(facts),
        )  # fmt: skip


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"


def percent(share: dict[str, float] | None) -> str:
    return "-" if share is None else f"{share['wall']:.0%}"


def factors(times: dict[str, float] | None) -> str:
    return "-" if times is None else f"{times['wall']:.1f} / {times['cpu']:.1f}"


def extra(facts: dict[str, Any]) -> str:
    """Extra memory in MB and as a share of the updates."""
    if facts["extra_memory"] is None:
        return "-"
    updates = facts["N"] * facts["D"] * (4 if facts["dtype"] == "float32" else 2)
    return f"{facts['extra_memory'] / 1e6:.1f} ({facts['extra_memory'] / updates:.1%})"


def bound_rows(results: Results) -> Iterator[Sequence[str]]:
    for (group, _), facts in sorted(results.items(), key=lambda item: item[1]["N"]):
        if "share_of_bound" in facts:
            peak = results[group, "torch float64 mm, float64, 1 thread"]["products_per_second"]
            yield (
                str(facts["N"]), f"{facts['D']:,}", facts["dtype"], f"{facts['median'] * 1e3:.1f}",
                f"{facts['memory_bound_s'] * 1e3:.1f}", f"{facts['arithmetic_bound_s'] * 1e3:.1f}",
                f"{peak / 1e9:.1f}", facts["bound_by"], f"{facts['share_of_bound']:.0%}",
            )  # fmt: skip


def accuracy_rows(found: list[dict[str, Any]]) -> Iterator[Sequence[str]]:
    for facts in (one["extra_info"] for one in found if one["group"] == ACCURACY):
        yield facts["kind"], facts["dtype"], f"{facts['error']:.1e}", f"{facts['float32_mm']:.1e}"


def variant_rows(results: Results) -> Iterator[Sequence[str]]:
    for (group, _), facts in results.items():
        if facts["variant"]:
            speed = f"{facts['gigabytes_per_second']:.1f}"
            yield group, facts["dtype"], str(facts["threads"]), speed, facts["variant"]


def tables(found: list[dict[str, Any]], load: float) -> dict[str, Iterator[str]]:
    """The lines of each table, by its name in the document."""
    results = by_group(found)
    errors = [one["extra_info"]["error"] for one in found if one["group"] == ACCURACY]
    whole = results["whole step", "ours, float32, 1 thread"]
    setting = f"N = {whole['N']}, D = {whole['D']:,}, medians of {whole['cycles']} cycles."
    times = ("operation", "contender", "dtype", "threads", "wall, ms", "CPU, ms", "GB/s", "share of the floor",
             "times ours, wall / CPU", "extra memory, MB")  # fmt: skip
    bounds = ("N", "D", "dtype", "ms", "memory bound, ms", "arithmetic bound, ms", "peak, 1e9 multiply-adds/s",
              "bound by", "share of the bound")  # fmt: skip
    return {
        "machine": table(("machine", ""), machine_rows(load)),
        "setting": iter([setting]),
        "claims": table(("claim", "target", "wall", "CPU", "holds"), claim_rows(list(claims(results, errors)))),
        "times": table(times, time_rows(results)),
        "bounds": table(bounds, bound_rows(results)),
        "accuracy": table(("inputs", "dtype", "ours", "torch float32 mm"), accuracy_rows(found)),
        "floors": table(("operation", "dtype", "threads", "GB/s", "fastest variant"), variant_rows(results)),
    }


def write_tables(path: Path, lines: dict[str, Iterator[str]]) -> None:
    """Replaces what stands between `<!-- table: NAME -->` and `<!-- end -->`, in a copy of the project's document
    where the folder has none."""
    text = (path if path.exists() else TEMPLATE).read_text()
    for name, rows in lines.items():
        content = "\n".join(rows).replace("\\", r"\\")
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, rf"\g<1>{content}\n\g<2>", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{path} should have one table `{name}`. Got {count}")
    files.write_text(path, text)


# Plot


def draw(results: Results) -> bytes:
    """The three operations against their rivals, and the Gram matrix against its bound, as a PNG."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(2, 2).flat
    for axis, group in zip(axes, ("gramian", "server_step", "whole step"), strict=False):
        draw_group(axis, group, results)
    draw_bounds(figure.axes[3], results)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def draw_group(axis: Axes, group: str, results: Results) -> None:
    """Bars of the contenders with one thread, fastest on top."""
    rows = [facts for (name, _), facts in results.items() if name == group and facts["threads"] == 1]
    rows.sort(key=lambda facts: -facts["median"])
    labels = [f"{facts['name']}, {facts['dtype']}" for facts in rows]
    bars = axis.barh(labels, [facts["median"] * 1e3 for facts in rows], color=[COLOURS[f["role"]] for f in rows])
    axis.bar_label(bars, fmt=lambda value: f"{value:,.3g}" if value < 100 else f"{value:,.0f}", padding=3, fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.margins(x=0.15)
    axis.set(title=f"{group}: {rows[0]['N']} updates of {rows[0]['D']:,}, one thread", xlabel="ms, median")


def draw_bounds(axis: Axes, results: Results) -> None:
    """The time of Gram matrices of as many bytes, and what bounds it."""
    places = range(len(MANY))
    for dtype, colour in (("float32", "#0072b2"), ("bfloat16", "#d55e00")):
        rows = [results[f"gramian, N = {count}", f"ours, {dtype}, 1 thread"] for count in MANY]
        axis.plot(places, [facts["median"] * 1e3 for facts in rows], "o-", color=colour, label=f"ours, {dtype}")
        bounds = [max(facts["memory_bound_s"], facts["arithmetic_bound_s"]) * 1e3 for facts in rows]
        axis.plot(places, bounds, "x--", color=colour, label=f"bound, {dtype}")
    axis.set_xticks(places, [str(count) for count in MANY])
    axis.set_ylim(bottom=0)
    axis.set(title="gramian of N updates, the same bytes in all", xlabel="N", ylabel="ms, median")
    axis.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=31_000_000, help="length of each of 8 updates")
    parser.add_argument("--cycles", type=int, default=7, help="calls of each contender")
    parser.add_argument("--mapped-full", action="store_true", help="also 12.8 GB of updates in files")
    parser.add_argument("-o", "--output", type=Path, default=TEMPLATE.parent, help="folder")
    options = parser.parse_args()
    arguments = [f"--elements={options.elements}", f"--cycles={options.cycles}"]
    load = os.getloadavg()[0]
    found = run(arguments + ["--mapped-full"] * options.mapped_full)
    write_tables(options.output / "benchmarks.md", tables(found, load))
    files.write_bytes(options.output / "benchmarks.png", draw(by_group(found)))


if __name__ == "__main__":
    main()
