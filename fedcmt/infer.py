"""Prediction: trained models on new scans, written on the scans' own grid.

python -m fedcmt.infer --workspace workspace/demo --client ct_lung -i scan.nii.gz -o predictions/
python -m fedcmt.infer -m nnUNet_results/Dataset001_X/nnUNetTrainer__nnUNetPlans__3d_fullres -i scans/ -o predictions/
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from fedcmt.allocator import reuse_large_blocks
from fedcmt.case_progress import open_progress
from fedcmt.checkpoint import ClientFolder, existing_client
from fedcmt.command import run_command
from fedcmt.config import Checkpoint
from fedcmt.dicom import dicom_cases
from fedcmt.dicom_seg import check_dicom_seg, write_segmentations
from fedcmt.errors import InputError, RunError
from fedcmt.models import CHECKPOINT, NnunetFolder
from fedcmt.precision import Precision
from fedcmt.predictor import Outputs, Prediction, Predictor

__all__ = ["ENDINGS", "Outputs", "Prediction", "Predictor", "find_cases", "main"]

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")


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
    parser = argparse.ArgumentParser(
        prog="python -m fedcmt.infer", description="Predict with clients' models or stock nnU-Net models."
    )
    models = parser.add_argument_group("models; several are an ensemble, averaged on probabilities")
    models.add_argument("--workspace", type=Path, help="folder of the federation")
    models.add_argument("--client", nargs="+", action="extend", metavar="NAME", help="whose model in the workspace")
    models.add_argument(
        "-m", "--model", type=Path, nargs="+", action="extend", metavar="FOLDER", help="nnU-Net model folder instead"
    )
    models.add_argument("--folds", nargs="+", default=[], metavar="FOLD", help="of nnU-Net model folders (default all)")
    models.add_argument(
        "--checkpoint",
        help=f"of a client best or last (default: what its federation chose), of nnU-Net model folders a file's name "
        f"(default {CHECKPOINT})",
    )
    parser.add_argument("-i", "--input", type=Path, required=True, help="an image or a folder of images")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for label maps or predictions.csv")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:i] (default auto)")
    parser.add_argument("--disable-mirroring", action="store_true", help="8 times faster, a little less accurate")
    parser.add_argument("--reorient", action="store_true", help="turn scans to the training data's orientation")
    parser.add_argument("--series", nargs="+", default=[], metavar="UID", help="DICOM series, one for each channel")
    parser.add_argument("--tile-step-size", type=float, default=0.5, help="distance of tiles in patches (default 0.5)")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="exact",
        help="fast: OpenVINO on CPUs, same labels but for rounding; bf16: faster still, after a check that is printed",
    )
    also = parser.add_argument_group("written beside each label map (segmentation)")
    also.add_argument("--save-probabilities", action="store_true", help="CASE.npz")
    also.add_argument("--save-entropy", action="store_true", help="CASE_entropy.nii.gz, 0 certain to 1 undecided")
    also.add_argument("--save-previews", action="store_true", help="CASE.png, three slices with the labels")
    also.add_argument("--dicom-seg", action="store_true", help="CASE.dcm, for DICOM input")
    return parser.parse_args(arguments)


def _model_folders(options: argparse.Namespace) -> list[ClientFolder | NnunetFolder]:
    if options.model:
        if options.workspace or options.client:
            raise InputError("name a workspace's clients or nnU-Net model folders, not both", field="-m")
        return [NnunetFolder(path, tuple(options.folds), options.checkpoint or CHECKPOINT) for path in options.model]
    if not (options.workspace and options.client):
        raise InputError("no model named", field="--client", fix="give --workspace and --client, or -m MODEL_FOLDER")
    if options.folds:
        raise InputError("a client has no folds", field="--folds", fix="use it with -m")
    if options.checkpoint not in (None, *get_args(Checkpoint)):
        raise InputError(f"no {options.checkpoint} model of a client", field="--checkpoint", fix="use best or last")
    return [existing_client(options.workspace, name, options.checkpoint) for name in options.client]


def _predict(options: argparse.Namespace) -> None:
    if not 0 < options.tile_step_size <= 1:
        raise InputError(f"should be above 0 and at most 1, found {options.tile_step_size}", field="--tile-step-size")
    predictor = Predictor(
        _model_folders(options),
        device=options.device,
        mirroring=not options.disable_mirroring,
        tile_step_size=options.tile_step_size,
        precision=options.precision,
    )
    outputs = Outputs(options.save_probabilities, options.save_entropy, options.save_previews)
    if predictor.task == "classification" and options.precision != "exact":
        raise InputError("this model classifies, which is always exact", field="--precision", fix="leave it out")
    if predictor.task == "classification" and outputs != Outputs():
        raise InputError("this model classifies: its probabilities are in predictions.csv", field="--save-...")
    cases = dicom_cases(options.input, predictor.num_channels, options.series)
    if options.dicom_seg:
        check_dicom_seg(cases, predictor.task)
    cases = cases or find_cases(options.input, predictor.num_channels)
    failed = []

    def skip(case: str, error: BaseException) -> None:
        failed.append(case)
        message = error if isinstance(error, InputError) else f"case '{case}': {error}"
        print(f"error: {message}", file=sys.stderr, flush=True)

    with open_progress(len(cases)) as progress:
        # With one case there is nothing to go on with: its error is the command's.
        written = predictor.predict_files(
            cases,
            options.output,
            outputs=outputs,
            reorient=options.reorient,
            progress=progress,
            on_error=skip if len(cases) > 1 else None,
        )
    if options.dicom_seg:
        write_segmentations({case: cases[case] for case in written}, options.output, predictor.segment_names)
    print(f"{len(written)} case{'s' if len(written) != 1 else ''} written to {options.output}")
    if failed:
        raise RunError(f"{len(failed)} of {len(cases)} cases skipped: {', '.join(failed)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _arguments(arguments)
    reuse_large_blocks()
    # NumPy's about a scan without a voxel above 0, which has its own line.
    warnings.filterwarnings("ignore", "Mean of empty slice|Degrees of freedom|invalid value", RuntimeWarning)
    return run_command(lambda: _predict(options))


if __name__ == "__main__":
    sys.exit(main())
