"""Prediction: a client's model on new scans, written on the scans' own grid.

python -m fedcmt.infer --workspace workspace/demo --client ct_lung -i scan.nii.gz -o predictions/
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from fedcmt.checkpoint import ClientFolder, existing_client, load_model
from fedcmt.command import run_command
from fedcmt.device import choose_device
from fedcmt.dicom import dicom_cases
from fedcmt.dicom_seg import check_dicom_seg, segment_names, write_segmentations
from fedcmt.errors import InputError
from fedcmt.files import write_bytes, write_text
from fedcmt.objective import whole_case
from fedcmt.orientation import fitted_scan
from fedcmt.plans import TopologyContract
from fedcmt.preprocessing import configuration_name
from fedcmt.volume import Volume, read_volume, write_segmentation

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")


@dataclass(frozen=True)
class Prediction:
    """What a model says about one case.

    Attributes:
        labels: Segmentation: `[D, H, W]` on the input's grid. None for classification.
        probabilities: `[K, D, H, W]`, or `[K]` for classification; None if not asked for.
    """

    labels: np.ndarray | None
    probabilities: np.ndarray | None


class Predictor:
    """A trained client's model.

    Args:
        folder: The client's folder in a workspace.
        device: ``auto``, ``cpu`` or ``cuda[:i]``.
        mirroring: Average over mirrored inputs, 8 network calls a tile instead of 1.
        tile_step_size: Distance of tiles, in patches.

    Raises:
        InputError: The model's files are damaged or do not fit each other.
    """

    def __init__(
        self, folder: ClientFolder, *, device: str = "auto", mirroring: bool = True, tile_step_size: float = 0.5
    ) -> None:
        self._device = choose_device(device)
        network, self._plans, self._dataset_json, self._facts = load_model(folder)
        self._network = network.to(self._device)
        self._manager = PlansManager(deepcopy(self._plans))
        self._configuration = self._manager.get_configuration(configuration_name(self._plans))
        self._mirror_axes = tuple(self._facts["mirror_axes"]) if mirroring else None
        if self.task == "segmentation":
            with redirect_stdout(io.StringIO()):  # it prints a remark on every CPU
                self._windows = nnUNetPredictor(tile_step_size, True, mirroring, device=self._device, allow_tqdm=False)
            self._windows.manual_initialization(
                network,
                self._manager,
                self._configuration,
                None,
                self._dataset_json,
                "nnUNetTrainer",
                self._mirror_axes,
            )

    @classmethod
    def from_workspace(cls, workspace: Path | str, client: str, **options: Any) -> Predictor:
        """The best model of a client in a federation's workspace.

        Args:
            workspace: The federation's folder.
            client: Name of the client.
            options: As of the class.
        """
        return cls(existing_client(Path(workspace), client), **options)

    @property
    def task(self) -> str:
        """``segmentation`` or ``classification``."""
        return str(self._facts["task"])

    @property
    def num_channels(self) -> int:
        """Channels a case must have."""
        return len(self._dataset_json["channel_names"])

    @property
    def channel_names(self) -> list[str]:
        """In the order of the channels."""
        return list(self._dataset_json["channel_names"].values())

    @property
    def segment_names(self) -> dict[int, str]:
        """Segmentation: value in the written label maps -> its name."""
        return segment_names(self._dataset_json)

    @property
    def class_names(self) -> list[str]:
        """Classification: names in the order of the probabilities."""
        return list(self._facts["class_names"])

    def predict(self, volume: Volume) -> Volume:
        """Segment a volume.

        Args:
            volume: `[C, D, H, W]`, channels as in training.

        Returns:
            The label map `[1, D, H, W]` on the same grid.

        Raises:
            InputError: Wrong number of channels, or the model classifies.
        """
        if self.task != "segmentation":
            raise InputError("this model classifies and makes no label maps", field="task", fix="use predict_case")
        labels = self.predict_case(volume).labels
        return replace(volume, data=np.asarray(labels)[None])

    @torch.inference_mode()
    def predict_case(self, volume: Volume, *, probabilities: bool = False) -> Prediction:
        """Segment or classify a volume `[C, D, H, W]`.

        Raises:
            InputError: Wrong number of channels.
        """
        if volume.data.shape[0] != self.num_channels:
            raise InputError(
                f"expected {self.num_channels} channels "
                f"({', '.join(self._dataset_json['channel_names'].values())}), got "
                f"{volume.data.shape[0]}",
                field="channels",
            )
        properties = {"spacing": [float(s) for s in volume.spacing]}
        preprocessor = self._configuration.preprocessor_class(verbose=False)
        data, _, properties = preprocessor.run_case_npy(
            volume.data, None, properties, self._manager, self._configuration, self._dataset_json
        )
        image = torch.from_numpy(data)
        if self.task == "classification":
            return Prediction(None, self._classify(image))
        logits = self._windows.predict_sliding_window_return_logits(image).cpu()
        result = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            self._manager,
            self._configuration,
            self._windows.label_manager,
            properties,
            return_probabilities=probabilities,
            num_threads_torch=torch.get_num_threads(),
        )
        return Prediction(*result) if probabilities else Prediction(result, None)

    def _classify(self, image: torch.Tensor) -> np.ndarray:
        divisor = TopologyContract(self._configuration.configuration["architecture"]["arch_kwargs"]).divisor
        case = whole_case(image, self._configuration.patch_size, divisor).to(self._device)
        return self._network(case)[0].float().softmax(0).cpu().numpy()

    def predict_files(
        self,
        cases: dict[str, tuple[Path, ...]],
        output: Path,
        *,
        save_probabilities: bool = False,
        reorient: bool = False,
    ) -> dict[str, Prediction]:
        """Predict cases and write label maps (NIfTI), or for classification ``predictions.csv``.

        Args:
            cases: Case -> its channels' files.
            output: Folder, created if missing.
            save_probabilities: Also write ``<case>.npz`` with `probabilities` `[K, D, H, W]` (segmentation).
            reorient: Turn scans that are stored in none of the training data's orientations.

        Returns:
            Case -> prediction, label maps left out (they are on disk).
        """
        output.mkdir(parents=True, exist_ok=True)
        predictions = {}
        for case, files in cases.items():
            try:
                volume = read_volume(files)
                volume = fitted_scan(volume, self._plans, self.channel_names, case, reorient=reorient)
                prediction = self.predict_case(volume, probabilities=save_probabilities)
            except InputError as error:
                raise error.located(case=case) from None
            if prediction.labels is not None:
                write_segmentation(volume, prediction.labels, output / f"{case}.nii.gz")
                if prediction.probabilities is not None:
                    packed = io.BytesIO()
                    np.savez_compressed(packed, probabilities=volume.as_stored(prediction.probabilities))
                    write_bytes(output / f"{case}.npz", packed.getvalue())
                prediction = Prediction(None, None)
            predictions[case] = prediction
        if self.task == "classification":
            write_text(output / "predictions.csv", self._table(predictions))
        return predictions

    def _table(self, predictions: dict[str, Prediction]) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["identifier", "prediction", *(f"probability_{name}" for name in self.class_names)])
        for case, prediction in predictions.items():
            chances = np.asarray(prediction.probabilities)
            writer.writerow([case, self.class_names[int(chances.argmax())], *(f"{p:.6f}" for p in chances)])
        return text.getvalue()


def find_cases(source: Path, num_channels: int) -> dict[str, tuple[Path, ...]]:
    """The cases in a file or folder: ``case_0000.nii.gz``, ``case_0001.nii.gz``, ... or, with one channel, any name.

    Args:
        source: A file (with several channels: any one of them) or a folder.
        num_channels: Channels of a case.

    Returns:
        Case -> its files in channel order.

    Raises:
        InputError: Nothing there, or a channel is missing.
    """
    if not source.exists():
        raise InputError(f"{source} does not exist", field="-i")
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    files = [file for file in files if file.name.lower().endswith(ENDINGS) and not file.name.startswith(".")]
    if not files:
        raise InputError(f"no image in {source}", field="-i", fix=f"supported endings are {', '.join(ENDINGS)}")
    cases: dict[str, tuple[Path, ...]] = {}
    for file in files:
        case, channels = _channels_of(file, num_channels)
        if cases.setdefault(case, channels) != channels:
            raise InputError(
                f"{cases[case][0].name} and {channels[0].name} would have the same output",
                case=case,
                field="-i",
                fix="rename one of them",
            )
    return cases


def _channels_of(file: Path, num_channels: int) -> tuple[str, tuple[Path, ...]]:
    """The case that a file belongs to, and all its channels' files."""
    ending = next(e for e in ENDINGS if file.name.lower().endswith(e))
    stem, ending = file.name[: -len(ending)], file.name[-len(ending) :]
    case, _, number = stem.rpartition("_")
    numbered = bool(case) and len(number) == 4 and number.isdigit()
    if numbered and int(number) >= num_channels:
        if file.with_name(f"{case}_0000{ending}").is_file():
            raise InputError(
                f"{file.name} is a channel too many, the model takes {num_channels}",
                case=case,
                field="channels",
                fix="choose the client for these images",
            )
        numbered = False  # a year or a series number
    if not numbered:
        case, channels = stem, [file]
    else:
        channels = [file.with_name(f"{case}_{channel:04d}{ending}") for channel in range(num_channels)]
    missing = [channel.name for channel in channels if not channel.is_file()]
    if missing or len(channels) != num_channels:
        what = f"{missing[0]} is missing" if missing else f"found 1 channel, expected {num_channels}"
        raise InputError(what, case=case, field="channels", fix="name the channels CASE_0000, CASE_0001, ...")
    return case, tuple(channels)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fedcmt.infer", description="Predict with a client's best model.")
    parser.add_argument("--workspace", type=Path, required=True, help="folder of the federation")
    parser.add_argument("--client", required=True, help="whose model")
    parser.add_argument("-i", "--input", type=Path, required=True, help="an image or a folder of images")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for label maps or predictions.csv")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:i] (default auto)")
    parser.add_argument("--disable-mirroring", action="store_true", help="8 times faster, a little less accurate")
    parser.add_argument("--save-probabilities", action="store_true", help="also write CASE.npz (segmentation)")
    parser.add_argument("--reorient", action="store_true", help="turn scans to the training data's orientation")
    parser.add_argument("--series", nargs="+", default=[], metavar="UID", help="DICOM series, one for each channel")
    parser.add_argument("--dicom-seg", action="store_true", help="also write CASE.dcm for DICOM input (segmentation)")
    parser.add_argument("--tile-step-size", type=float, default=0.5, help="distance of tiles in patches (default 0.5)")
    return parser.parse_args(arguments)


def _predict(options: argparse.Namespace) -> None:
    if not 0 < options.tile_step_size <= 1:
        raise InputError(f"should be above 0 and at most 1, found {options.tile_step_size}", field="--tile-step-size")
    predictor = Predictor.from_workspace(
        options.workspace,
        options.client,
        device=options.device,
        mirroring=not options.disable_mirroring,
        tile_step_size=options.tile_step_size,
    )
    cases = dicom_cases(options.input, predictor.num_channels, options.series)
    if options.dicom_seg:
        check_dicom_seg(cases, predictor.task)
    cases = cases or find_cases(options.input, predictor.num_channels)
    predictor.predict_files(
        cases, options.output, save_probabilities=options.save_probabilities, reorient=options.reorient
    )
    if options.dicom_seg:
        write_segmentations(cases, options.output, predictor.segment_names)
    print(f"{len(cases)} case{'s' if len(cases) != 1 else ''} written to {options.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _arguments(arguments)
    return run_command(lambda: _predict(options))


if __name__ == "__main__":
    sys.exit(main())
