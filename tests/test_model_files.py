"""Model files from elsewhere: nothing in them runs, and what does not fit is one line with exit code 2."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcmt.checkpoint import ClientFolder
from fedcmt.files import read_json, read_tensors, write_json, write_tensors
from fedcmt.infer import main


class Payload:
    """Unpickling it would write a file."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self._target, "executed"))


def pickled(folder: ClientFolder) -> None:
    folder.weights.write_bytes(pickle.dumps(Payload(folder.path.parent / "executed")))


def torch_saved(folder: ClientFolder) -> None:
    torch.save({"a": Payload(folder.path.parent / "executed")}, folder.weights)


def truncated(folder: ClientFolder) -> None:
    content = folder.weights.read_bytes()
    folder.weights.write_bytes(content[: len(content) // 2])


def weights(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Callable[[ClientFolder], None]:
    def apply(folder: ClientFolder) -> None:
        tensors, facts = read_tensors(folder.weights)
        change(tensors, facts)
        write_tensors(folder.weights, tensors, facts)

    return apply


def reshaped(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name][None]


def without_one(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
    del tensors[next(iter(tensors))]


def with_nan(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
    next(iter(tensors.values())).fill_(torch.nan)


def document(name: str, *path: str, value: Any) -> Callable[[ClientFolder], None]:
    def apply(folder: ClientFolder) -> None:
        content = read_json(getattr(folder, name))
        node = content
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        write_json(getattr(folder, name), content)

    return apply


PLAN = ("configurations", "3d_fullres")
NETWORK = (*PLAN, "architecture")
FAULTS: dict[str, tuple[Callable[[ClientFolder], None], str]] = {
    "pickle": (pickled, "no FedCMT file"),
    "torch checkpoint": (torch_saved, "no FedCMT file"),
    "truncated": (truncated, "truncated"),
    "empty": (lambda folder: folder.weights.write_bytes(b"") and None, "truncated"),
    "shape": (weights(reshaped), "does not fit the network"),
    "dtype": (weights(lambda t, _: t.update({n: v.double() for n, v in t.items()})), "does not fit the network"),
    "missing tensor": (weights(without_one), "on one side only"),
    "extra tensor": (weights(lambda t, _: t.update(more=torch.ones(2))), "on one side only"),
    "NaN": (weights(with_nan), "NaN or Inf"),
    "another topology": (weights(lambda _, facts: facts.update(topology="0" * 64)), "another topology"),
    "plan of another topology": (
        document("plans", *NETWORK, "arch_kwargs", "features_per_stage", value=[4, 8, 32]),
        "another topology",
    ),
    "class to run": (document("plans", *NETWORK, "network_class_name", value="os.system"), "network class"),
    "function to run": (document("plans", *NETWORK, "arch_kwargs", "norm_op", value="os.system"), "topology"),
    "normalisation to run": (document("plans", *PLAN, "normalization_schemes", value=["os; rm"]), "functions named"),
    "huge": (document("plans", *NETWORK, "arch_kwargs", "features_per_stage", value=[10**9] * 3), "above 4096"),
    "huge patch": (document("plans", *PLAN, "patch_size", value=[10**6] * 3), "patch_size"),
    "no configuration": (document("plans", "configurations", value={}), "no plan of 3d_fullres"),
    "plans a list": (lambda folder: folder.plans.write_text("[]") and None, "no plan of 3d_fullres"),
    "plans no JSON": (lambda folder: folder.plans.write_text("{") and None, "no valid JSON"),
    "plans missing": (lambda folder: folder.plans.unlink(), "cannot read"),
    "heads": (document("facts", "num_heads", value=10**9), "num_heads"),
    "task": (document("facts", "task", value="other"), "names no task"),
    "facts a list": (lambda folder: folder.facts.write_text("[]") and None, "names no task"),
    "axes": (document("facts", "mirror_axes", value=[5]), "mirror_axes"),
    "labels": (document("dataset_json", "labels", value={"background": 0, "a": 2}), "gap"),
    "channels": (document("dataset_json", "channel_names", value={"0": "CT", "1": "MR"}), "normalization_schemes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_file_that_does_not_fit(
    finished: Path, raw_datasets: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, part = FAULTS[fault]
    folder = ClientFolder(tmp_path / "w" / "clients" / "ct_plain")
    shutil.copytree(finished / "clients" / "ct_plain", folder.path)
    spoil(folder)
    scan = raw_datasets / "Dataset801_Plain" / "imagesTs" / "case_02_0000.nii.gz"
    arguments = [
        "--workspace",
        str(tmp_path / "w"),
        "--client",
        "ct_plain",
        "-i",
        str(scan),
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert any(part in line for line in lines), lines
    assert all(line.startswith(("error: ", "  ")) for line in lines)
    assert not list(tmp_path.glob("out/*"))
    assert not list(tmp_path.rglob("executed"))
