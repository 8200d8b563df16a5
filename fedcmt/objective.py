"""What a client's task trains on and how it is validated: segmentation and classification."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from torch import Tensor, nn
from torch.nn.functional import logsigmoid as log_sigmoid

from fedcmt.config import DataConfig, TrainingConfig
from fedcmt.data.nnunet_rules import NnunetRules
from fedcmt.data.patches import Patches
from fedcmt.data.readahead import ReadAhead
from fedcmt.data.torch_pipeline import Batch, PatchSource
from fedcmt.metrics import classification_scores
from fedcmt.plans import ClientPlan
from fedcmt.topology import TopologyContract


@dataclass(frozen=True)
class Validation:
    """Score of one model on a client's validation cases; greater is better."""

    metric: str
    score: float
    loss: float
    classes: dict[str, float | None]

    def better_than(self, other: Validation | None) -> bool:
        """Compare scores, then losses: few cases make equal scores likely."""

        def rank(result: Validation) -> tuple[float, float]:
            return result.score, -result.loss if math.isfinite(result.loss) else -math.inf

        return other is None or rank(self) > rank(other)

    def as_json(self) -> dict[str, Any]:
        """For ``metrics.jsonl``; a loss that is no number becomes null."""
        loss = self.loss if math.isfinite(self.loss) else None
        return {"metric": self.metric, "score": self.score, "loss": loss, "classes": self.classes}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Validation:
        """What :meth:`as_json` was made from."""
        return cls(**entry | {"loss": math.nan if entry["loss"] is None else entry["loss"]})


