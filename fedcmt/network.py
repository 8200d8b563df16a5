"""The network: the modality group's adaptor, the shared encoder, and the client's own decoder or head.

Building blocks are those of nnU-Net's ``dynamic_network_architectures``. The constructors take nnU-Net's arguments, so
that stock nnU-Net builds :class:`FedCMTNet` from a plans file. Networks are three-dimensional; a batch of slices
`[B, C, H, W]`, as of nnU-Net's ``2d`` configuration, passes as volumes of one slice and needs strides of 1 along D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from dynamic_network_architectures.initialization.weight_init import InitWeights_He, init_last_bn_before_add_to_0
from torch import Tensor, nn

# nnU-Net's names of the configurations that describe our network.
CONFIGURATION = "3d_fullres"
SLICES = "2d"
Part = Literal["adaptor", "encoder", "decoder"]
LSE_SHARPNESS = 5.0


class AdaptedEncoder(nn.Module):
    """Adaptor and encoder, the two parts that clients share.

    Args:
        input_channels: Channels of the client's images.
        n_stages: Resolutions, the first one that of the input.
        features_per_stage: Channels of each.
        kernel_sizes: `[d, h, w]` of each.
        strides: `[d, h, w]` of each stage's first convolution.
        n_conv_per_stage: Convolutions of each, which makes the encoder a plain one.
        n_blocks_per_stage: Residual blocks of each, which makes it a residual one; exactly one of the two is given.
        adaptor_width: Channels between adaptor and encoder.
        conv_op: Convolution; the adaptor is one of the first stage's kernel size.
        conv_bias: Whether convolutions have a bias.
        norm_op: Normalisation after each.
        norm_op_kwargs: Its arguments.
        nonlin: Non-linearity after each.
        nonlin_kwargs: Its arguments.
    """

    def __init__(
        self,
        input_channels: int,
        *,
        n_stages: int,
        features_per_stage: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        n_conv_per_stage: Sequence[int] | None = None,
        n_blocks_per_stage: Sequence[int] | None = None,
        adaptor_width: int = 32,
        conv_op: type[nn.Module],
        conv_bias: bool = True,
        norm_op: type[nn.Module] | None = None,
        norm_op_kwargs: dict[str, Any] | None = None,
        nonlin: type[nn.Module] | None = None,
        nonlin_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (n_conv_per_stage is None) == (n_blocks_per_stage is None):
            raise ValueError(
                "exactly one of `n_conv_per_stage` and `n_blocks_per_stage` should be given. "
                f"Got {n_conv_per_stage} and {n_blocks_per_stage}."
            )
        block: dict[str, Any] = {
            "conv_bias": conv_bias,
            "norm_op": norm_op,
            "norm_op_kwargs": norm_op_kwargs,
            "nonlin": nonlin,
            "nonlin_kwargs": nonlin_kwargs,
        }
        self.adaptor = ConvDropoutNormReLU(conv_op, input_channels, adaptor_width, kernel_sizes[0], 1, **block)
        kind = PlainConvEncoder if n_blocks_per_stage is None else ResidualEncoder
        self.encoder = kind(
            adaptor_width,
            n_stages,
            features_per_stage,
            conv_op,
            kernel_sizes,
            strides,
            n_conv_per_stage or n_blocks_per_stage,
            return_skips=True,
            **block,
        )

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """nnU-Net's initialisation of one module: He, negative slope 0.01; residual blocks begin as identities."""
        InitWeights_He(1e-2)(module)
        init_last_bn_before_add_to_0(module)


