"""Networks made lean for all that needs no gradient on CPUs, with the same bits as answer.

What torch does in three passes and into a new tensor, instance normalisation and leaky ReLU after a convolution, is one
native operation here, with torch's roundings. And a decoder lets go of the encoder's feature maps as it uses them.
"""

from __future__ import annotations

import functools

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import Tensor, nn
from torch.nn import functional

from fedcmt.ops import backend_info, instance_norm_

_NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d)
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


class InPlaceNorm(nn.Module):
    """Instance normalisation and leaky ReLU in one, for what a convolution has just made and nobody else reads.

    Args:
        norm: With weight and bias, whose names are kept.
        negative_slope: Of the ReLU; 1 where there is none.
    """

    def __init__(self, norm: nn.InstanceNorm2d | nn.InstanceNorm3d, negative_slope: float) -> None:
        super().__init__()
        self.weight = norm.weight
        self.bias = norm.bias
        self.epsilon = norm.eps
        self.negative_slope = negative_slope

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[B, C, ...]`."""
        if x.dtype == torch.float32 and x.is_contiguous() and x[0, 0].numel() > 1:
            return instance_norm_(x, self.weight, self.bias, epsilon=self.epsilon, negative_slope=self.negative_slope)
        y = functional.instance_norm(x, None, None, self.weight, self.bias, eps=self.epsilon)
        return functional.leaky_relu_(y, self.negative_slope)


class LeanDecoder(nn.Module):
    """A U-Net's decoder that takes the encoder's feature maps out of the list it is given.

    Args:
        decoder: Without deep supervision; its parts are taken over under their names.
    """

    transpconvs: nn.ModuleList
    stages: nn.ModuleList
    seg_layers: nn.ModuleList

    def __init__(self, decoder: UNetDecoder) -> None:
        super().__init__()
        for name, part in decoder.named_children():
            self.add_module(name, part)

    def forward(self, skips: list[Tensor]) -> Tensor:
        """Feature maps, finest first -> logits `[B, K, ...]`; the list is empty afterwards."""
        x = skips.pop()
        for upsample, stage in zip(self.transpconvs, self.stages, strict=True):
            x = stage(torch.cat((upsample(x), skips.pop()), 1))
        return self.seg_layers[-1](x)


def make_lean(network: nn.Module) -> None:
    """Let a network predict on a CPU in less time and memory.

    Names in its state dict stay as they are. Modules other than ``dynamic_network_architectures``' blocks stay as they
    are, and all normalisations do where the native operation is missing or rounds otherwise than this torch.
    """
    for name, part in list(network.named_children()):
        if type(part) is UNetDecoder and not part.deep_supervision:
            setattr(network, name, LeanDecoder(part))
    if _rounds_as_torch():
        for block in [module for module in network.modules() if isinstance(module, ConvDropoutNormReLU)]:
            _normalize_in_place(block)


def _normalize_in_place(block: ConvDropoutNormReLU) -> None:
    convolution, norm, *rest = [*block.all_modules, None][: max(2, len(block.all_modules))]
    if not isinstance(convolution, _CONVOLUTIONS) or not isinstance(norm, _NORMS):
        return
    if not norm.affine or norm.track_running_stats or len(rest) > 1:
        return
    slope = 1.0
    if rest:
        if not isinstance(rest[0], nn.LeakyReLU) or not 0 <= rest[0].negative_slope <= 1:
            return
        slope = float(rest[0].negative_slope)
        block.nonlin = block.all_modules[2] = nn.Identity()
    block.norm = block.all_modules[1] = InPlaceNorm(norm, slope)


@functools.cache
def _rounds_as_torch() -> bool:
    """Whether the native operation gives the bits of this torch on this processor."""
    if not backend_info().native:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 9, 17, 33, generator=generator) * 3 + 1
    weight, bias = torch.rand(4, generator=generator) + 0.5, torch.randn(4, generator=generator)
    theirs = functional.leaky_relu(functional.instance_norm(x, None, None, weight, bias), 0.01)
    return torch.equal(instance_norm_(x, weight, bias, negative_slope=0.01), theirs)
