"""The whole federation: what it leaves behind, resuming after kill -9, and one line for every mistake."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from phantoms import federation, write_dataset

from fedcmt import run_federation
from fedcmt.errors import InputError
from fedcmt.files import read_tensors

NAMES = ["ct_plain", "ct_regions", "mr_two", "mr_class"]


def metrics_of(workspace: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workspace / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def states_of(workspace: Path) -> dict[str, bytes]:
    files = [workspace / "server" / "round-0002.safetensors"]
    for name in NAMES:
        folder = workspace / "clients" / name
        files += [folder / "state" / "round-0002.safetensors", folder / "best.safetensors", folder / "last.safetensors"]
    return {str(file.relative_to(workspace)): file.read_bytes() for file in files}


def test_workspace_holds_the_contract(finished: Path) -> None:
    for path in ("config.yaml", "metrics.jsonl", "results.json", "report.html", "server/round-0002.safetensors"):
        assert (finished / path).is_file(), path
    assert list((finished / "tensorboard").glob("events*"))
    for name in NAMES:
        for file in (
            "best.safetensors",
            "last.safetensors",
            "decoder.safetensors",
            "plans.json",
            "dataset.json",
            "model/plans.json",
            "model/dataset.json",
            "model/fold_0/checkpoint_final.pth",
        ):
            assert (finished / "clients" / name / file).is_file(), (name, file)
    assert (finished / "predictions" / "ct_plain" / "case_02.nii.gz").is_file()
    assert (finished / "predictions" / "mr_class" / "predictions.csv").is_file()
    assert not list(finished.rglob("*.part"))


def test_metrics_have_a_line_per_round_and_client(finished: Path) -> None:
    lines = metrics_of(finished)
    for round_index in (1, 2):
        now = [line for line in lines if line["round"] == round_index]
        assert [line["client"] for line in now if line["kind"] == "client"] == NAMES
        server = [line for line in now if line["kind"] == "server"]
        assert server[0]["clients"] == sorted(NAMES)
        assert server[0]["groups"] == {"CT-1": ["ct_plain", "ct_regions"], "MR-1": ["mr_class"], "MR-2": ["mr_two"]}


def test_best_is_the_best_of_the_scores_seen(finished: Path) -> None:
    for name in NAMES:
        lines = [line for line in metrics_of(finished) if line.get("client") == name]
        seen = {(line["round"], stage): line[stage]["score"] for line in lines for stage in ("local", "aggregated")}
        best = lines[-1]["best"]
        assert best["score"] == max(seen.values()) == seen[best["round"], best["stage"]]
        facts = read_tensors(finished / "clients" / name / "best.safetensors")[1]
        assert {key: facts[key] for key in best} == best


def test_saved_best_model_really_has_its_score(finished: Path, raw_datasets: Path, preprocessed: Path) -> None:
    """The file is the model that was scored, not one a round younger or older."""
    from fedcmt.config import load_config
    from fedcmt.device import choose_device
    from fedcmt.federation import prepare_clients
    from fedcmt.files import copy_into
    from fedcmt.trainer import Trainer

    config = load_config(federation(raw_datasets, preprocessed, finished))
    plans = prepare_clients(config)
    for name in ("ct_plain", "mr_class"):
        trainer = Trainer(
            plans[name], config.training, client=name, seed=config.seed, rounds=2, device=choose_device("auto")
        )
        path = finished / "clients" / name / "best.safetensors"
        tensors, facts = read_tensors(path)
        copy_into(trainer.model(), tensors, source=path)
        assert trainer.validate().score == pytest.approx(facts["score"], abs=1e-9)


def test_last_models_hold_what_the_server_sent(finished: Path) -> None:
    last = {name: read_tensors(finished / "clients" / name / "last.safetensors")[0] for name in NAMES}
    server = read_tensors(next((finished / "server").glob("round-*.safetensors")))[0]
    keys = {"ct_plain": "CT segmentation lesion+organ", "ct_regions": "CT segmentation lesion+whole"}
    for name, key in keys.items():
        own = torch.cat([value.flatten() for part, value in last[name].items() if part.startswith("encoder.")])
        sent = server[f"encoder.{key}"]
        # The flat buffer has gaps of zeros between tensors.
        assert torch.equal(own[own != 0].sort().values, sent[sent != 0].sort().values)
    plain, regions, mr = (last[name] for name in ("ct_plain", "ct_regions", "mr_two"))
    assert torch.equal(plain["adaptor.conv.weight"], regions["adaptor.conv.weight"])
    up = "decoder.transpconvs.0.weight"
    assert torch.equal(plain[up], mr[up])  # the same labels
    assert not torch.equal(plain[up], regions[up])


def test_results_name_their_kind(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    kinds = {entry["client"]: entry["score_kind"] for entry in results["clients"]}
    assert kinds == dict.fromkeys(NAMES, "test")
    regions = next(entry for entry in results["clients"] if entry["client"] == "ct_regions")
    assert regions["labels"] == {"whole": [1, 2], "lesion": [2]}
    assert set(regions["mean"]) == {"whole", "lesion"}


def test_running_again_changes_nothing(finished: Path, raw_datasets: Path, preprocessed: Path) -> None:
    before = states_of(finished), metrics_of(finished)
    run_federation(federation(raw_datasets, preprocessed, finished))
    assert (states_of(finished), metrics_of(finished)) == before


def test_killed_anywhere_it_ends_bit_identical(
    finished: Path, raw_datasets: Path, preprocessed: Path, tmp_path: Path
) -> None:
    """One workspace, killed at nine points one after the other, against the undisturbed one."""
    from killed_run import POINTS

    workspace = tmp_path / "killed"
    settings = federation(raw_datasets, preprocessed, workspace)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    for point in POINTS:
        script = Path(__file__).parent / "killed_run.py"
        done = subprocess.run([sys.executable, script, point, config], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, (point, done.stdout, done.stderr)
    run_federation(settings)
    assert metrics_of(workspace) == metrics_of(finished)
    reference = states_of(finished)
    for name, content in states_of(workspace).items():
        assert content == reference[name], name


def test_a_damaged_newest_state_falls_back_to_the_one_before(
    finished: Path, raw_datasets: Path, preprocessed: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "damaged"
    settings = federation(raw_datasets, preprocessed, workspace)
    run_federation(settings)
    newest = workspace / "server" / "round-0002.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    run_federation(settings)
    assert states_of(workspace) == states_of(finished)


@pytest.mark.parametrize("strategy", ["local", "fedavg"])
def test_other_strategies_run(strategy: str, raw_datasets: Path, preprocessed: Path, tmp_path: Path) -> None:
    settings = federation(raw_datasets, preprocessed, tmp_path / strategy, strategy=strategy)
    settings["clients"] = settings["clients"][:3]
    result = run_federation(settings)
    clients = [line for line in metrics_of(result.workspace) if line["kind"] == "client"]
    assert all(("aggregated" in line) == (strategy != "local") for line in clients)
    models = [read_tensors(result.workspace / "clients" / name / "last.safetensors")[0] for name in NAMES[:3]]
    same = torch.equal(
        models[0]["encoder.stages.0.0.convs.0.conv.weight"], models[1]["encoder.stages.0.0.convs.0.conv.weight"]
    )
    assert same == (strategy != "local")


def test_sgd_with_reset_and_batch_norm_runs(raw_datasets: Path, preprocessed: Path, tmp_path: Path) -> None:
    settings = federation(raw_datasets, preprocessed, tmp_path / "sgd")
    settings["clients"] = settings["clients"][:1]
    settings["topology"] = {**settings["topology"], "norm": "batch"}
    settings["training"] = {
        **settings["training"],
        "optimizer": "sgd",
        "optimizer_state": "reset",
        "learning_rate_schedule": "constant",
        "deep_supervision": False,
    }
    assert run_federation(settings).results["clients"][0]["score_kind"] == "test"


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        (("clients", 0, "dataset"), 999, ["client 'ct_plain'", "999"]),
        (("clients", 2, "channels"), 1, ["client 'mr_two'", "channels", "expected 1", "has 2"]),
        (("clients", 0, "modality"), "MR", ["client 'ct_plain'", "modality"]),
        (("clients", 2, "modality"), "CT", ["client 'mr_two'", "modality"]),
        (("clients", 0, "task"), "classification", ["client 'ct_plain'", "task"]),
        (("clients", 3, "task"), "segmentation", ["client 'mr_class'", "task"]),
        (("clients", 0, "patch_size"), [16, 15, 16], ["client 'ct_plain'", "patch_size", "[16, 12, 16]"]),
        (("clients", 0, "fold"), 7, ["client 'ct_plain'", "fold"]),
        (("strategy",), "fedcmtx", ["unknown strategy"]),
        (("strategy",), {"name": "tuned-weights", "client_weights": {"nobody": 1}}, ["no client 'nobody'"]),
        (("device",), "cuda:99", ["device"]),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    path: tuple, value: object, parts: list[str], raw_datasets: Path, preprocessed: Path, tmp_path: Path
) -> None:
    settings = federation(raw_datasets, preprocessed, tmp_path / "workspace")
    node = settings
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(InputError) as caught:
        run_federation(settings)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert not (tmp_path / "workspace").exists()


def test_a_workspace_of_another_federation_is_refused(finished: Path, raw_datasets: Path, preprocessed: Path) -> None:
    with pytest.raises(InputError, match="field 'seed'"):
        run_federation(federation(raw_datasets, preprocessed, finished, seed=4))


def test_the_backend_of_patches_is_kept(finished: Path, raw_datasets: Path, preprocessed: Path) -> None:
    own = yaml.safe_load((finished / "config.yaml").read_text())["data"]["backend"]
    assert own == ("dali" if torch.cuda.is_available() else "torch")
    other = {"dali": "torch", "torch": "dali"}[own]
    with pytest.raises(InputError, match=rf"field 'data.backend': .* was made with backend {own}, found {other}"):
        run_federation(federation(raw_datasets, preprocessed, finished, data={"backend": other}))
    run_federation(federation(raw_datasets, preprocessed, finished, data={"threads": 2, "ahead": 1}))


def test_a_workspace_in_use_is_refused(raw_datasets: Path, preprocessed: Path, tmp_path: Path) -> None:
    from fedcmt.checkpoint import Workspace

    workspace = Workspace(tmp_path / "busy")
    with workspace.locked(), pytest.raises(InputError, match="in use"):
        run_federation(federation(raw_datasets, preprocessed, workspace.path))


def test_one_case_is_scored_as_training_site(preprocessed: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path, "Dataset810_Single", modality="CT", train=1, test=0)
    settings = federation(tmp_path, preprocessed, tmp_path / "single", rounds=1)
    settings["clients"] = [{"name": "alone", "dataset": 810, "modality": "CT", "patch_size": [16, 16, 16]}]
    assert run_federation(settings).results["clients"][0]["score_kind"] == "training-site"
