"""Lean networks: normalisation in place gives the bits of torch, whatever the shape; networks answer as before."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import nn
from torch.nn import functional

from fedcmt import ops
from fedcmt.lean_network import InPlaceNorm, LeanDecoder, make_lean

NATIVE = pytest.mark.skipif(not ops.backend_info().native, reason="no extension")
BACKENDS = ["reference", pytest.param("native", marks=NATIVE)]
SHAPES = [(1, 8, 16, 16, 16), (2, 5, 7, 9, 3), (1, 3, 1, 1, 2), (3, 1, 40, 65), (1, 2, 64, 64, 65), (2, 3, 5)]
BLOCK = {
    "n_stages": 3, "features_per_stage": (4, 8, 8), "conv_op": nn.Conv3d, "kernel_sizes": 3, "strides": (1, 2, 2),
    "conv_bias": True, "norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True},
}  # fmt: skip


def made(shape: Sequence[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values of some offset and scale, weights and biases."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator) * 3 + 1
    return x, torch.rand(shape[1], generator=generator) + 0.5, torch.randn(shape[1], generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_are_those_of_torch(backend: ops.Backend, slope: float, shape: tuple[int, ...]) -> None:
    x, weight, bias = made(shape)
    expected = functional.leaky_relu(functional.instance_norm(x, None, None, weight, bias, eps=1e-5), slope)
    given = ops.instance_norm_(x, weight, bias, negative_slope=slope, backend=backend)
    assert given is x
    if ops.backend_info().cpu_path == "plain" and backend == "native":
        torch.testing.assert_close(x, expected)  # no fused multiply-add
    else:
        assert torch.equal(x, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_that_are_none_spoil_their_own_channel_alone(backend: ops.Backend) -> None:
    x, weight, bias = made((1, 3, 6, 7, 8))
    x[0, 1, 2, 3, 4] = float("nan")
    ops.instance_norm_(x, weight, bias, backend=backend)
    assert x[0, 1].isnan().all()
    assert x[0, [0, 2]].isfinite().all()


@NATIVE
def test_threads_do_not_change_the_bits() -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x, weight, bias = made((2, 5, 9, 11, 13))
            results.append(ops.instance_norm_(x, weight, bias, negative_slope=0.01, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 2, 3, 4).half()}, "float32"),
        ({"x": torch.zeros(1, 2)}, r"\[B, C, ...\]"),
        ({"x": torch.zeros(1, 2, 4, 6)[..., ::2]}, "gaps"),
        ({"x": torch.zeros(1, 2, 1)}, "two values"),
        ({"weight": torch.ones(3)}, "weight"),
        ({"bias": torch.ones(2).double()}, "bias"),
        ({"negative_slope": 1.5}, "negative_slope"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_arguments_are_checked(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.zeros(1, 2, 3, 4), "weight": torch.ones(2), "bias": torch.zeros(2)} | change
    x, weight, bias = (arguments.pop(name) for name in ("x", "weight", "bias"))
    with pytest.raises((TypeError, ValueError), match=message):
        ops.instance_norm_(x, weight, bias, **arguments)


@NATIVE
@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_a_network_answers_as_before_and_keeps_its_names(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "plain":
        network = PlainConvUNet(2, num_classes=3, n_conv_per_stage=2, n_conv_per_stage_decoder=1, **BLOCK)
    else:
        network = ResidualEncoderUNet(2, num_classes=3, n_blocks_per_stage=2, n_conv_per_stage_decoder=1, **BLOCK)
    changed = deepcopy(network)
    make_lean(changed)
    kinds = {type(module) for module in changed.modules()}
    assert {InPlaceNorm, LeanDecoder} <= kinds
    assert not {nn.InstanceNorm3d, UNetDecoder} & kinds
    assert changed.state_dict().keys() == network.state_dict().keys()
    weights = {name: tensor + 0.01 for name, tensor in network.state_dict().items()}
    for each in (network, changed):
        each.load_state_dict(weights, assign=True)
    x = torch.randn(1, 2, 16, 16, 16)
    before = x.clone()
    with torch.inference_mode():
        assert torch.equal(changed(x), network(x))
    assert torch.equal(x, before)


@NATIVE
@pytest.mark.parametrize(
    "change",
    [
        {"norm_op": nn.BatchNorm3d},
        {"norm_op_kwargs": {"affine": False}},
        {"norm_op_kwargs": {"affine": True, "track_running_stats": True}},
        {"nonlin": nn.ReLU},
        {"nonlin_kwargs": {"negative_slope": -0.5}},
        {"dropout_op": nn.Dropout3d, "dropout_op_kwargs": {"p": 0.5}},
    ],
)
def test_other_blocks_stay_as_they_are(change: dict[str, object]) -> None:
    network = PlainConvUNet(1, num_classes=2, n_conv_per_stage=1, n_conv_per_stage_decoder=1, **(BLOCK | change))
    make_lean(network)
    assert not any(isinstance(module, (InPlaceNorm, nn.Identity)) for module in network.modules())
