"""The commands as typed: exit codes, one line for a mistake, and what they print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from phantoms import federation

from fedcmt.cli import main

ROOT = Path(__file__).parent.parent


def written(settings: dict[str, object], path: Path) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


def test_doctor_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in ("torch", "nnunetv2", "extension", "CPU", "GPU", "nnUNet_raw"):
        assert word in printed


def test_doctor_without_the_extension_names_the_fallback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedcmt import ops

    missing = ops.BackendInfo(False, "No module named 'fedcmt._C'", None, (), (), 0)
    monkeypatch.setattr(ops, "backend_info", lambda: missing)
    assert main(["doctor"]) == 0
    assert "extension: MISSING (No module named 'fedcmt._C')" in capsys.readouterr().out


def test_run_script_runs_and_resumes(raw_datasets: Path, preprocessed: Path, tmp_path: Path) -> None:
    settings = federation(raw_datasets, preprocessed, tmp_path / "unused", rounds=1)
    settings["clients"] = settings["clients"][:2]
    config = written(settings, tmp_path / "config.yaml")
    command = [sys.executable, ROOT / "scripts" / "run_fed.py", config, "--workspace", tmp_path / "w's"]
    first = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "round 1/1" in first.stdout
    again = subprocess.run([*command, "--set", "rounds=2"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "going on after round 1" in again.stdout
    assert "round 2/2" in again.stdout
    assert (tmp_path / "w's" / "report.html").is_file()
    assert not (tmp_path / "unused").exists()


def test_fresh_starts_over(raw_datasets: Path, preprocessed: Path, tmp_path: Path) -> None:
    settings = federation(raw_datasets, preprocessed, tmp_path / "w", rounds=1)
    settings["clients"] = settings["clients"][:1]
    config = str(written(settings, tmp_path / "config.yaml"))
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "notes.txt").write_text("mine")
    assert main(["run", config]) == 0
    before = (tmp_path / "w" / "clients" / "ct_plain" / "last.safetensors").read_bytes()
    assert main(["run", config, "--set", "seed=99"]) == 2
    assert main(["run", config, "--set", "seed=99", "--fresh"]) == 0
    assert (tmp_path / "w" / "clients" / "ct_plain" / "last.safetensors").read_bytes() != before
    assert (tmp_path / "w" / "notes.txt").read_text() == "mine"


def test_preprocess_by_number(raw_datasets: Path, preprocessed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--raw", str(raw_datasets), "--preprocessed", str(preprocessed)]
    assert main(["preprocess", "-d", "801", "Dataset804_Classes", *folders]) == 0
    printed = capsys.readouterr().out
    assert "Dataset801_Plain: segmentation, 2 cases" in printed
    assert "Dataset804_Classes: classification, 4 cases" in printed


def test_preprocess_reads_the_environment(
    raw_datasets: Path, preprocessed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_raw", str(raw_datasets))
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    assert main(["preprocess", "-d", "803"]) == 0
    assert "Dataset803_TwoChannels" in capsys.readouterr().out


def test_preprocess_for_a_federation(
    raw_datasets: Path, preprocessed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(federation(raw_datasets, preprocessed, tmp_path / "w"), tmp_path / "config.yaml")
    assert main(["preprocess", "--config", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "mr_class: classification" in printed
    assert not (tmp_path / "w").exists()


def test_report_and_export(finished: Path, tmp_path: Path) -> None:
    (finished / "report.html").unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").is_file()
    target = tmp_path / "model"
    assert main(["export", str(finished), "--client", "ct_plain", "-o", str(target)]) == 0
    assert (target / "fold_0" / "checkpoint_final.pth").is_file()
    assert main(["export", str(finished), "--client", "ct_plain", "-o", str(target)]) == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run", "none.yaml"], "cannot read config file none.yaml"),
        (["preprocess"], "nothing to preprocess"),
        (["preprocess", "-d", "999", "--raw", "."], "999"),
        (["report", "."], "no workspace"),
        (["export", ".", "--client", "x", "-o", "y"], "no workspace"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    part: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert part in lines[0]
    assert not list(tmp_path.iterdir())


def test_importing_the_package_is_light() -> None:
    """No torch, no nnU-Net: `import fedcmt` must stay quick."""
    code = "import sys, fedcmt; sys.exit(bool({'torch', 'nnunetv2', 'fedcmt._C'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
