"""A trained model, or several, on volumes and files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedcmt.allocator import give_back_freed_blocks
from fedcmt.case_progress import CaseProgress
from fedcmt.checkpoint import ClientFolder, existing_client
from fedcmt.config import Checkpoint
from fedcmt.device import choose_device
from fedcmt.dicom_seg import segment_names
from fedcmt.errors import InputError
from fedcmt.files import write_bytes, write_text
from fedcmt.models import NnunetFolder, open_model
from fedcmt.orientation import fitted_scan
from fedcmt.pipeline import Pipeline
from fedcmt.precision import Precision, check_precision
from fedcmt.segmenter import Prepared, Segmenter
from fedcmt.volume import Volume, read_volume, write_segmentation, write_volume
from fedcmt.windows import Logits, OnTile

Cases = Mapping[str, tuple[Path, ...]]
OnAdvance = Callable[[float], None]


@dataclass(frozen=True)
class Prediction:
    """What a model says about one case.

    Attributes:
        labels: Segmentation: `[D, H, W]` on the input's grid. None for classification.
        probabilities: `[K, D, H, W]`, or `[K]` for classification; None if not asked for.
    """

    labels: np.ndarray | None
    probabilities: np.ndarray | None


@dataclass(frozen=True)
class Outputs:
    """What is written of a case beside its label map.

    Attributes:
        probabilities: ``<case>.npz`` with `probabilities` `[K, D, H, W]`.
        entropy: ``<case>_entropy.nii.gz``, from 0 (certain) to 1 (all classes alike).
        previews: ``<case>.png``.
    """

    probabilities: bool = False
    entropy: bool = False
    previews: bool = False

    @property
    def need_probabilities(self) -> bool:
        """Whether logits alone do not do."""
        return self.probabilities or self.entropy


@dataclass(frozen=True)
class _Loaded:
    """A case as read, and on the grid of each model."""

    volume: Volume
    prepared: list[Prepared]


@dataclass(frozen=True)
class _Computed:
    """A case with each model's logits, or for classification the probabilities."""

    loaded: _Loaded
    logits: list[Logits]
    probabilities: np.ndarray | None = None


