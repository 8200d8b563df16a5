"""The flat buffer: parameters are views of it, in channels-last order, and nothing else stands in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedcmt.layout import FlatLayout


def make_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(3, 5, (1, 3, 3)), nn.InstanceNorm3d(5, affine=True), nn.Conv3d(5, 7, 3))


def test_binding_keeps_values_and_makes_views() -> None:
    module, before = make_module(), make_module()
    layout = FlatLayout.of(module.named_parameters())
    flat = layout.bind(dict(module.named_parameters()), torch.device("cpu"))
    for (name, after), (_, old) in zip(module.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(after, old), name
        assert after.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    flat.add_(1)
    for after, old in zip(module.parameters(), before.parameters(), strict=True):
        assert torch.equal(after, old + 1)


def test_convolutions_stand_in_channels_last_order_and_aligned() -> None:
    module = make_module()
    layout = FlatLayout.of(module.named_parameters())
    layout.bind(dict(module.named_parameters()), torch.device("cpu"))
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert all(segment.offset % 16 == 0 for segment in layout.segments)


def test_training_writes_through_the_buffer() -> None:
    module = make_module()
    layout = FlatLayout.of(module.named_parameters())
    flat = layout.bind(dict(module.named_parameters()), torch.device("cpu"))
    before = flat.clone()
    optimizer = torch.optim.AdamW(module.parameters(), 0.1)
    module(torch.randn(1, 3, 4, 8, 8)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(flat, before)
    assert torch.equal(layout.segments[0].view(flat), module[0].weight)


def test_gaps_hold_zeros() -> None:
    module = make_module()
    layout = FlatLayout.of(module.named_parameters())
    flat = layout.bind(dict(module.named_parameters()), torch.device("cpu"))
    assert float(flat.double().abs().sum()) == pytest.approx(
        sum(float(p.detach().double().abs().sum()) for p in module.parameters()), rel=1e-12
    )


def test_digest_tells_layouts_apart() -> None:
    one = FlatLayout.of(make_module().named_parameters())
    other = FlatLayout.of(nn.Conv3d(3, 5, 3).named_parameters())
    assert one.digest() == FlatLayout.of(make_module().named_parameters()).digest() != other.digest()


def test_foreign_parameters_are_refused() -> None:
    layout = FlatLayout.of(make_module().named_parameters())
    with pytest.raises(ValueError, match="do not match"):
        layout.bind({"other": nn.Parameter(torch.zeros(1))}, torch.device("cpu"))