class Objective(Protocol):
    """A task's batches, loss and validation."""

    smallest_loss: float  # no output has a smaller one

    def batches(self, round_index: int, steps: int) -> AbstractContextManager[ReadAhead[Batch]]:
        """A round's training batches."""

    def outputs(self, network: nn.Module, batch: Batch) -> Any:
        """What the network says to a batch; one call of the network."""

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Training loss of what the network said to a batch."""

    def divergence(self, student: Any, teacher: Any, temperature: float) -> Tensor:
        """KL(student || teacher) of softened predictions, averaged over cases or voxels."""

    def validate(self, network: nn.Module) -> Validation:
        """Score a network on the validation cases; the same patches every time."""


def make_objective(
    plan: ClientPlan, training: TrainingConfig, device: torch.device, *, client: str, seed: int, data: DataConfig
) -> Objective:
    """The objective of a client's task.

    Args:
        plan: The client's.
        training: Local training.
        device: Where the network is.
        client: Its name.
        seed: The federation's.
        data: How patches are made.
    """
    kind = ClassificationObjective if plan.task == "classification" else SegmentationObjective
    return kind(plan, training, device, partial(Patches, settings=data, seed=seed, device=device), client)


class PatchesOf(Protocol):
    """Opens the patches of a source for a purpose."""

    def __call__(self, source: PatchSource, *, purpose: str) -> Patches: ...


class SegmentationObjective:
    """nnU-Net's losses on patches; validation by Dice over patches, pooled over batches as in nnU-Net."""

    smallest_loss = -1.0  # cross-entropy 0, and nnU-Net's Dice loss is minus Dice

    def __init__(
        self, plan: ClientPlan, training: TrainingConfig, device: torch.device, patches: PatchesOf, client: str
    ) -> None:
        rules = NnunetRules(plan, deep_supervision=training.deep_supervision)
        share, targets = training.oversample_foreground, rules.targets()
        augmented, plain = (rules.patches(share, augment=augment) for augment in (True, False))
        self._training = patches(PatchSource(client, plan.folder, plan.train, augmented, targets), purpose="training")
        self._validation = patches(
            PatchSource(client, plan.folder, plan.validation, plain, targets), purpose="validation"
        )
        self._loss = rules.loss()
        self._labels = rules.label_manager
        self._batches = training.validation_batches
        self._device = device
        self._names = [name for name in plan.dataset.labels if name not in ("background", "ignore")]

    def batches(self, round_index: int, steps: int) -> AbstractContextManager[ReadAhead[Batch]]:
        """Augmented patches."""
        return self._training.batches(round_index, steps)

    def outputs(self, network: nn.Module, batch: Batch) -> Any:
        """Logits; with deep supervision a list, finest first."""
        return network(_on(batch.data, self._device))

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Loss over all outputs of the network."""
        return self._loss(outputs, _on(batch.target, self._device))

    def divergence(self, student: Any, teacher: Any, temperature: float) -> Tensor:
        """Of the finest outputs, summed over labels; over regions each is a distribution of its own."""
        finest = [(output[0] if isinstance(output, list) else output).float() for output in (student, teacher)]
        logits = [output / temperature for output in finest]
        if self._labels.has_regions:
            inside, outside = ([log_sigmoid(sign * x) for x in logits] for sign in (1, -1))
            return (_divergence(*inside) + _divergence(*outside)).sum(1).mean()
        return _divergence(*[x.log_softmax(1) for x in logits]).sum(1).mean()

    def validate(self, network: nn.Module) -> Validation:
        """Dice a class over the pooled validation patches, averaged over the classes that occur."""
        counts, losses = [], []
        with self._validation.batches(0, self._batches) as batches:
            for batch in batches:
                output, target = network(_on(batch.data, self._device)), _on(batch.target, self._device)
                losses.append(float(self._loss(output, target)))
                finest = (output[0], target[0]) if isinstance(output, list) else (output, target)
                counts.append(self._hard_counts(*finest))
        tp, fp, fn = np.sum(counts, axis=0)
        # A class that neither the truth nor the prediction holds has no score.
        present = 2 * tp + fp + fn
        dice = [2 * t / p if p > 0 else None for t, p in zip(tp, present, strict=True)]
        known = [d for d in dice if d is not None]
        classes = {name: None if d is None else float(d) for name, d in zip(self._names, dice, strict=True)}
        return Validation("dice", float(np.mean(known)) if known else 0.0, float(np.mean(losses)), classes)

    def _hard_counts(self, logits: Tensor, target: Tensor) -> np.ndarray:
        """True positives, false positives, false negatives `[3, K]` of the foreground."""
        mask = None
        if self._labels.has_regions:
            prediction = (torch.sigmoid(logits) > 0.5).long()
            if self._labels.has_ignore_label:
                mask = 1 - target[:, -1:].long()
                target = target[:, :-1]
        else:
            prediction = torch.zeros_like(logits, dtype=torch.float32)
            prediction.scatter_(1, logits.argmax(1, keepdim=True), 1)
            if self._labels.has_ignore_label:
                mask = (target != self._labels.ignore_label).float()
                target = torch.where(mask.bool(), target, 0)
        tp, fp, fn, _ = get_tp_fp_fn_tn(prediction, target, axes=[0, *range(2, logits.ndim)], mask=mask)
        first = 0 if self._labels.has_regions else 1
        return np.stack([count[first:].cpu().numpy() for count in (tp, fp, fn)])


class ClassificationObjective:
    """Cross-entropy on whole cases; validation by balanced accuracy."""

    smallest_loss = 0.0

    def __init__(
        self, plan: ClientPlan, training: TrainingConfig, device: torch.device, patches: PatchesOf, client: str
    ) -> None:
        rules = NnunetRules(plan, deep_supervision=False)
        augmented = rules.patches(training.oversample_foreground, augment=True)
        source = PatchSource(client, plan.folder, plan.train, augmented, rules.targets())
        self._patches = patches(source, purpose="training")
        self._reader, self._validation = self._patches.reader(), plan.validation
        self._patch_size = plan.configuration.patch_size
        self._divisor = TopologyContract(plan.architecture["arch_kwargs"]).divisor
        self._truth = plan.dataset.case_class
        self._classes = plan.dataset.class_names or ()
        self._device = device

    def batches(self, round_index: int, steps: int) -> AbstractContextManager[ReadAhead[Batch]]:
        """Augmented whole cases."""
        return self._patches.batches(round_index, steps)

    def outputs(self, network: nn.Module, batch: Batch) -> Any:
        """Class scores `[B, K]`."""
        return network(_on(batch.data, self._device))

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross-entropy of the cases' classes."""
        truth = torch.tensor([self._truth[case] for case in batch.cases], device=self._device)
        return nn.functional.cross_entropy(outputs.float(), truth)

    def divergence(self, student: Any, teacher: Any, temperature: float) -> Tensor:
        """Of the classes."""
        return _divergence(*[(x.float() / temperature).log_softmax(1) for x in (student, teacher)]).sum(1).mean()

    def validate(self, network: nn.Module) -> Validation:
        """Balanced accuracy over the validation cases."""
        scores = []
        for case in self._validation:
            image = torch.from_numpy(self._reader.whole(case))
            scores.append(network(_on(whole_case(image, self._patch_size, self._divisor), self._device))[0].float())
        truth = [self._truth[case] for case in self._validation]
        logits = torch.stack(scores)
        loss = float(nn.functional.cross_entropy(logits, torch.tensor(truth, device=self._device)))
        probabilities = logits.softmax(1).cpu().numpy()
        result = classification_scores(probabilities, np.asarray(truth))
        recall = {name: _recall(probabilities.argmax(1), np.asarray(truth), c) for c, name in enumerate(self._classes)}
        return Validation("balanced_accuracy", float(result["balanced_accuracy"]), loss, recall)


def whole_case(image: Tensor, patch_size: list[int], divisor: np.ndarray) -> Tensor:
    """A case as one network input: `[C, D, H, W]` -> `[1, C, D', H', W']`, padded with zeros.

    At least the size trained on (`[D, H, W]`, or `[H, W]` for single slices), and a multiple of the topology's strides.
    """
    size = [1] * (3 - len(patch_size)) + list(patch_size)
    return pad_nd_image(image, size, "constant", {"value": 0}, False, [1, *map(int, divisor)])[None]


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Terms p_s (log p_s - log p_t) from log-probabilities."""
    return student.exp() * (student - teacher)


def _recall(prediction: np.ndarray, truth: np.ndarray, label: int) -> float | None:
    cases = truth == label
    return float((prediction[cases] == label).mean()) if cases.any() else None


def _on(tensors: Any, device: torch.device) -> Any:
    """To the device, volumes in channels-last order, in which 3D convolutions on CPUs run 1.6 times faster."""
    if isinstance(tensors, list):
        return [_on(tensor, device) for tensor in tensors]
    if tensors.ndim == 5 and tensors.is_floating_point():
        return tensors.to(device, memory_format=torch.channels_last_3d, non_blocking=True)
    return tensors.to(device, non_blocking=True)
