"""Comparing strategies: seeds, statistics against SciPy, tables, and a small comparison that is cut off and goes on."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from phantoms import federation
from scipy import stats

from fedcmt import compare as comparing
from fedcmt import comparison_runs
from fedcmt.cli import main
from fedcmt.compare import compare, parse_variants
from fedcmt.comparison import Difference, Row, as_csv, as_markdown, difference, row_of, share_of_headroom
from fedcmt.comparison_figures import curves_png, forest_png
from fedcmt.errors import InputError, RunError


def row(strategy: str, seed: int, client: str, score: float, **changes: object) -> Row:
    facts = {
        "metric": "dice",
        "local_steps": 4,
        "personal_steps": 0,
        "score_kind": "test",
        "curve": ((1, 0.1), (2, 0.2)),
    }
    return Row(strategy, seed, client, test=score, final=score / 2, **{**facts, **changes})


def example() -> list[Row]:
    """Client a gains 0.1, 0.2, 0.3 over three seeds, client b loses 0.1 each time, a little more or less."""
    rows = []
    for seed, gain in enumerate((0.1, 0.2, 0.3)):
        rows += [row("local", seed, "a", 0.5), row("local", seed, "b", 0.4)]
        rows += [row("fedavg", seed, "a", 0.5 + gain), row("fedavg", seed, "b", 0.3 - seed / 1000, personal_steps=6)]
        rows += [row("fedcmt", seed, "a", 0.5), row("fedcmt", seed, "b", 0.4)]
    return rows


def test_intervals_are_students() -> None:
    values = np.random.default_rng(0).normal(0.02, 0.05, 8)
    found = Difference.of(list(values))
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.mean, found.pairs) == (pytest.approx(values.mean()), 8)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert math.isnan(Difference.of([0.1]).low)
    assert Difference.of([0.1]).text == "+0.100"
    assert Difference.of([]).text == "–"
    assert Difference.of([0.1, math.nan, 0.3]).pairs == 2


def test_a_run_is_one_pair() -> None:
    found = difference(example(), "fedavg", "local", "test")
    means = [(0.1 - 0.1) / 2, (0.2 - 0.101) / 2, (0.3 - 0.102) / 2]
    assert found.pairs == 3
    assert found.mean == pytest.approx(np.mean(means))
    assert difference(example(), "fedavg", "local", "test", "a").mean == pytest.approx(0.2)
    assert difference(example(), "fedavg", "local", "final", "a").mean == pytest.approx(0.1)
    assert difference(example()[:-1], "fedcmt", "local", "test", "b").pairs == 2  # only what both have


def test_the_table_counts_who_is_worse_off() -> None:
    text = as_markdown(example(), "local", "test", tuning=False)
    line = next(line for line in text.splitlines() if line.startswith("| fedavg |"))
    assert "| 1 of 2 | 1 | 4 + 3 personal |" in line
    assert "| fedcmt | 0.450 | +0.000 [+0.000, +0.000] | 0 of 2 | 0 | 4 |" in text
    assert "3 test seeds" in text
    assert "3 tuning seeds" in as_markdown(example(), "local", "test", tuning=True)
    assert "## Row minus column" in text


def test_the_share_of_joints_lead_has_fiellers_interval() -> None:
    gains, heads = [0.02, 0.05, 0.03, 0.06], [0.08, 0.10, 0.09, 0.13]
    rows = []
    for seed, (gain, head) in enumerate(zip(gains, heads, strict=True)):
        rows += [
            row("local", seed, "a", 0.5),
            row("fedavg", seed, "a", 0.5 + gain),
            row("joint", seed, "a", 0.5 + head),
        ]
    found = share_of_headroom(rows, "fedavg", "local", "joint", "test")
    assert found.mean == pytest.approx(np.mean(gains) / np.mean(heads))
    # A ratio r is in the interval exactly where gain - r head is not significantly different from 0.
    for ratio in (found.low, found.high):
        test = stats.ttest_1samp(np.asarray(gains) - ratio * np.asarray(heads), 0)
        assert test.pvalue == pytest.approx(0.05)
    text = as_markdown(rows, "local", "test", tuning=False)
    assert "| share of joint's lead |" in text
    assert f"| {found.mean:.0%} [{found.low:.0%}, {found.high:.0%}] | 0 of 1 | 0 | 4 |" in text
    others = [r for r in rows if r.strategy != "joint"]
    for heads, mean_is_known in (([0.1, -0.1], False), ([0.5, -0.1], True)):
        unclear = others + [row("joint", seed, "a", 0.5 + head) for seed, head in enumerate(heads)]
        found = share_of_headroom(unclear, "fedavg", "local", "joint", "test")
        assert math.isnan(found.mean) != mean_is_known
        assert math.isnan(found.low)


def test_scores_that_are_undefined_are_left_out_and_empty_in_the_csv() -> None:
    rows = [*example(), row("fedprox", 0, "a", math.nan)]
    text = as_csv(rows)
    assert text.splitlines()[-1] == "fedprox,0,a,dice,,,4,0,test"
    again = [row_of(line) for line in csv.DictReader(text.splitlines())]
    assert as_csv(again) == text
    assert {row.curve for row in again} == {()}
    assert "| fedprox | – | – |" in as_markdown(rows, "local", "test", tuning=False)
    for image in (curves_png(rows), forest_png(rows, "local", "test")):
        assert image.startswith(b"\x89PNG")


def test_variants() -> None:
    variants = parse_variants("fedcmt:conflict_aversion=0:distillation.weight=0.5, fedavg")
    assert [v.label for v in variants] == ["local", "fedcmt:conflict_aversion=0:distillation.weight=0.5", "fedavg"]
    assert variants[1].strategy == {"name": "fedcmt", "conflict_aversion": 0, "distillation": {"weight": 0.5}}
    assert variants[1].folder == "fedcmt_conflict_aversion=0_distillation.weight=0.5"
    other = parse_variants("local,fedavg:adaptors=group:config.clients.*.local_steps=3:config.rounds=4")[1]
    assert other.strategy == {"name": "fedavg", "adaptors": "group"}
    assert other.overrides == ("clients.*.local_steps=3", "rounds=4")
    for wrong, part in (
        ("fedavg:config.seed=3", "'seed' is the same for all variants"),
        ("fedavg:config.strategy.name=x", "'strategy' is the same"),
        ("fedcmt:x", "is no setting"),
        ("fedavg,fedavg", "named twice"),
        ("fedavg:a=[", "valid YAML"),
    ):
        with pytest.raises(InputError, match=part):
            parse_variants(wrong)


@pytest.fixture
def config(raw_datasets: Path, preprocessed: Path, tmp_path: Path) -> Path:
    settings = federation(raw_datasets, preprocessed, tmp_path / "unused", rounds=1)
    settings["clients"] = settings["clients"][:2]
    settings["training"] = {**settings["training"], "local_steps": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "config.yaml"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--strategies", "fedavgg", "--seeds", "1"], ["unknown strategy 'fedavgg'", "fedavg"]),
        (["--strategies", "fedavg:adaptor=1", "--seeds", "1"], ["unknown key 'adaptor'", "adaptors"]),
        (["--strategies", "fedavg:config.rounds=0", "--seeds", "1"], ["rounds", "greater than or equal to 1"]),
        (["--strategies", "fedavg:config.training.x=0", "--seeds", "1"], ["unknown key 'x'"]),
        (["--strategies", "fedavg", "--seeds", "0"], ["--seeds", "found 0"]),
        (["--strategies", "fedavg", "--seeds", "1000000"], ["--seeds", "found 1000000"]),
        (["--strategies", "fedavg", "--seeds", "1", "--processes", "0"], ["--processes"]),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], parts: list[str], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(config), *arguments, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(part in error for part in parts), error
    assert not (tmp_path / "out").exists()


def test_a_comparison_goes_on_and_keeps_tuning_apart(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, seen = tmp_path / "out", []
    run_federation = comparison_runs.run_federation

    def watched(run: object, **options: object) -> object:
        seen.append((run.strategy.name, run.seed, run.training.local_steps))
        if len(seen) == 2:
            raise RunError("power cut")
        return run_federation(run, **options)

    monkeypatch.setattr(comparison_runs, "run_federation", watched)
    with pytest.raises(RunError, match=r"1 of 2 runs failed; fedavg, seed 1000000: RunError: power cut"):
        compare(config, parse_variants("fedavg"), 1, folder=out)
    assert not (out / "comparison.md").exists()
    first = (out / "runs" / "local" / "seed-1000000" / "results.json").read_bytes()
    assert not (out / "runs" / "local" / "seed-1000000" / "report.html").exists()
    command = ["compare", str(config), "--strategies", "fedavg", "--seeds", "1", "-o", str(out), "--reports"]
    assert main(command) == 0
    for path in ("report.html", "tensorboard", "clients/ct_plain/model/plans.json"):
        assert (out / "runs" / "fedavg" / "seed-1000000" / path).exists(), path
    assert (out / "runs" / "local" / "seed-1000000" / "results.json").read_bytes() == first
    assert seen[:2] == [("local", 1000000, 1), ("fedavg", 1000000, 1)]
    with open(out / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["strategy"], r["client"]) for r in rows] == [
        (s, c) for s in ("local", "fedavg") for c in ("ct_plain", "ct_regions")
    ]
    assert {r["local_steps"] for r in rows} == {"1"}
    assert all(0 <= float(r["test"]) <= 1 and 0 <= float(r["final"]) <= 1 for r in rows)
    assert "| fedavg |" in (out / "comparison.md").read_text()
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("curves.png", "forest.png"))
    tuned = compare(config, parse_variants("local"), 1, folder=out, tuning=True, score="final")
    assert {row.seed for row in tuned.rows} == {1}
    assert tuned.folder == out / "tuning"


def test_a_variant_may_change_the_federation(config: Path, tmp_path: Path) -> None:
    variants = parse_variants("local:config.clients.*.local_steps=2:config.rounds=2")
    rows = compare(config, variants, 1, folder=tmp_path / "out", say=lambda text: None).rows
    assert {(row.strategy[:12], row.local_steps, len(row.curve)) for row in rows} == {
        ("local", 1, 1), ("local:config", 4, 2)
    }  # fmt: skip
    folders = [tmp_path / "out" / "runs" / variant.folder / "seed-1000000" for variant in variants]
    assert not list(tmp_path.rglob("report.html"))
    assert not list(tmp_path.rglob("tensorboard"))
    assert not list(tmp_path.rglob("model"))
    assert all((folder / "results.json").is_file() for folder in folders)


def test_seeds_of_tuning_and_test_never_meet() -> None:
    assert comparing.TUNING_SEEDS_FROM + comparing.MAX_SEEDS - 1 < comparing.TEST_SEEDS_FROM


def test_a_spent_budget_starts_no_run_and_says_so(config: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the budget is spent, 2 of 2 runs are left"):
        compare(config, parse_variants("fedavg"), 1, folder=tmp_path / "out", budget=0, say=lambda text: None)
    assert not (tmp_path / "out" / "runs").exists()


def test_other_processes_do_the_work_and_report_what_went_wrong(config: Path, tmp_path: Path) -> None:
    """One run, so that only one process starts: starting one takes longer than the run."""
    (tmp_path / "out" / "runs" / "local").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "local" / "seed-1000000").write_text("in the way")
    with pytest.raises(RunError, match=r"1 of 1 runs failed; local, seed 1000000: .*Error"):
        compare(config, parse_variants("local"), 1, folder=tmp_path / "out", processes=2, say=lambda text: None)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's list of a process's children")
def test_killed_it_leaves_no_process_behind(config: Path, tmp_path: Path) -> None:
    """What goes on would keep the workspace, and starting again would be refused."""
    command = ["compare", config, "--strategies", "local", "--seeds", "1", "--processes", "2", "-o", tmp_path / "out"]
    code = "import sys; from fedcmt.cli import main; sys.exit(main(sys.argv[1:]))"
    killed = subprocess.Popen([sys.executable, "-c", code, *command, "--set", "rounds=100000"], stdout=subprocess.PIPE)
    log = tmp_path / "out" / "runs" / "local" / "seed-1000000.log"
    wait_until(lambda: log.is_file() and "round 1/" in log.read_text(), 240)
    children = [int(n) for n in Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()]
    assert children
    killed.kill()
    killed.communicate()
    wait_until(lambda: not any(map(is_running, children)), 60)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


def test_data_may_differ_by_seed(config: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(config.read_text())
    data["raw"] = str(tmp_path / "{seed}" / "raw")
    with pytest.raises(InputError, match="preprocessed data do not"):
        compare(data, parse_variants("local"), 1, folder=tmp_path / "out")
    data["preprocessed"] = str(tmp_path / "{seed}" / "preprocessed")
    with pytest.raises(InputError, match="1000000"):
        compare(data, parse_variants("local"), 1, folder=tmp_path / "out", say=lambda text: None)
