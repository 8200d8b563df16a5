"""Faster networks on CPUs: close to the exact one, compared where they may not be, refused where they cannot run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from stock_models import write_model, write_scan

from fedcmt import precision
from fedcmt.errors import InputError
from fedcmt.infer import Predictor, main
from fedcmt.precision import agreement, check_precision
from fedcmt.volume import read_volume

openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two folds."""
    return write_model(tmp_path_factory.mktemp("model") / "model", folds=(0, 1))


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan of several tiles."""
    return write_scan(tmp_path_factory.mktemp("scan"), "scan", shape=(14, 20, 22))[0]


@openvino
@pytest.mark.parametrize("folds", [(0,), (0, 1)])
def test_fast_labels_are_those_of_the_exact_network_but_for_rounding(
    model: Path, scan: Path, folds: tuple[int, ...]
) -> None:
    volume = read_volume(scan)
    exact, fast = (
        Predictor.from_model_folder(model, folds, device="cpu", mirroring=False, precision=name).predict(volume).data
        for name in ("exact", "fast")
    )
    assert (exact == fast).mean() >= 0.9999
    assert len(np.unique(exact)) > 1


@pytest.mark.parametrize("has_openvino", [pytest.param(True, marks=openvino), False])
def test_bf16_is_used_after_a_printed_comparison(
    model: Path,
    scan: Path,
    has_openvino: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not has_openvino:
        monkeypatch.setattr(precision, "find_spec", lambda name: None)
    monkeypatch.setattr("fedcmt.segmenter.LEAST_AGREEMENT", 0.8)  # untrained networks hardly tell labels apart
    options = {"device": "cpu", "mirroring": False}
    volume = read_volume(scan)
    exact = Predictor.from_model_folder(model, [0], **options).predict(volume).data
    capsys.readouterr()
    predictor = Predictor.from_model_folder(model, [0], precision="bf16", **options)
    labels = predictor.predict(volume).data
    predictor.predict(volume)
    (line,) = capsys.readouterr().out.splitlines()
    assert "bf16 gives the same label in" in line
    assert (exact == labels).mean() > 0.8
    assert not np.array_equal(exact, labels) or not has_openvino


def test_bf16_that_disagrees_is_not_used(
    model: Path, scan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcmt.segmenter.faster_network", lambda *_: lambda patch: torch.rand(1, 3, *patch.shape[2:]))
    options = {"device": "cpu", "mirroring": False}
    volume = read_volume(scan)
    labels = Predictor.from_model_folder(model, precision="bf16", **options).predict(volume).data
    assert "going on with the exact network" in capsys.readouterr().out
    assert np.array_equal(labels, Predictor.from_model_folder(model, **options).predict(volume).data)


def test_agreement_is_the_share_of_equal_labels() -> None:
    patch = torch.tensor([1.0, 2.0, -1.0, -2.0]).reshape(1, 1, 1, 1, 4)
    share = agreement(lambda x: x, lambda x: x - 1.5, [patch, patch], lambda x: x > 0)
    assert share == 0.75


def test_fast_without_openvino_is_one_line(
    model: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    flags = ["--precision", "fast", "--device", "cpu"]
    assert main(["-m", str(model), "-i", str(scan), "-o", str(tmp_path / "out"), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'fedcmt[openvino]'" in line


def test_precisions_are_for_cpus_and_known() -> None:
    with pytest.raises(InputError, match="--device cpu"):
        check_precision("bf16", torch.device("cuda"))
    with pytest.raises(InputError, match="unknown precision"):
        check_precision("fp8", torch.device("cpu"))
    check_precision("exact", torch.device("cuda"))