class Predictor:
    """A trained model, or several whose probabilities are averaged.

    Args:
        folder: A client's folder in a workspace or an nnU-Net model folder; several for an ensemble.
        device: ``auto``, ``cpu`` or ``cuda[:i]``.
        mirroring: Average over mirrored inputs, 8 network calls a tile instead of 1.
        tile_step_size: Distance of tiles, in patches.
        precision: ``exact``; on CPUs also ``fast`` (OpenVINO, float32) or ``bf16``, for segmentation.

    Raises:
        InputError: The models' files are damaged or do not fit each other.
    """

    def __init__(
        self,
        folder: ClientFolder | NnunetFolder | Sequence[ClientFolder | NnunetFolder],
        *,
        device: str = "auto",
        mirroring: bool = True,
        tile_step_size: float = 0.5,
        precision: Precision = "exact",
    ) -> None:
        self._device = choose_device(device)
        check_precision(precision, self._device)
        folders = [folder] if isinstance(folder, (ClientFolder, NnunetFolder)) else list(folder)
        if not folders:
            raise ValueError("`folder` should be at least one model. Got none")
        self._models = [
            Segmenter(
                open_model(one), self._device, mirroring=mirroring, tile_step_size=tile_step_size, precision=precision
            )
            for one in folders
        ]
        self._model = self._models[0].model
        for other in self._models[1:]:
            _check_same_outputs(self._models[0], other)

    @classmethod
    def from_workspace(
        cls,
        workspace: Path | str,
        client: str | Sequence[str],
        checkpoint: Checkpoint | None = None,
        **options: Any,
    ) -> Predictor:
        """The model of a client in a federation's workspace; of several clients, their ensemble.

        Args:
            workspace: The federation's folder.
            client: Name of the client, or names.
            checkpoint: Its ``best`` or ``last`` model; None for the one that the federation's config names.
            options: As of the class.
        """
        names = [client] if isinstance(client, str) else client
        return cls([existing_client(Path(workspace), name, checkpoint) for name in names], **options)

    @classmethod
    def from_model_folder(
        cls, folder: Path | str | Sequence[Path | str], folds: Sequence[int | str] = (), **options: Any
    ) -> Predictor:
        """A stock nnU-Net model folder; of several folders, their ensemble.

        Args:
            folder: With plans.json, dataset.json and ``fold_*``.
            folds: Numbers, or ``all``; empty for every fold that is there.
            options: As of the class.
        """
        paths = [folder] if isinstance(folder, (str, Path)) else folder
        return cls([NnunetFolder(Path(path), tuple(map(str, folds))) for path in paths], **options)

    @property
    def task(self) -> str:
        """``segmentation`` or ``classification``."""
        return self._model.task

    @property
    def num_channels(self) -> int:
        """Channels a case must have."""
        return len(self._channel_names)

    @property
    def segment_names(self) -> dict[int, str]:
        """Segmentation: value in the written label maps -> its name."""
        return segment_names(self._model.dataset_json)

    @property
    def class_names(self) -> list[str]:
        """Classification: names in the order of the probabilities."""
        return list(self._model.class_names)

    @property
    def _channel_names(self) -> list[str]:
        document = self._model.dataset_json
        return list(document.get("channel_names", document.get("modality", {})).values())

    def predict(self, volume: Volume, *, case: str = "volume") -> Volume:
        """Segment a volume.

        Args:
            volume: `[C, D, H, W]`, channels as in training.
            case: Its name in warnings, which are those of :meth:`predict_case`.

        Returns:
            The label map `[1, D, H, W]` on the same grid.

        Raises:
            InputError: Wrong number of channels, or the model classifies.
        """
        if self.task != "segmentation":
            raise InputError("this model classifies and makes no label maps", field="task", fix="use predict_case")
        labels = self.predict_case(volume, case=case).labels
        return replace(volume, data=np.asarray(labels)[None])

    def predict_case(self, volume: Volume, *, probabilities: bool = False, case: str = "volume") -> Prediction:
        """Segment or classify a volume `[C, D, H, W]`.

        As the command does, it says on stderr if the volume is constant or in none of the training data's orientations;
        :func:`fedcmt.orientation.reoriented` turns it.

        Args:
            volume: Channels as in training.
            probabilities: Of a segmentation, return them too.
            case: Its name in warnings.

        Raises:
            InputError: Wrong number of channels.
        """
        self._check_channels(volume)
        fitted = fitted_scan(volume, self._model.plans, self._channel_names, case)
        return self._finish(self._compute(self._prepare(fitted)), probabilities)

    def predict_files(
        self,
        cases: Cases,
        output: Path,
        *,
        save_probabilities: bool = False,
        outputs: Outputs | None = None,
        reorient: bool = False,
        progress: CaseProgress | None = None,
        on_error: Callable[[str, BaseException], None] | None = None,
    ) -> dict[str, Prediction]:
        """Predict cases and write label maps (NIfTI), or for classification ``predictions.csv``.

        Reading, network and writing overlap; at most five cases are in memory.

        Args:
            cases: Case -> its channels' files.
            output: Folder, created if missing.
            save_probabilities: The same as in `outputs`.
            outputs: What else to write (segmentation).
            reorient: Turn scans that are stored in none of the training data's orientations (with an ensemble, the
                first model's); what is written is turned back.
            progress: Told of every tile and case.
            on_error: Told of a case that cannot be predicted, which is then skipped. Without it the error ends the run.

        Returns:
            Case -> prediction, label maps left out (they are on disk); skipped cases are missing.
        """
        wanted = outputs or Outputs()
        wanted = replace(wanted, probabilities=wanted.probabilities or save_probabilities)
        output.mkdir(parents=True, exist_ok=True)
        predictions: dict[str, Prediction] = {}

        def load(case: str) -> _Loaded:
            scan = read_volume(cases[case])
            fitted = fitted_scan(scan, self._model.plans, self._channel_names, case, reorient=reorient)
            return self._prepare(fitted)

        def compute(case: str, loaded: _Loaded) -> _Computed:
            return self._compute(loaded, None if progress is None else partial(progress.advance, case))

        def store(case: str, computed: _Computed) -> None:
            prediction = self._finish(computed, wanted.need_probabilities)
            predictions[case] = self._write(computed.loaded.volume, prediction, output, case, wanted)

        def finished(case: str, error: BaseException | None) -> None:
            if error is not None:
                error = error.located(case=case) if isinstance(error, InputError) else error
                if on_error is None:
                    raise error
                on_error(case, error)
            if progress is not None:
                progress.finished(case, error)

        Pipeline(load, compute, store, finished).run(cases)
        if self.task == "classification" and predictions:
            write_text(output / "predictions.csv", self._table(predictions))
        return predictions

    def _prepare(self, volume: Volume) -> _Loaded:
        self._check_channels(volume)
        loaded = _Loaded(volume, [model.prepare(volume) for model in self._models])
        give_back_freed_blocks()  # resampling's, which are no use to the network
        return loaded

    def _check_channels(self, volume: Volume) -> None:
        if volume.data.shape[0] != self.num_channels:
            raise InputError(
                f"expected {self.num_channels} channels ({', '.join(self._channel_names)}), got {volume.data.shape[0]}",
                field="channels",
            )

    @torch.inference_mode()
    def _compute(self, loaded: _Loaded, on_advance: OnAdvance | None = None) -> _Computed:
        if self.task == "classification":
            pairs = zip(self._models, loaded.prepared, strict=True)
            chances = np.mean([_classify(model, case, self._device) for model, case in pairs], axis=0)
            return _Computed(loaded, [], chances)
        logits = []
        calls = [len(model.model.folds) or 1 for model in self._models]
        on_tile = _counted(on_advance, sum(calls))
        for model, case in zip(self._models, loaded.prepared, strict=True):
            logits.append(model.predict(case, on_tile))
        return _Computed(loaded, logits)

    @torch.inference_mode()
    def _finish(self, computed: _Computed, probabilities: bool) -> Prediction:
        if computed.probabilities is not None:
            return Prediction(None, computed.probabilities)
        if not probabilities and len(self._models) == 1:
            return Prediction(self._models[0].labels(computed.logits[0], computed.loaded.prepared[0]), None)
        mean = self._models[0].probabilities(computed.logits[0], computed.loaded.prepared[0])
        for model, logits, case in zip(
            self._models[1:], computed.logits[1:], computed.loaded.prepared[1:], strict=True
        ):
            mean += model.probabilities(logits, case)
        mean /= len(self._models)
        manager = self._models[0].label_manager
        dtype = np.uint8 if len(manager.foreground_labels) < 255 else np.uint16
        labels = np.asarray(manager.convert_probabilities_to_segmentation(mean)).astype(dtype)
        return Prediction(labels, mean if probabilities else None)

    def _write(self, volume: Volume, prediction: Prediction, output: Path, case: str, outputs: Outputs) -> Prediction:
        """Write a segmentation; returns what is kept in memory of a prediction."""
        if prediction.labels is None:
            return prediction
        chances = prediction.probabilities
        if chances is not None and outputs.probabilities:
            packed = io.BytesIO()
            np.savez_compressed(packed, probabilities=volume.as_stored(chances))
            write_bytes(output / f"{case}.npz", packed.getvalue())
        if chances is not None and outputs.entropy:
            entropy = entropy_map(chances, regions=self._models[0].label_manager.has_regions)
            write_volume(replace(volume, data=entropy[None]), output / f"{case}_entropy.nii.gz")
        if outputs.previews:
            from fedcmt.previews import write_preview

            write_preview(volume, prediction.labels, output / f"{case}.png")
        write_segmentation(volume, prediction.labels, output / f"{case}.nii.gz")
        return Prediction(None, None)

    def _table(self, predictions: dict[str, Prediction]) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["identifier", "prediction", *(f"probability_{name}" for name in self.class_names)])
        for case, prediction in predictions.items():
            chances = np.asarray(prediction.probabilities)
            writer.writerow([case, self.class_names[int(chances.argmax())], *(f"{p:.6f}" for p in chances)])
        return text.getvalue()


