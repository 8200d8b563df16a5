"""The study: its plan is valid, numbers come from the runs alone, and it stops and goes on."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from phantoms import federation
from test_compare import row

STUDY = Path(__file__).parent.parent / "benchmarks" / "study"
sys.path.insert(0, str(STUDY))

import document  # noqa: E402
import plan as plans  # noqa: E402
import tables  # noqa: E402
import work  # noqa: E402

from fedcmt.errors import InputError  # noqa: E402
from fedcmt.settings import Settings, validated  # noqa: E402


def plan_of(parts: dict, **settings: object) -> plans.Plan:
    parts = {key: {"title": key, "preset": "p", "seeds": 3, **part} for key, part in parts.items()}
    return validated(plans.Plan, {"rule": "the best", "parts": parts, **settings})


def rows_of(gains: dict[str, tuple[float, float]], seeds: int = 3) -> list:
    """Clients a and b gain what is given, a little more with each seed."""
    return [
        row(label, seed, client, 0.5 + gain + 0.001 * seed * (label != "local"))
        for label, both in {"local": (0.0, 0.0), **gains}.items()
        for seed in range(seeds)
        for client, gain in zip("ab", both, strict=True)
    ]


def test_the_shipped_plan_is_valid_and_the_document_has_its_places() -> None:
    plan, digest = plans.read_plan()
    assert len(digest) == 12
    text = (document.DOCS / "results.md").read_text()
    blocks = {key: ["x"] for key in (*plan.parts, "state", "choice")}
    assert document.filled(text, blocks).count("\nx\n") == len(blocks)
    fresh = {key: part for key, part in plan.parts.items() if not part.tuning}
    assert {key: fresh[key].seeds for key in ("small", "full", "lone", "newcomer")} == {
        "small": 10, "full": 5, "lone": 10, "newcomer": 10
    }  # fmt: skip
    again = {run.seed for run in work.runs_for(plan, fresh["full-again"], Path("x"))}
    assert len(again) == 10
    assert not again & {
        run.seed for key in ("full", "tuning-full") for run in work.runs_for(plan, plan.parts[key], Path("x"))
    }


def test_claims_are_judged_by_the_numbers() -> None:
    tests = [
        {"mean_at_least": 0.03, "interval_above": 0},
        {"mean_at_least": 0.06},
        {"against": "fedavg", "interval_above": 0},
        {"significantly_worse_at_most": 0},
        {"headroom_at_least": 0.6},
        {"strategy": "fedavg", "headroom_at_least": 0.5},
    ]
    names = {"local": "local", "joint": "joint", "fedavg": "fedavg", "chosen": "chosen"}
    plan = plan_of({"part": {"strategies": names, "tests": tests}}, chosen="fedcmt:step_length=restored")
    gains = {"joint": (0.1, 0.1), "fedavg": (0.02, 0.02), "fedcmt:step_length=restored": (0.12, -0.02)}
    results = tables.Results(plan, plan.parts["part"], rows_of(gains))
    lines = tables.verdicts(results)
    found = ["holds" if "**holds**" in line else "does not" if "**does not hold**" in line else "?" for line in lines]
    assert found == ["holds", "does not", "holds", "does not", "does not", "does not"]
    assert tables.claims(results) == [True, False, True, False, False, False]
    assert results.worse("chosen") == (1, 1)
    few = tables.Results(plan, plan.parts["part"], rows_of(gains, seeds=2))
    assert all("**not judged, 2 of 3 seeds are there**" in line for line in tables.verdicts(few))
    waiting = tables.Results(plan.model_copy(update={"chosen": None}), plan.parts["part"], rows_of(gains))
    assert "**not judged, has not been run yet**" in tables.verdicts(waiting)[0]
    table = tables.comparison_table(waiting)
    assert [line for line in table if line.startswith("| chosen |")] == [
        "| chosen | 0 | has not been run yet |  |  |  |  |  |"
    ]


def test_a_strategy_is_compared_with_itself_alone_under_the_same_changes() -> None:
    plan = plan_of({"part": {"strategies": {"longer": "fedavg:config.rounds=5", "fedavg": "fedavg"}}})
    rows = rows_of({"fedavg": (0.1, 0.1), "local:config.rounds=5": (0.3, 0.3), "fedavg:config.rounds=5": (0.35, 0.31)})
    results = tables.Results(plan, plan.parts["part"], rows)
    assert results.to_local("longer").mean == pytest.approx(0.03)
    assert results.between("longer", "fedavg").mean == pytest.approx(0.23)
    assert {row.strategy for row in results.named_rows()} == {"fedavg"}


def test_candidates_are_ranked_by_their_mean_over_the_tuning_parts() -> None:
    names = {n: n for n in ("local", "joint", "fedavg", "fedcmt", "fedprox", "fedavg:config.rounds=5")}
    few = {name: text for name, text in names.items() if name != "fedprox"}
    plan = plan_of({"one": {"strategies": names, "tuning": True}, "two": {"strategies": few, "tuning": True}})
    gains = {"joint": (0.9, 0.9), "fedavg": (0.1, 0.1), "fedcmt": (0.08, 0.08), "fedprox": (0.5, 0.5)}
    other = {"joint": (0.9, 0.9), "fedavg": (0.0, 0.0), "fedcmt": (0.05, 0.05), "fedavg:config.rounds=5": (0.5, 0.5)}
    found = {
        key: tables.Results(plan, plan.parts[key], rows_of(rows)) for key, rows in (("one", gains), ("two", other))
    }
    assert tables.ranking(found)[2:] == [
        "| `fedcmt` | +0.081 | +0.051 | +0.066 |", "| `fedavg` | +0.101 | +0.001 | +0.051 |"
    ]  # fmt: skip


def test_the_newcomer_and_the_others_are_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = {"name": "x", "rounds": 6, "clients": [{"name": n, "dataset": 1, "modality": "CT"} for n in "ab"]}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(work, "preset_config", lambda preset: tmp_path / "p.yaml")
    warm = "config.clients.b.warmup_rounds=1"
    part = {
        "strategies": {"fedavg": "fedavg", "warmed up": f"fedavg:{warm}"},
        "newcomer": {"client": "b", "joins_at_round": 3},
    }
    plan = plan_of({"part": part})
    b = "config.clients.b.joins_at_round"
    assert [variant.label for variant in work.variants_of(plan, plan.parts["part"])] == [
        f"fedavg:{b}=3", f"fedavg:{b}=1000000", f"local:{b}=3", "local:config.rounds=4", f"fedavg:{warm}:{b}=3"
    ]  # fmt: skip
    gains = {
        f"fedavg:{b}=3": (0.10, 0.2), f"local:{b}=3": (0, 0.15), "local:config.rounds=4": (0, 0.25),
        f"fedavg:{b}=1000000": (0.105, 0), f"fedavg:{warm}:{b}=3": (0.05, 0.2),
    }  # fmt: skip
    table = tables.newcomer_table(tables.Results(plan, plan.parts["part"], rows_of(gains)))
    assert table[2].startswith("| fedavg | 3 | +0.050 [+0.050, +0.050] | -0.050 [-0.050, -0.050] | -0.005 ")
    assert table[2].endswith("| **holds** |")
    assert table[3].endswith("| **does not hold** |")  # the others lose 0.055


def test_wrong_plans_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'fedopt' should be one of the part's strategies"):
        plan_of({"part": {"strategies": {"fedavg": "fedavg"}, "against": ["fedopt"]}})
    plan = {"rule": "r", "parts": {"a": {"title": "t", "preset": "p", "seeds": 1, "strategies": {"x": "fedavgg"}}}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(InputError, match=r"field 'parts.a'.*x \(fedavgg\).*unknown strategy"):
        plans.read_plan(tmp_path / "plan.yaml")
    for text in ("<!-- study: a -->\n<!-- end -->\n<!-- study: b -->\n", "", "<!-- study: a -->\n"):
        with pytest.raises(InputError):
            document.filled(text, {"a": ["x"]})
    assert isinstance(plans.Test(), Settings)


def test_it_stops_at_the_budget_goes_on_and_fills_the_document(
    raw_datasets: Path, preprocessed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    settings = federation(raw_datasets, preprocessed, tmp_path / "unused", rounds=1)
    settings["clients"] = settings["clients"][:2]
    settings["training"] = {**settings["training"], "local_steps": 1}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(settings))
    part = {"title": "t", "preset": "p", "seeds": 1, "strategies": {"local": "local", "mean": "fedavg"}}
    parts = {"first": {**part, "tests": [{"strategy": "mean", "mean_at_least": -1}]}, "tuned": {**part, "tuning": True}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"rule": "r", "parts": parts}))
    places = "".join(f"<!-- study: {key} -->\nstale\n<!-- end -->\n" for key in ("state", "choice", "first", "tuned"))
    (tmp_path / "results.md").write_text(f"by hand\n{places}")
    monkeypatch.setattr(work, "preset_config", lambda preset: tmp_path / "p.yaml")

    def write_data(preset: str, seed: int, raw: Path) -> None:
        raw.parent.mkdir(parents=True, exist_ok=True)
        for path, source in ((raw, raw_datasets), (raw.with_name("preprocessed"), preprocessed)):
            if not path.is_symlink():
                path.symlink_to(source)

    monkeypatch.setattr(work, "write_data", write_data)
    monkeypatch.setattr(document.write_document, "__defaults__", (tmp_path,))
    monkeypatch.setattr(plans.read_plan, "__defaults__", (tmp_path / "plan.yaml",))
    study = runpy.run_path(str(STUDY / "__main__.py"), run_name="study")["study"]
    study(tmp_path / "work", budget=0)
    assert "4 runs are left; the same command goes on" in capsys.readouterr().out
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("by hand\n")
    assert "stale" not in text
    assert text.count("has not been run yet") == 3 + 1
    study(tmp_path / "work", only=["first"])
    assert "0 runs are left\n" in capsys.readouterr().out
    text = (tmp_path / "results.md").read_text()
    assert "**holds**" in text
    assert text.count("This has not been run yet") == 2
    assert "![forest of first](figures/study-first-forest.png)" in text
    assert (tmp_path / "figures" / "study-first-curves.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert {(r["preset"], r["strategy"], r["seed"]) for r in rows} == {
        ("p", "local", "1000000"), ("p", "fedavg", "1000000")
    }  # fmt: skip
    study(tmp_path / "work", only=["first"], budget=0)
    assert (tmp_path / "results.md").read_text() == text

    # On another machine the published scores stand for the runs, and say the same.
    curves, scores = tmp_path / "figures" / "study-first-curves.png", tmp_path / "results.csv"
    before = scores.read_bytes()
    curves.write_bytes(b"of the runs themselves")
    study(tmp_path / "elsewhere", only=["first"], scores=scores)
    assert "first: " not in (said := capsys.readouterr().out)
    assert "0 runs are left\n" in said
    assert ((tmp_path / "results.md").read_text(), scores.read_bytes()) == (text, before)
    assert curves.read_bytes() == b"of the runs themselves"
    study(tmp_path / "elsewhere", budget=0, scores=scores)
    assert "2 runs are left; the same command goes on" in capsys.readouterr().out
    with pytest.raises(InputError, match="no part 'second'"):
        study(tmp_path / "work", only=["second"])
