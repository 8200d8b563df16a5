"""Which of a client's models is used: the last round's, or the best on held-out cases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fedcmt import run_federation
from fedcmt.checkpoint import existing_client, load_model
from fedcmt.cli import main as fedcmt
from fedcmt.config import load_config
from fedcmt.files import read_json, read_tensors
from fedcmt.infer import main as infer


@pytest.fixture
def workspace(finished: Path, tmp_path: Path) -> Path:
    """A finished federation of one's own."""
    return Path(shutil.copytree(finished, tmp_path / "workspace"))


def holds(workspace: Path, client: str, file: Path, checkpoint: str | None = None) -> bool:
    """Whether the model in use has the tensors of a file."""
    parameters = dict(load_model(existing_client(workspace, client, checkpoint))[0].named_parameters())
    tensors = read_tensors(file)[0]
    return all(torch.equal(parameter, tensors[name]) for name, parameter in parameters.items())


def test_a_client_has_a_best_and_a_last_model(workspace: Path) -> None:
    folder = workspace / "clients" / "ct_plain"
    best, last = folder / "best.safetensors", folder / "last.safetensors"
    first = read_tensors(best)[0]
    assert any(not torch.equal(tensor, read_tensors(last)[0][name]) for name, tensor in first.items())
    assert holds(workspace, "ct_plain", last)
    assert holds(workspace, "ct_plain", best, "best")
    assert holds(workspace, "ct_plain", last, "last")
    assert not holds(workspace, "ct_plain", best, "last")


def test_scores_are_those_of_the_last_model(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    results = read_json(finished / "results.json")
    for entry in results["clients"]:
        last = [line for line in lines if line.get("client") == entry["client"]][-1]
        score = last["aggregated"]["score"]
        assert entry["model"] == {"round": results["rounds"], "stage": "aggregated", "score": score}


def test_going_on_with_the_other_one_scores_and_exports_it(workspace: Path) -> None:
    config = load_config(workspace / "config.yaml", [f"workspace={workspace}", "inference.checkpoint=best"])
    before = (workspace / "metrics.jsonl").read_bytes()
    result = run_federation(config)
    assert (workspace / "metrics.jsonl").read_bytes() == before
    lines = [json.loads(line) for line in before.decode().splitlines()]
    for entry in read_json(result.workspace / "results.json")["clients"]:
        last = [line for line in lines if line.get("client") == entry["client"]][-1]
        assert entry["model"] == last["best"]
        assert holds(workspace, entry["client"], workspace / "clients" / entry["client"] / "best.safetensors")
    exported = torch.load(
        workspace / "clients" / "ct_plain" / "model" / "fold_0" / "checkpoint_final.pth", weights_only=True
    )
    best_model = load_model(existing_client(workspace, "ct_plain", "best"))[0].state_dict()
    assert all(torch.equal(tensor, best_model[name]) for name, tensor in exported["network_weights"].items())


def test_export_takes_the_named_one(workspace: Path, tmp_path: Path) -> None:
    for checkpoint in ("best", "last"):
        target = tmp_path / checkpoint
        command = ["export", str(workspace), "--client", "ct_plain", "--checkpoint", checkpoint, "-o", str(target)]
        assert fedcmt(command) == 0
        weights = torch.load(target / "fold_0" / "checkpoint_final.pth", weights_only=True)["network_weights"]
        expected = load_model(existing_client(workspace, "ct_plain", checkpoint))[0].state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def test_another_name_is_one_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--workspace", str(finished), "--client", "ct_plain", "-i", str(tmp_path), "-o", str(tmp_path / "o")]
    assert infer([*arguments, "--checkpoint", "final"]) == 2
    error = capsys.readouterr().err
    assert "--checkpoint" in error
    assert "best or last" in error
    assert error.count("\n") == 1
