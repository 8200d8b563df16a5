"""Starting from a checkpoint: read safely, matched by name and shape, reported, refused when nothing fits."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from fedcmt.config import TopologyConfig, load_config
from fedcmt.errors import InputError
from fedcmt.federation import _initial_weights
from fedcmt.files import write_tensors
from fedcmt.initial_weights import read_weights, start_from
from fedcmt.network import build_network
from fedcmt.topology import TopologyContract


def contract(encoder: str, width: int = 4) -> TopologyContract:
    settings = {"features": [4, 8, 8], "adaptor_width": width, "encoder": encoder}
    return TopologyContract.of(TopologyConfig.model_validate(settings))


def stock(encoder: str) -> nn.Module:
    """nnU-Net's own network of the same stages."""
    kwargs = {k: v for k, v in contract(encoder).arch_kwargs.items() if k != "adaptor_width"}
    name = "PlainConvUNet" if encoder == "plain" else "ResidualEncoderUNet"
    network = f"dynamic_network_architectures.architectures.unet.{name}"
    torch.manual_seed(1)
    return get_network_from_plans(network, kwargs, ["conv_op", "norm_op", "nonlin"], 1, 3)


def checkpoint(network: nn.Module, path: Path, **more: Any) -> Path:
    """As stock nnU-Net writes it: curves and scores are NumPy scalars."""
    content = {
        "network_weights": network.state_dict(),
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "logging": {"ema_fg_dice": [np.float64(0.5)], "train_losses": [np.float32(1.0)], "n": [np.int64(3)]},
        "_best_ema": np.float64(0.5),
        "init_args": {"plans": {"spacing": [1.0]}, "fold": 0, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
        **more,
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize("encoder", ["plain", "residual"])
def test_a_stock_network_starts_adaptor_encoder_and_decoder(encoder: str, tmp_path: Path) -> None:
    theirs = stock(encoder)
    weights = read_weights(checkpoint(theirs, tmp_path / "checkpoint_final.pth"))
    ours = build_network(contract(encoder).architecture("segmentation"), 1, 3)
    matched = start_from(ours, weights, ["adaptor", "encoder", "decoder"])
    first = "encoder.stages.0.0.convs.0." if encoder == "plain" else "encoder.stem.convs.0."
    # The encoder's first block reads the adaptor here and the image there.
    assert set(matched.left) == {first + name for name in ("conv.weight", "conv.bias", "norm.weight", "norm.bias")}
    assert not matched.unused
    state = theirs.state_dict()
    for name, tensor in ours.named_parameters():
        if name not in matched.left:
            assert torch.equal(tensor, state[name.replace("adaptor.", first)]), name


def test_parts_and_shapes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    weights = read_weights(checkpoint(stock("plain"), tmp_path / "x.pth"))
    ours = build_network(contract("plain", width=6).architecture("segmentation"), 2, 5)
    before = {name: tensor.clone() for name, tensor in ours.named_parameters()}
    matched = start_from(ours, weights, ["adaptor", "encoder"])
    assert matched.left["adaptor.conv.weight"] == "4x1x3x3x3 in the checkpoint, 6x2x3x3x3 here"
    assert all(name.startswith("encoder.") for name in matched.taken)
    for name, tensor in ours.named_parameters():
        assert torch.equal(tensor, before[name]) == (name not in matched.taken or "bias" in name or "norm" in name)
    lines = list(matched.lines())
    assert lines[0].startswith(f"{len(matched.taken)} of {len(matched.taken) + len(matched.left)} tensors taken: ")
    assert "keep their random start: " in lines[1]
    assert not start_from(ours, {"something.else": torch.ones(1)}, ["encoder"]).taken


def test_our_own_models_are_taken_whole(tmp_path: Path) -> None:
    source, target = (build_network(contract("plain").architecture("segmentation"), 1, 3) for _ in range(2))
    write_tensors(tmp_path / "best.safetensors", dict(source.named_parameters()), {})
    matched = start_from(target, read_weights(tmp_path / "best.safetensors"), ["adaptor", "encoder", "decoder"])
    assert not matched.left
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_kernels_of_slices_fit_flat_kernels() -> None:
    settings = {"features": [4, 8, 8], "adaptor_width": 4, "kernel_sizes": [[1, 3, 3]] * 3, "strides": FLAT}
    ours = build_network(TopologyContract.of(TopologyConfig(**settings)).architecture("segmentation"), 1, 2)
    weights = {"encoder.stages.1.0.convs.0.conv.weight": torch.randn(8, 4, 3, 3)}
    assert start_from(ours, weights, ["encoder"]).taken == ("encoder.stages.1.0.convs.0.conv.weight",)


FLAT = [[1, 1, 1], [1, 2, 2], [1, 2, 2]]


class Trap:
    """Runs a command when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    path = checkpoint(nn.Linear(1, 1), tmp_path / "bad.pth", trainer_name=Trap(tmp_path / "executed"))
    with pytest.raises(InputError, match="damaged or holds more than tensors and plain values"):
        read_weights(path)
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    with pytest.raises(InputError, match=r"old\.pth"):
        read_weights(tmp_path / "old.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors"])
def test_a_missing_file_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=name):
        read_weights(tmp_path / name)


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole = checkpoint(stock("plain"), tmp_path / "whole.pth").read_bytes()
    for size in (0, 10, len(whole) // 2):
        (tmp_path / "part.pth").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"part\.pth"):
            read_weights(tmp_path / "part.pth")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="no 'network_weights'"):
        read_weights(tmp_path / "other.pth")


def test_only_those_who_have_not_begun_read_their_checkpoint(tmp_path: Path) -> None:
    for name in ("shared", "old", "new"):
        write_tensors(tmp_path / f"{name}.safetensors", {"decoder.x": torch.ones(1)}, {})
    clients = [
        {
            "name": name,
            "dataset": 1,
            "modality": "CT",
            "joins_at_round": joins,
            "initial_weights": f"{name}.safetensors",
        }
        for name, joins in (("old", 1), ("new", 3))
    ]
    settings = {"name": "study", "clients": clients, "initial_weights": "shared.safetensors"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        read = {first: {str(path) for path in _initial_weights(load_config(settings), first)} for first in (1, 2, 4)}
    assert read[1] == {"shared.safetensors", "old.safetensors", "new.safetensors"}
    assert read[2] == {"new.safetensors"}
    assert not read[4]
