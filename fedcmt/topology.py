"""The topology contract: what every client's network must agree on, given in the config or chosen for all clients.

Axes are in plan order, the axis of lowest resolution first. The network is three-dimensional for every client; single
slices pass through it as volumes of extent 1 along the first axis.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

from fedcmt.config import TopologyConfig
from fedcmt.errors import InputError
from fedcmt.exchange import ShapeSummary
from fedcmt.files import read_json

_NORMS = {
    "instance": ("torch.nn.modules.instancenorm.InstanceNorm3d", {"eps": 1e-5, "affine": True}),
    "batch": ("torch.nn.modules.batchnorm.BatchNorm3d", {"eps": 1e-5, "affine": True}),
}
_RESIDUAL_BLOCKS = (1, 3, 4, 6)  # nnU-Net's residual encoder; further stages as the last
_IMPORTED = ("conv_op", "norm_op", "nonlin")  # arguments that name classes
_MAX_STAGES = 8
_MIN_EDGE = 4  # nnU-Net's smallest edge of the deepest feature map
_PATCH_VOXELS = {2: 512**2, 3: 128**3}  # about what nnU-Net plans for its default of 8 GB


@dataclass(frozen=True)
class TopologyContract:
    """What every client's network must agree on: stages, features, kernels, strides, norm, adaptor width."""

    arch_kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, config: TopologyConfig, summaries: Sequence[ShapeSummary] = ()) -> TopologyContract:
        """The contract that a config describes.

        Args:
            config: The federation's topology.
            summaries: With ``auto`` what the clients told about their images, in any order.

        Raises:
            InputError: With ``auto``, images too small for two stages.
        """
        if config.auto:
            strides, kernels = choose_stages(summaries)
        else:
            strides = config.strides or [[1, 1, 1]] + [[2, 2, 2]] * (len(config.features) - 1)
            kernels = config.kernel_sizes or [[3, 3, 3]] * len(config.features)
        stages = len(strides)
        blocks: Any = config.blocks_per_stage or list(_RESIDUAL_BLOCKS)
        depth = (
            {"n_blocks_per_stage": _per_stage(blocks, stages)}
            if config.encoder == "residual"
            else {"n_conv_per_stage": _per_stage(config.convs_per_stage, stages)}
        )
        norm, norm_kwargs = _NORMS[config.norm]
        return cls(
            {
                "n_stages": stages,
                "features_per_stage": _per_stage(config.features, stages),
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": kernels,
                "strides": strides,
                **depth,
                "n_conv_per_stage_decoder": [config.decoder_convs_per_stage] * (stages - 1),
                "conv_bias": True,
                "norm_op": norm,
                "norm_op_kwargs": norm_kwargs,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
                "adaptor_width": config.adaptor_width,
            }
        )

    @classmethod
    def of_nnunet(cls, architecture: Mapping[str, Any], adaptor_width: int) -> TopologyContract:
        """The contract nearest to the ``architecture`` block of a stock nnU-Net plan, plain or residual, 2D or 3D.

        Raises:
            InputError: The plan names another network.
        """
        name = str(architecture["network_class_name"]).rsplit(".", 1)[-1]
        if name not in ("PlainConvUNet", "ResidualEncoderUNet"):
            raise InputError(
                f"the plan's network is {name}, expected PlainConvUNet or ResidualEncoderUNet", field="architecture"
            )
        stock = architecture["arch_kwargs"]
        depth = "n_conv_per_stage" if name == "PlainConvUNet" else "n_blocks_per_stage"
        kept = ("n_stages", "features_per_stage", depth, "n_conv_per_stage_decoder")
        sizes = {key: [_in_3d(entry) for entry in stock[key]] for key in ("kernel_sizes", "strides")}
        config = TopologyConfig(adaptor_width=adaptor_width)
        base = {key: value for key, value in cls.of(config).arch_kwargs.items() if key != "n_conv_per_stage"}
        return cls({**base, **{key: stock[key] for key in kept}, **sizes})

    def architecture(self, task: str) -> dict[str, Any]:
        """The ``architecture`` block of a client's plan."""
        kwargs = dict(self.arch_kwargs)
        if task == "classification":
            del kwargs["n_conv_per_stage_decoder"]
        name = "FedCMTClassifier" if task == "classification" else "FedCMTNet"
        return {
            "network_class_name": f"fedcmt.network.{name}",
            "arch_kwargs": kwargs,
            "_kw_requires_import": list(_IMPORTED),
        }

    @property
    def divisor(self) -> np.ndarray:
        """`[3]`: input sizes must be multiples of the strides' product."""
        return np.prod(np.asarray(self.arch_kwargs["strides"]), axis=0)

    def digest(self) -> str:
        """Hash of the contract, compared when clients, checkpoints and models meet. Decoders are personal."""
        shared = {key: value for key, value in self.arch_kwargs.items() if key != "n_conv_per_stage_decoder"}
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()


