"""The torch backend: patches read, augmented and stacked into batches by one thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedcmt import ops
from fedcmt.data.geometry import Reading, reading
from fedcmt.data.intensity import change_intensities
from fedcmt.data.sampling import Draws, PatchRules, draw_patch
from fedcmt.data.source import Case, CaseReader, Image, Labels
from fedcmt.data.targets import TargetRules, mask_image, targets


@dataclass(frozen=True)
class Batch:
    """What a network and its loss see.

    Attributes:
        data: `[B, C, D, H, W]` float32, or `[B, C, H, W]` of slices.
        target: `[B, 1, ...]` int16, or `[B, R, ...]` bool for regions; with deep supervision a list, finest first.
        cases: `B` names.
    """

    data: Tensor
    target: Tensor | list[Tensor]
    cases: tuple[str, ...]


@dataclass(frozen=True)
class PatchSource:
    """Whose patches, and what they undergo."""

    client: str
    folder: Path
    cases: tuple[str, ...]
    rules: PatchRules
    targets: TargetRules


def augmented(image: Image, labels: Labels, part: Reading, draws: Draws, rules: PatchRules) -> tuple[Image, Labels]:
    """Everything that is drawn, applied to what was read; the last step before labels become targets.

    Args:
        image: `[C, d, h, w]`, may be changed.
        labels: `[d, h, w]`.
        part: How the patch lies in them.
        draws: What to do.
        rules: The client's.

    Returns:
        Image `[C, D, H, W]` and labels `[D, H, W]`, mirrored: they need not be contiguous.
    """
    voxels = torch.from_numpy(image)
    if part.affine is not None:
        voxels, marks = ops.warp_patch(voxels, torch.from_numpy(labels)[None], part.affine, rules.patch_size)
        labels = marks[0].numpy()
    change_intensities(voxels, draws)
    steps = tuple(slice(None, None, -1 if axis in draws.mirror else None) for axis in range(3))
    return voxels.numpy()[(slice(None), *steps)], labels[steps]


class TorchMaker:
    """Makes a round's batches; a :class:`fedcmt.data.readahead.Maker`.

    Args:
        source: Whose patches.
        reader: Of the client's cases, used by this thread alone.
        generator: Gives the generator of a sample of this round, by its index.
        pinned: Page-locked batches, for copies to a GPU.
    """

    def __init__(
        self, source: PatchSource, reader: CaseReader, generator: Callable[[int], np.random.Generator], pinned: bool
    ) -> None:
        self._source, self._reader, self._generator, self._pinned = source, reader, generator, pinned
        self._case: str | None = None

    def doing(self) -> str:
        """Client and case."""
        return f"client '{self._source.client}', case '{self._case}'"

    def make(self, index: int) -> Batch:
        """The batch of an index: samples ``index * batch_size`` and following.

        Raises:
            InputError: A case cannot be read.
        """
        source, rules = self._source, self._source.rules
        data = self._empty((rules.batch_size, rules.channels, *rules.patch_size), torch.float32)
        kind = torch.int16 if source.targets.regions is None else torch.bool
        target = [self._empty((rules.batch_size, source.targets.channels, *s), kind) for s in source.targets.sizes]
        cases = []
        for place in range(rules.batch_size):
            sample = index * rules.batch_size + place
            draws = draw_patch(self._generator(sample), sample, rules, source.cases, self._facts)
            part = reading(draws, rules)
            image, labels = augmented(*self._reader.read(draws.case, part), part, draws, rules)
            voxels = data[place].numpy()
            voxels[...] = image
            mask_image(voxels, labels, source.targets.masked_channels)
            for whole, one in zip(target, targets(labels, source.targets), strict=True):
                whole[place].numpy()[...] = one
            cases.append(draws.case)
        if rules.slices:
            data, target = data[:, :, 0], [one[:, :, 0] for one in target]
        return Batch(data, target if source.targets.several else target[0], tuple(cases))

    def _facts(self, case: str) -> Case:
        self._case = case
        return self._reader.case(case)

    def _empty(self, shape: Sequence[int], kind: torch.dtype) -> Tensor:
        # In the order that 3D convolutions on CPUs want, so that nobody has to copy it again.
        order = torch.channels_last_3d if kind == torch.float32 else torch.contiguous_format
        return torch.empty(tuple(shape), dtype=kind, memory_format=order, pin_memory=self._pinned)
