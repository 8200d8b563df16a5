"""Phantom datasets in nnU-Net's raw format, the same bytes from the same seed."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import yaml
from anatomy import SPACING
from ct import CTScanner
from mr import CHANNELS, MRScanner
from pydantic import Field, model_validator
from tasks import CLASSES, LABELS, TaskName, make_labels, make_subject

from fedcmt.errors import InputError
from fedcmt.files import read_json, write_json, write_text
from fedcmt.seeding import derive_seed
from fedcmt.settings import Settings, validated
from fedcmt.volume import Volume, write_segmentation, write_volume

PRESETS = Path(__file__).parent
# Of what is drawn and how: raised when the same seed gives other images.
VERSION = 4
Channel = Annotated[str, Field(pattern=f"^({'|'.join(CHANNELS)})$")]


class DatasetSettings(Settings):
    """One site's dataset."""

    number: int = Field(ge=1, le=999)
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9]+$")]
    modality: Literal["CT", "MR"]
    channels: list[Channel] = Field([], max_length=4, description="contrasts of an MR site")
    task: TaskName
    train: int = Field(ge=1, le=999)
    test: int = Field(ge=0, le=999)
    noise: float = Field(1.0, gt=0, le=10, description="factor on the scanner's noise")

    @model_validator(mode="after")
    def _channels_of_mr_only(self) -> DatasetSettings:
        if bool(self.channels) != (self.modality == "MR"):
            raise ValueError("channels should be given for MR, and for MR only")
        return self

    @property
    def folder(self) -> str:
        """nnU-Net's name of the dataset."""
        return f"Dataset{self.number:03d}_{self.name}"


class PhantomSettings(Settings):
    """All datasets of a preset."""

    datasets: list[DatasetSettings] = Field(min_length=1)


def preset_file(preset: str) -> Path:
    """The federation's configuration of a preset.

    Raises:
        InputError: There is no such preset.
    """
    known = sorted(path.name.removesuffix(".data.yaml") for path in PRESETS.glob("*.data.yaml"))
    if preset not in known:
        raise InputError(f"no preset '{preset}'", field="PRESET", fix=f"use one of {', '.join(known)}")
    return PRESETS / f"{preset}.yaml"


def preset_datasets(preset: str) -> list[DatasetSettings]:
    """The datasets of a preset.

    Raises:
        InputError: There is no such preset, or its file is wrong.
    """
    content = yaml.safe_load(preset_file(preset).with_suffix(".data.yaml").read_text())
    return validated(PhantomSettings, content).datasets


def write_preset(preset: str, seed: int, raw: Path) -> list[Path]:
    """Write what is missing of a preset's datasets.

    Args:
        preset: Its name.
        seed: Of subjects, scanners and scans.
        raw: nnU-Net's raw folder.

    Returns:
        The datasets that were written.

    Raises:
        InputError: A dataset is there that is not of this preset, seed and version.
    """
    raw.mkdir(parents=True, exist_ok=True)
    return [path for settings in preset_datasets(preset) if (path := write_dataset(settings, seed, raw))]


def write_dataset(settings: DatasetSettings, seed: int, raw: Path) -> Path | None:
    """Write one dataset as a whole: beside its place, then renamed.

    Returns:
        Its folder, or None where it was there already.

    Raises:
        InputError: What is there is not of these settings, seed and version.
    """
    target, document = raw / settings.folder, _dataset_json(settings, seed)
    if target.exists():
        if not (target / "dataset.json").is_file() or read_json(target / "dataset.json") != document:
            raise InputError(
                f"{target} is not of this preset, seed and version", fix="remove it or choose another folder"
            )
        return None
    scratch = Path(tempfile.mkdtemp(prefix=f".{settings.folder}.", dir=raw))
    try:
        folder = scratch / settings.folder
        rows = [_write_case(settings, seed, folder, index) for index in range(settings.train + settings.test)]
        if settings.task == "class":
            write_text(folder / "cls_data.csv", "\n".join(["identifier,label,split", *rows, ""]))
        write_json(folder / "dataset.json", document)
        folder.rename(target)
    finally:
        shutil.rmtree(scratch)
    return target


def _dataset_json(settings: DatasetSettings, seed: int) -> dict[str, object]:
    names = settings.channels or ["CT"]
    classes = {"classification_labels": CLASSES} if settings.task == "class" else {}
    return {
        "name": settings.folder,
        "channel_names": {str(i): name for i, name in enumerate(names)},
        "labels": LABELS[settings.task],
        **classes,
        "numTraining": settings.train,
        "file_ending": ".nii.gz",
        "description": f"{settings.modality} phantoms, task {settings.task}",
        "phantom": {"version": VERSION, "seed": seed, **settings.model_dump()},
    }


def _write_case(settings: DatasetSettings, seed: int, folder: Path, index: int) -> str:
    """Write image and labels of a case; returns its line of ``cls_data.csv``."""
    case, split = f"case_{index:03d}", "Tr" if index < settings.train else "Ts"
    image, labels, label = make_case(settings, seed, index)
    (folder / f"images{split}").mkdir(parents=True, exist_ok=True)
    for channel in range(len(image.data)):
        write_volume(image, folder / f"images{split}" / f"{case}_{channel:04d}.nii.gz", channel=channel)
    if settings.task != "class":
        (folder / f"labels{split}").mkdir(exist_ok=True)
        write_segmentation(image, labels, folder / f"labels{split}" / f"{case}.nii.gz")
    return f"{case},{label},{'train' if split == 'Tr' else 'test'}"


def make_case(settings: DatasetSettings, seed: int, index: int) -> tuple[Volume, np.ndarray, int]:
    """One case of a dataset.

    Args:
        settings: The dataset.
        seed: Of the benchmark.
        index: Number of the case, training cases first.

    Returns:
        The image, its label map `[D, H, W]` and its class.
    """

    def generator(purpose: str) -> np.random.Generator:
        return np.random.default_rng(derive_seed(seed, client=settings.folder, purpose=purpose))

    label = index % 2 if settings.task == "class" else 0
    anatomy = make_subject(generator(f"subject {index}"), bool(label))
    scanner = _scanner(settings, generator("scanner"))
    image = Volume(scanner.scan(anatomy, generator(f"scan {index}")), (SPACING,) * 3, _affine())
    return image, make_labels(anatomy, settings.task), label


def _scanner(settings: DatasetSettings, rng: np.random.Generator) -> CTScanner | MRScanner:
    if settings.modality == "CT":
        return CTScanner.draw(rng, settings.noise)
    return MRScanner.draw(rng, settings.noise, tuple(settings.channels))


def _affine() -> np.ndarray:
    """Patients lie on their backs, head first: stored x runs to their left, y to their back (LPS)."""
    return np.diag([-SPACING, -SPACING, SPACING, 1.0])
