"""NVFlare's simulator gives what the in-process engine gives, bit for bit, and leaves the same files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from phantoms import federation

from fedcmt.cli import main

NAMES = ["ct_plain", "ct_regions", "mr_two", "mr_class"]
ROOT = Path(__file__).parent.parent
OF_THE_WIRE = ("seconds", "bytes_sent", "bytes_received", "absent")


def lines_of(workspace: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workspace / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in OF_THE_WIRE} for line in lines]


@pytest.fixture(scope="module")
def simulated(raw_datasets: Path, preprocessed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workspace of the same federation as ``finished``, run in NVFlare's simulator as a user would."""
    folder = tmp_path_factory.mktemp("simulated")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(federation(raw_datasets, preprocessed, folder / "unused")))
    command = [sys.executable, ROOT / "scripts" / "run_fed.py", config, "--engine", "nvflare", "--workspace"]
    done = subprocess.run([*command, folder / "w"], capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr + (folder / "w" / "nvflare" / "simulator.log").read_text()[-3000:]
    assert "round 2: 4 updates used, 4 clients scored" in done.stdout
    return folder / "w"


def test_states_are_those_of_the_inprocess_engine_bit_for_bit(finished: Path, simulated: Path) -> None:
    files = ["server/round-0002.safetensors"]
    for name in NAMES:
        files += [f"clients/{name}/{file}.safetensors" for file in ("state/round-0002", "best", "last", "decoder")]
    for file in files:
        assert (simulated / file).read_bytes() == (finished / file).read_bytes(), file


def test_lines_and_results_are_those_of_the_inprocess_engine(finished: Path, simulated: Path) -> None:
    assert lines_of(simulated) == lines_of(finished)
    for file in ("results.json", "contract.json"):
        expected, found = ((folder / file).read_text() for folder in (finished, simulated))
        assert found == expected, file
    for file in ("report.html", "clients/ct_plain/model/fold_0/checkpoint_final.pth", "clients/ct_plain/plans.json"):
        assert (simulated / file).is_file(), file
    assert list((simulated / "tensorboard").glob("events*"))
    assert json.loads((simulated / "status.json").read_text())["state"] == "finished"


def test_bytes_on_the_wire_are_recorded(simulated: Path) -> None:
    lines = [json.loads(line) for line in (simulated / "metrics.jsonl").read_text().splitlines()]
    for round_index in (1, 2):
        clients = [line for line in lines if line["round"] == round_index and line["kind"] == "client"]
        server = next(line for line in lines if line["round"] == round_index and line["kind"] == "server")
        assert server["bytes_received"] == sum(line["bytes_sent"] for line in clients)
        assert server["bytes_sent"] == sum(line["bytes_received"] for line in clients)
    first, second = ([line for line in lines if line.get("client") == "ct_plain"][i] for i in (0, 1))
    # What a client was scored with need not be sent again for the next round.
    assert second["bytes_received"] < 0.6 * first["bytes_received"]
    page = (simulated / "report.html").read_text()
    assert "<dt>sent</dt>" in page
    assert "<dt>received</dt>" in page


def test_without_nvflare_one_line_says_what_to_install(
    raw_datasets: Path,
    preprocessed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "nvflare" else find(name, *rest)
    )
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(federation(raw_datasets, preprocessed, tmp_path / "w")))
    assert main(["run", str(config), "--engine", "nvflare"]) == 2
    assert "pip install 'fedcmt[nvflare]'" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_mistake_in_the_data_is_one_line_and_nothing_is_written(
    raw_datasets: Path, preprocessed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = federation(raw_datasets, preprocessed, tmp_path / "w")
    settings["clients"][0]["dataset"] = 999
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert main(["run", str(config), "--engine", "nvflare"]) == 2
    assert "client 'ct_plain'" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
