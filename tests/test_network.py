"""Adaptor, encoder, decoder and pooled head."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedcmt.config import TopologyConfig
from fedcmt.network import LSE_SHARPNESS, PooledHead, build_network, parameters_of
from fedcmt.plans import TopologyContract

CONTRACT = TopologyContract.of(TopologyConfig(features=[4, 8, 16], adaptor_width=6))


def build(task: str, channels: int, heads: int, *, deep_supervision: bool = False) -> nn.Module:
    return build_network(CONTRACT.architecture(task), channels, heads, deep_supervision=deep_supervision)


def test_encoders_are_interchangeable_between_tasks_and_channels() -> None:
    networks = [build("segmentation", 1, 3), build("segmentation", 4, 7), build("classification", 2, 2)]
    shapes = [{name: p.shape for name, p in parameters_of(network, "encoder").items()} for network in networks]
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0]


def test_every_parameter_belongs_to_exactly_one_part() -> None:
    for task in ("segmentation", "classification"):
        network = build(task, 2, 3)
        parts = [set(parameters_of(network, part)) for part in ("adaptor", "encoder", "decoder")]
        names = {name for name, _ in network.named_parameters()}
        assert set.union(*parts) == names
        assert sum(map(len, parts)) == len(names)
        assert not any("all_modules" in name or name.startswith("decoder.encoder") for name in names)


def test_segmentation_shapes() -> None:
    x = torch.randn(2, 2, 16, 8, 24)
    assert build("segmentation", 2, 5)(x).shape == (2, 5, 16, 8, 24)
    outputs = build("segmentation", 2, 5, deep_supervision=True)(x)
    assert [tuple(o.shape[2:]) for o in outputs] == [(16, 8, 24), (8, 4, 12)]


def test_classification_shape() -> None:
    assert build("classification", 1, 4)(torch.randn(3, 1, 16, 8, 24)).shape == (3, 4)


def test_pooling_is_log_sum_exp_of_the_map() -> None:
    head = PooledHead(nn.Conv3d, 5, 2).double()
    x = torch.randn(2, 5, 3, 4, 2, dtype=torch.float64)
    scores = head.prediction_map(x.clone()).flatten(2)
    expected = (torch.exp(LSE_SHARPNESS * scores).mean(2)).log() / LSE_SHARPNESS
    assert torch.allclose(head(x), expected, rtol=1e-12)
    assert torch.all(scores.mean(2) <= head(x) + 1e-12)
    assert torch.all(head(x) <= scores.amax(2) + 1e-12)


def test_pooling_is_finite_for_large_scores_and_its_gradient_sums_to_one() -> None:
    head = PooledHead(nn.Conv3d, 1, 1)
    head.prediction_map = nn.Identity()
    assert torch.isfinite(head(torch.full((1, 1, 4, 4, 4), 1e30))).all()
    x = (100 * torch.rand(1, 1, 4, 4, 4)).requires_grad_()
    head(x).sum().backward()
    # The method's published code divides this gradient by r.
    assert math.isclose(float(x.grad.sum()), 1.0, rel_tol=1e-4)


def test_plans_cannot_name_foreign_classes() -> None:
    architecture = CONTRACT.architecture("segmentation")
    with pytest.raises(ValueError, match="network class"):
        build_network({**architecture, "network_class_name": "os.system"}, 1, 2)
    kwargs = {**architecture["arch_kwargs"], "norm_op": "subprocess.Popen"}
    with pytest.raises(ValueError, match="norm_op"):
        build_network({**architecture, "arch_kwargs": kwargs}, 1, 2)


def test_contract_digest_ignores_the_personal_decoder() -> None:
    base = TopologyConfig(features=[4, 8, 16])
    assert (
        TopologyContract.of(base).digest()
        == TopologyContract.of(base.model_copy(update={"decoder_convs_per_stage": 2})).digest()
    )
    assert (
        TopologyContract.of(base).digest() != TopologyContract.of(base.model_copy(update={"adaptor_width": 8})).digest()
    )