def contract_digest(architecture: Mapping[str, Any]) -> str:
    """The digest of the contract that a plan's ``architecture`` block was made from."""
    return TopologyContract(architecture["arch_kwargs"]).digest()


@dataclass(frozen=True)
class AgreedTopology:
    """A federation's contract, and with ``auto`` what each client told for choosing it: ``contract.json``."""

    topology: TopologyContract
    chosen_from: Mapping[str, ShapeSummary]

    def as_json(self) -> dict[str, Any]:
        """For the workspace."""
        summaries = {name: asdict(self.chosen_from[name]) for name in sorted(self.chosen_from)}
        return {"digest": self.topology.digest(), "topology": self.topology.arch_kwargs, "chosen_from": summaries}

    @classmethod
    def from_json(cls, path: Path) -> AgreedTopology:
        """What a workspace began with; new cases since then change no topology.

        Raises:
            InputError: The file is damaged.
        """
        content = read_json(path)
        try:
            topology = TopologyContract(content["topology"])
            told = {name: ShapeSummary(**summary) for name, summary in content["chosen_from"].items()}
            sound = topology.digest() == content["digest"]
        except (KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise InputError(f"{path} is damaged", field="topology", fix="restore it, or --fresh to start over")
        return cls(topology, told)


def choose_stages(summaries: Sequence[ShapeSummary]) -> tuple[list[list[int]], list[list[int]]]:
    """Strides and kernels for all clients, from their shapes and spacings.

    Every client's patch is estimated as a box of equal physical extent with nnU-Net's usual number of voxels, clipped
    to the client's median shape. Extents and spacing ratios are merged axis by axis as the median weighted by numbers
    of cases, an extent to at most four times the smallest client's, so that nobody's patch is mostly padding. nnU-Net's
    rule (halve the axes within a factor of 2 of the finest, kernel 1 along axes twice as coarse) makes the stages.
    Where a client has single slices the first axis is never strided.

    Returns:
        Strides and kernel sizes, one `[d, h, w]` a stage.

    Raises:
        InputError: The images are too small for two stages.
    """
    extents, spacing = merged_geometry(summaries)
    _, strides, kernels, _, _ = get_pool_and_conv_props(spacing, extents, _MIN_EDGE, _MAX_STAGES)
    if len(strides) < 2:
        raise InputError(
            f"images of about {extents} voxels are too small for a network of two stages",
            field="topology.auto",
            fix="give the topology's features and strides",
        )
    if all(len(summary.spacing) == 2 for summary in summaries):
        kernels = tuple((1, *kernel[1:]) for kernel in kernels)
    plain = [[[int(n) for n in entry] for entry in part[:_MAX_STAGES]] for part in (strides, kernels)]
    return plain[0], plain[1]


def merged_geometry(summaries: Sequence[ShapeSummary]) -> tuple[list[int], list[float]]:
    """Patch extents `[3]` in voxels and spacing `[3]` relative to the finest axis, merged over clients.

    The result does not depend on the clients' order.
    """
    if not summaries:
        raise ValueError("`summaries` should hold one entry per client. Got none.")
    extents: list[int] = []
    ratios: list[float] = []
    flat = any(len(summary.spacing) == 2 for summary in summaries)
    for axis in (-3, -2, -1):
        having = [summary for summary in summaries if len(summary.spacing) >= -axis]
        weights = [summary.num_cases for summary in having]
        sizes = [float(_patch(summary)[axis]) for summary in having]
        extents.append(int(min(_median(sizes, weights), 4 * min(sizes))) if sizes else 1)
        relative = [summary.spacing[axis] / min(summary.spacing) for summary in having]
        ratios.append(_median(relative, weights) if relative else 1.0)
    if flat:
        extents[0] = 1
    return extents, ratios


def _patch(summary: ShapeSummary) -> list[int]:
    """The client's patch: equal physical extent along all axes, clipped to its images."""
    spacing = np.asarray(summary.spacing)
    dimensions = len(spacing)
    edge = (_PATCH_VOXELS[dimensions] * np.prod(spacing)) ** (1 / dimensions)  # mm
    return [max(1, min(round(float(edge / s)), n)) for s, n in zip(spacing, summary.median_shape, strict=True)]


def _median(values: Sequence[float], weights: Sequence[int]) -> float:
    """The weighted lower median: one of the values, whatever their order."""
    ordered = sorted(zip(values, weights, strict=True))
    half, reached = sum(weights) / 2, 0
    for value, weight in ordered:
        reached += weight
        if reached >= half:
            return value
    return ordered[-1][0]


def _per_stage(value: int | Sequence[int], stages: int) -> list[int]:
    """One entry a stage: a list is cut, or its last entry repeated."""
    entries = [value] if isinstance(value, int) else list(value)
    return [*entries, *[entries[-1]] * stages][:stages]


def _in_3d(entry: Sequence[int]) -> list[int]:
    return [1] * (3 - len(entry)) + [int(n) for n in entry]
