"""What the ten ``dataset.json`` of the Medical Segmentation Decathlon say, as published; lists of cases left out."""

from __future__ import annotations

from typing import Any

MSD: dict[str, dict[str, Any]] = {
    "Task01_BrainTumour": {
        "name": "BRATS",
        "tensorImageSize": "4D",
        "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
    },
    "Task02_Heart": {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "left atrium"}},
    "Task03_Liver": {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "cancer"}},
    "Task04_Hippocampus": {
        "name": "Hippocampus",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
    },
    "Task05_Prostate": {
        "name": "PROSTATE",
        "tensorImageSize": "4D",
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "PZ", "2": "TZ"},
    },
    "Task06_Lung": {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "cancer"}},
    "Task07_Pancreas": {
        "name": "Pancreas",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "pancreas", "2": "cancer"},
    },
    "Task08_HepaticVessel": {
        "name": "HepaticVessel",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "Vessel", "2": "Tumour"},
    },
    "Task09_Spleen": {
        "name": "Spleen",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "spleen"},
    },
    "Task10_Colon": {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "colon cancer primaries"}},
}


def as_converted(document: dict[str, Any], num_training: int) -> dict[str, Any]:
    """The document after ``nnUNetv2_convert_MSD_dataset``."""
    converted = {key: value for key, value in document.items() if key != "modality"}
    return converted | {
        "labels": {name: int(value) for value, name in document["labels"].items()},
        "channel_names": document["modality"],
        "file_ending": ".nii.gz",
        "numTraining": num_training,
    }