class FedCMTNet(AdaptedEncoder):
    """Segmentation: adaptor, encoder, U-Net decoder.

    Args:
        input_channels: Channels of the client's images.
        num_classes: Labels with background, or regions.
        n_conv_per_stage_decoder: Convolutions of each decoder stage.
        deep_supervision: Return the logits of every decoder stage.
        topology: As of :class:`AdaptedEncoder`.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        n_conv_per_stage_decoder: Sequence[int],
        deep_supervision: bool = False,
        **topology: Any,
    ) -> None:
        super().__init__(input_channels, **topology)
        self.decoder = UNetDecoder(self.encoder, num_classes, n_conv_per_stage_decoder, deep_supervision)
        # The decoder keeps a second path to the encoder, which it never calls; with it a state dict holds every
        # encoder weight twice, and loading a partly updated one silently restores the old values.
        del self.decoder.encoder

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """A batch `[B, C, D, H, W]` -> logits `[B, K, D, H, W]`; with deep supervision a list, finest first.

        Slices `[B, C, H, W]` give logits `[B, K, H, W]`.
        """
        if x.ndim == 4:
            outputs = self(x[:, :, None])
            return [output[:, :, 0] for output in outputs] if isinstance(outputs, list) else outputs[:, :, 0]
        return self.decoder(self.encoder(self.adaptor(x)))


class PooledHead(nn.Module):
    """A prediction map on the deepest features, pooled by log-sum-exp.

    score_k = 1/r log( 1/n sum_v exp(r m_kv) ) over the n voxels of the map m; r between mean (0) and maximum
    (infinity). ``torch.logsumexp`` keeps the gradient a softmax-weighted mean, whatever r.
    """

    def __init__(self, conv_op: type[nn.Module], features: int, num_classes: int) -> None:
        super().__init__()
        self.prediction_map = nn.Sequential(
            conv_op(features, features, 1), nn.LeakyReLU(inplace=True), conv_op(features, num_classes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features `[B, F, d, h, w]` -> class scores `[B, K]`."""
        scores = self.prediction_map(x).flatten(2)
        return (torch.logsumexp(LSE_SHARPNESS * scores, 2) - math.log(scores.shape[2])) / LSE_SHARPNESS


class FedCMTClassifier(AdaptedEncoder):
    """Classification: adaptor, encoder, pooled head.

    Args:
        input_channels: Channels of the client's images.
        num_classes: Classes.
        topology: As of :class:`AdaptedEncoder`.
    """

    def __init__(self, input_channels: int, num_classes: int, **topology: Any) -> None:
        super().__init__(input_channels, **topology)
        self.decoder = PooledHead(topology["conv_op"], topology["features_per_stage"][-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """A batch `[B, C, D, H, W]`, or of slices `[B, C, H, W]` -> class scores `[B, K]`."""
        if x.ndim == 4:
            x = x[:, :, None]
        return self.decoder(self.encoder(self.adaptor(x))[-1])


# Plans files come from outside; only these names are ever turned into classes.
_CLASSES: dict[str, type[nn.Module]] = {f"fedcmt.network.{c.__name__}": c for c in (FedCMTNet, FedCMTClassifier)}
_OPERATORS: dict[str, type[nn.Module]] = {
    "torch.nn.modules.conv.Conv3d": nn.Conv3d,
    "torch.nn.modules.instancenorm.InstanceNorm3d": nn.InstanceNorm3d,
    "torch.nn.modules.batchnorm.BatchNorm3d": nn.BatchNorm3d,
    "torch.nn.LeakyReLU": nn.LeakyReLU,
}


def configuration_name(plans: Mapping[str, Any]) -> str:
    """The one configuration of a client's plan: ``3d_fullres`` or ``2d``."""
    return str(next(iter(plans["configurations"])))


def build_network(
    architecture: Mapping[str, Any],
    input_channels: int,
    num_classes: int,
    *,
    deep_supervision: bool = False,
    initialize: bool = True,
) -> nn.Module:
    """Build and initialise a network from the ``architecture`` block of a plan.

    Args:
        architecture: ``network_class_name``, ``arch_kwargs`` and ``_kw_requires_import`` as in nnU-Net's plans.
        input_channels: Channels of the client's images.
        num_classes: Output heads: labels including background, regions, or classes.
        deep_supervision: Return logits of every decoder stage (segmentation only).
        initialize: Draw the weights; not where they are loaded next.

    Raises:
        ValueError: The plan names a class that FedCMT does not build.
    """
    name = architecture["network_class_name"]
    if name not in _CLASSES:
        raise ValueError(f"network class should be one of {sorted(_CLASSES)}, found {name!r}")
    kwargs = dict(architecture["arch_kwargs"])
    for key in architecture["_kw_requires_import"]:
        if kwargs[key] not in _OPERATORS:
            raise ValueError(f"{key} should be one of {sorted(_OPERATORS)}, found {kwargs[key]!r}")
        kwargs[key] = _OPERATORS[kwargs[key]]
    if _CLASSES[name] is FedCMTNet:
        kwargs["deep_supervision"] = deep_supervision
    network = _CLASSES[name](input_channels=input_channels, num_classes=num_classes, **kwargs)
    if initialize:
        network.apply(AdaptedEncoder.initialize)
    return network


def parameters_of(network: nn.Module, part: Part) -> dict[str, nn.Parameter]:
    """The parameters of one part by full name, aliases left out, in the order of their construction."""
    return {name: parameter for name, parameter in network.named_parameters() if name.startswith(f"{part}.")}
