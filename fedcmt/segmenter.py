"""One model on one case: nnU-Net's preprocessing, the tiles, and labels or probabilities on the case's own grid."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

from fedcmt.errors import InputError, RunError
from fedcmt.lean_network import make_lean
from fedcmt.models import Model
from fedcmt.ops import logits_to_labels
from fedcmt.precision import LEAST_AGREEMENT, PARITY_TILES, Precision, agreement, faster_network
from fedcmt.resampling import is_replaceable, nearest_axis_of, resample_linear, resampling_function
from fedcmt.volume import Volume
from fedcmt.windows import Logits, Network, OnTile, Tiling, predict_tiles, sample_tiles

# What they read equals what `read_volume` does; the others turn the axes, or read no volumes.
_READERS = ("SimpleITKIO", "NibabelIO")


@dataclass(frozen=True)
class Prepared:
    """A case on its model's grid.

    Attributes:
        image: float32  # [C, D, H, W]
        properties: nnU-Net's record of what was cropped.
    """

    image: Tensor
    properties: dict[str, Any]


class _FastConfiguration(ConfigurationManager):
    """nnU-Net's configuration for prediction: fast resampling, and none of the mask that prediction throws away."""

    @cached_property
    def resampling_fn_data(self) -> Any:
        """As the plan says."""
        name, kwargs = (self.configuration[f"resampling_fn_data{part}"] for part in ("", "_kwargs"))
        return resampling_function(kwargs) if is_replaceable(name, kwargs) else super().resampling_fn_data

    @cached_property
    def resampling_fn_seg(self) -> Any:
        """The mask as it is."""
        return lambda mask, *_: mask