def entropy_map(probabilities: np.ndarray, *, regions: bool) -> np.ndarray:
    """Shannon entropy in each voxel as a share of the most there can be, float32 `[D, H, W]`.

    Args:
        probabilities: `[K, D, H, W]`
        regions: Each of the K is a yes or no of its own; their entropies are averaged.
    """
    terms = np.zeros(probabilities.shape[1:], np.float32)
    for p in probabilities:
        for chance in (p, 1 - p) if regions else (p,):
            terms -= chance * np.log(np.maximum(chance, 1e-12))
    most = len(probabilities) * np.log(2) if regions else np.log(max(len(probabilities), 2))
    return np.clip(terms / np.float32(most), 0, 1)


def _counted(on_advance: OnAdvance | None, calls: int) -> OnTile | None:
    """Turns the tiles of `calls` passes over a case into the fraction done."""
    if on_advance is None:
        return None
    finished = 0

    def on_tile(number: int, count: int) -> None:
        nonlocal finished
        on_advance((finished + number / count) / calls)
        finished += number == count

    return on_tile


def _classify(model: Segmenter, case: Prepared, device: torch.device) -> np.ndarray:
    from fedcmt.objective import whole_case  # imports nnU-Net's training, which segmentation does without
    from fedcmt.plans import TopologyContract

    divisor = TopologyContract(model.configuration.configuration["architecture"]["arch_kwargs"]).divisor
    image = whole_case(case.image, model.configuration.patch_size, divisor).to(device)
    return model.model.network(image)[0].float().softmax(0).cpu().numpy()


def _check_same_outputs(first: Segmenter, other: Segmenter) -> None:
    """Models of an ensemble must answer the same question about the same channels."""
    for field, read in (
        ("task", lambda model: model.task),
        ("classes", lambda model: model.class_names),
        ("channels", lambda model: len(model.dataset_json.get("channel_names", model.dataset_json.get("modality")))),
        ("labels", lambda model: model.dataset_json.get("labels")),
        ("regions_class_order", lambda model: model.dataset_json.get("regions_class_order")),
    ):
        ours, theirs = read(first.model), read(other.model)
        if ours != theirs:
            raise InputError(
                f"{first.model.name} and {other.model.name} cannot be averaged: {ours} and {theirs}", field=field
            )