class Segmenter:
    """A model with its preprocessing.

    Args:
        model: The model.
        device: Where it runs.
        mirroring: Average over mirrored inputs, 8 network calls a tile instead of 1.
        tile_step_size: Distance of tiles, in patches.
        precision: ``exact``, or ``fast`` or ``bf16`` on CPUs.
        note: Told what a user should know, such as how far bfloat16 agrees.

    Raises:
        InputError: The model needs what is not supported here.
    """

    def __init__(
        self,
        model: Model,
        device: torch.device,
        *,
        mirroring: bool,
        tile_step_size: float,
        precision: Precision = "exact",
        note: Callable[[str], None] = print,
    ) -> None:
        self.model = model
        self._device = device
        self._network = model.network.to(device)
        if device.type == "cpu" and precision == "exact":
            make_lean(self._network)
        self._precision: Precision = precision
        self._note = note
        self._faster: dict[int, Network] = {}
        self._manager = PlansManager(deepcopy(model.plans))
        self.configuration = _FastConfiguration(self._manager.get_configuration(model.configuration).configuration)
        self._check()
        self.label_manager = self._manager.get_label_manager(model.dataset_json)
        axes = model.mirror_axes if mirroring else ()
        self._tiling = Tiling(tuple(self.configuration.patch_size), tile_step_size, axes)

    def _check(self) -> None:
        reader = self._manager.image_reader_writer_class.__name__
        if reader not in _READERS:
            raise InputError(
                f"{self.model.name} was trained on images read by {reader}; {' and '.join(_READERS)} are known",
                field="image_reader_writer",
                fix="use nnUNetv2_predict for it",
            )

    def prepare(self, volume: Volume) -> Prepared:
        """Crop, normalise and resample a volume `[C, D, H, W]` as nnU-Net does."""
        properties: dict[str, Any] = {"spacing": [float(s) for s in volume.spacing]}
        preprocessor = self.configuration.preprocessor_class(verbose=False)
        data, _, properties = preprocessor.run_case_npy(
            volume.data, None, properties, self._manager, self.configuration, self.model.dataset_json
        )
        return Prepared(torch.from_numpy(np.ascontiguousarray(data, np.float32)), properties)

    def predict(self, case: Prepared, on_tile: OnTile | None = None) -> Logits:
        """Logits on the model's grid; those of several folds are averaged in half precision, as nnU-Net does."""
        folds = self.model.folds
        if not folds:
            return self._predict(case, self._network_for(0, case), on_tile)
        mean: Tensor | None = None
        for fold, weights in enumerate(folds):
            self._network.load_state_dict(weights, assign=True)
            self._network.to(self._device)
            logits = _finite(self._predict(case, self._network_for(fold, case), on_tile).divided(), self.model)
            mean = logits if mean is None else mean.add_(logits)
        return Logits(torch.as_tensor(mean).div_(len(folds)), None)

    def _predict(self, case: Prepared, network: Network, on_tile: OnTile | None) -> Logits:
        heads = self.label_manager.num_segmentation_heads
        return predict_tiles(network, case.image, heads, self._tiling, self._device, on_tile)

    def _network_for(self, fold: int, case: Prepared) -> Network:
        """The network, which holds a fold's weights, in the precision asked for."""
        if self._precision == "exact":
            return self._network
        if fold not in self._faster:
            shape = (1, len(case.image), *self._tiling.patch_size)
            faster = faster_network(self._network, self._precision, shape)
            if self._precision == "bf16" and not self._agrees(faster, case):
                self._precision = "exact"
                return self._network
            self._faster[fold] = faster
        return self._faster[fold]

    def _agrees(self, faster: Network, case: Prepared) -> bool:
        """Compare bfloat16 with the exact network on tiles of the first case."""
        patches = sample_tiles(case.image, self._tiling, PARITY_TILES)
        regions = self.label_manager.has_regions
        share = agreement(self._network, faster, patches, (lambda x: x > 0) if regions else (lambda x: x.argmax(1)))
        enough = share >= LEAST_AGREEMENT
        self._note(
            f"{self.model.name}: bf16 gives the same label in {100 * share:.3f} % of the voxels of {len(patches)} tiles"
            + ("" if enough else f", less than {100 * LEAST_AGREEMENT:g} %: going on with the exact network")
        )
        return enough

    def labels(self, logits: Logits, case: Prepared) -> np.ndarray:
        """Label map on the case's grid `[D, H, W]`.

        Raises:
            RunError: The logits overflow half precision.
        """
        properties, manager = case.properties, self.label_manager
        dtype = torch.uint8 if len(manager.foreground_labels) < 255 else torch.uint16
        labels = torch.zeros(tuple(properties["shape_before_cropping"]), dtype=dtype)
        out = labels[tuple(slice(*bounds) for bounds in properties["bbox_used_for_cropping"])]
        nearest = self._nearest_axis(properties)
        regions = manager.regions_class_order if manager.has_regions else None
        if nearest is _NOT_LINEAR:
            resampled = self._resampled(logits, properties)
            out[...] = torch.from_numpy(
                np.asarray(manager.convert_logits_to_segmentation(resampled), out.numpy().dtype)
            )
        else:
            try:
                logits_to_labels(
                    logits.sums,
                    out.shape,
                    weights=logits.weights,
                    nearest_axis=nearest,
                    region_values=regions,
                    out=out,
                )
            except FloatingPointError as error:
                raise RunError(f"{self.model.name}: {error}") from None
        return labels.numpy().transpose(self._manager.transpose_backward)

    def probabilities(self, logits: Logits, case: Prepared) -> np.ndarray:
        """Probabilities on the case's grid, float32 `[K, D, H, W]`; outside the cropped part all is background."""
        properties, manager = case.properties, self.label_manager
        resampled = self._resampled(logits, properties)
        values = manager.apply_inference_nonlin(resampled)
        whole = manager.revert_cropping_on_probabilities(
            values, properties["bbox_used_for_cropping"], properties["shape_before_cropping"]
        )
        return np.asarray(whole).transpose([0, *[axis + 1 for axis in self._manager.transpose_backward]])

    def _resampled(self, logits: Logits, properties: dict[str, Any]) -> np.ndarray:
        """Logits on the grid of the cropped case, float16 `[K, D, H, W]`."""
        values = _finite(logits.divided(), self.model)
        shape = properties["shape_after_cropping_and_before_resampling"]
        nearest = self._nearest_axis(properties)
        if nearest is _NOT_LINEAR:
            current, new = self._spacings(properties)
            return np.asarray(self.configuration.resampling_fn_probabilities(values, shape, current, new))
        return resample_linear(values.numpy(), shape, nearest_axis=nearest)

    def _nearest_axis(self, properties: dict[str, Any]) -> Any:
        """The axis that is not interpolated, None, or `_NOT_LINEAR` where the plan asks for another resampling."""
        names = ("resampling_fn_probabilities", "resampling_fn_probabilities_kwargs")
        name, kwargs = (self.configuration.configuration[key] for key in names)
        if not is_replaceable(name, kwargs) or kwargs.get("order") != 1:
            return _NOT_LINEAR
        return nearest_axis_of(*self._spacings(properties), **kwargs)

    def _spacings(self, properties: dict[str, Any]) -> tuple[list[float], list[float]]:
        """Spacing of the model's grid and of the case, in mm."""
        original = [properties["spacing"][axis] for axis in self._manager.transpose_forward]
        spacing = list(self.configuration.spacing)
        return (spacing if len(spacing) == len(original) else [original[0], *spacing]), original


_NOT_LINEAR = object()


def _finite(logits: Tensor, model: Model) -> Tensor:
    if not bool(torch.isfinite(logits).all()):
        raise RunError(f"{model.name}: the network's logits overflow half precision or are not numbers")
    return logits
