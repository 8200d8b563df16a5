"""How a case of the demo data is made out of the published volumes: masks, regions, atlas labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np
from scipy import ndimage

from fedcmt.orientation import reoriented
from fedcmt.volume import Volume, read_volume

IMAGE_FILES = {
    "lung1": "lung1_image.nrrd",
    "lung2": "lung2_image.nrrd",
    "brain1": "brain1_image.nrrd",
    "brain2": "brain2_image.nrrd",
    "breast1": "breast1_image.nrrd",
    "mni_2009a": "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
    "mni_2009c": "mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz",
    "mni_fsl": "MNI152_T1_1mm_brain.nii.gz",
}

# Label values of the AAL2 atlas, both sides together; the cerebellum is given as a range of lobules and vermis.
AAL_STRUCTURES = {
    "thalamus": (7101, 7102),
    "hippocampus": (4101, 4102),
    "caudate": (7001, 7002),
    "putamen": (7011, 7012),
    "cerebellum": tuple(range(9000, 9200)),
}


@dataclass(frozen=True)
class DemoCase:
    """One case in memory: its channels on one grid, and its label map where it has one."""

    channels: tuple[Volume, ...]
    labels: np.ndarray | None = None  # [D, H, W]


# CT


def chest_regions(files: Path, subject: str) -> DemoCase:
    """Returns a chest CT, cropped to the patient, with body 1, lung 2 and bone 3."""
    image = read_volume(files / IMAGE_FILES[subject], dtype=None)
    labels = region_labels(image.data[0], float(np.prod(image.spacing)))
    box = body_box(labels > 0)
    return DemoCase((crop(image, box),), labels[box])


def lung_tumour(files: Path, subject: str) -> DemoCase:
    """Returns a chest CT, cropped to the patient, with the tumour as label 1."""
    image = read_volume(files / IMAGE_FILES[subject], dtype=None)
    box = body_box(body_mask(image.data[0]))
    return DemoCase((crop(image, box),), tumour_mask(files, subject)[box])


def body_mask(hounsfield: np.ndarray) -> np.ndarray:
    """Returns the inside of the patient ``[D, H, W]``: the largest dense object, with its holes filled per slice."""
    dense = ndimage.binary_opening(hounsfield > -300, np.ones((1, 5, 5)))  # cuts the couch and clothes off
    body = largest_components(dense, 1)
    return np.stack([_filled(plane) for plane in body])


def _filled(plane: np.ndarray) -> np.ndarray:
    # A lung may be cut by the side of the field of view: close it between the first and last dense voxel there.
    closed = np.pad(plane, ((0, 0), (1, 1)))
    for side in (0, -1):
        rows = np.flatnonzero(plane[:, side])
        if rows.size:
            closed[rows[0] : rows[-1] + 1, side] = True
    return ndimage.binary_fill_holes(closed)[:, 1:-1]


def region_labels(hounsfield: np.ndarray, voxel_mm3: float) -> np.ndarray:
    """Labels a chest CT by fixed thresholds.

    Args:
        hounsfield: ``[D, H, W]``.
        voxel_mm3: volume of a voxel.

    Returns:
        ``[D, H, W]`` uint8: 1 body, 2 lung (below -500 HU inside it, pieces over 20 ml), 3 bone (above 226 HU inside
        it, pieces over 1 ml).
    """
    body = body_mask(hounsfield)
    lung = drop_small(body & (hounsfield < -500), 20_000 / voxel_mm3)
    bone = drop_small(body & (hounsfield > 226), 1_000 / voxel_mm3)
    labels = body.astype(np.uint8)
    labels[lung] = 2
    labels[bone] = 3
    return labels


def largest_components(mask: np.ndarray, number: int) -> np.ndarray:
    """Returns the ``number`` largest face-connected pieces of a mask."""
    pieces, _ = ndimage.label(mask)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    kept = np.argsort(sizes, kind="stable")[::-1][:number]
    return np.isin(pieces, kept[sizes[kept] > 0])


def drop_small(mask: np.ndarray, min_voxels: float) -> np.ndarray:
    """Returns the face-connected pieces of a mask that have at least ``min_voxels`` voxels."""
    pieces, _ = ndimage.label(mask)
    sizes = np.bincount(pieces.ravel())
    kept = sizes >= min_voxels
    kept[0] = False
    return kept[pieces]


def body_box(mask: np.ndarray, margin: int = 5) -> tuple[slice, slice, slice]:
    """Returns the box around a mask ``[D, H, W]``, with a margin in the axial plane."""
    depth, height, width = ndimage.find_objects(mask.astype(np.uint8))[0]
    return (
        depth,
        slice(max(height.start - margin, 0), height.stop + margin),
        slice(max(width.start - margin, 0), width.stop + margin),
    )


def crop(volume: Volume, box: tuple[slice, slice, slice]) -> Volume:
    """Returns the part of a volume inside ``box`` (D, H, W), still at its place in space."""
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [part.start for part in reversed(box)]
    return Volume(np.ascontiguousarray(volume.data[:, *box]), volume.spacing, affine)


# MR


def brain_tumour(files: Path, subject: str) -> DemoCase:
    """Returns a brain MR and the gradient magnitude derived from it, with the tumour as label 1."""
    image = read_volume(files / IMAGE_FILES[subject], dtype=None)
    return DemoCase((image, gradient_magnitude(image)), tumour_mask(files, subject))


def gradient_magnitude(image: Volume) -> Volume:
    """Returns the length of the intensity gradient per mm, after smoothing by 1 mm, as float32."""
    smooth = ndimage.gaussian_filter(image.data[0].astype(np.float32), [1.0 / size for size in image.spacing])
    gradient = np.gradient(smooth, *image.spacing)
    return replace(image, data=np.sqrt(sum(part**2 for part in gradient)).astype(np.float32)[None])


def tumour_mask(files: Path, subject: str) -> np.ndarray:
    """Returns the tumour drawn by the publishers, ``[D, H, W]`` uint8."""
    label = read_volume(files / f"{subject}_label.nrrd", dtype=None)
    return (label.data[0] == 1).astype(np.uint8)


def brain_tissue(files: Path, subject: str) -> DemoCase:
    """Returns the T1 template with grey matter 1 and white matter 2 where they are the most probable tissue."""
    image = read_volume(files / IMAGE_FILES[subject], dtype=None)
    name = IMAGE_FILES[subject]
    grey, white = (
        read_volume(files / name.replace("_t1_", f"_{tissue}_"), dtype=np.int16).data[0] for tissue in ("gm", "wm")
    )
    return DemoCase((image,), np.stack([255 - grey - white, grey, white]).argmax(axis=0).astype(np.uint8))


def brain_structures(files: Path, subject: str) -> DemoCase:
    """Returns a T1 template with the structures of the AAL2 atlas, and "ignore" where the atlas is too coarse.

    The atlas has 2 mm voxels. Unlabelled brain that touches a structure on the template's 1 mm grid may belong to
    it, so it is left out of training and scoring. The templates are published in different orientations (LAS and RAS),
    which a network cannot know; all are stored as RAS.
    """
    image = stored_as_ras(read_volume(files / IMAGE_FILES[subject], dtype=None))
    atlas = resample_nearest(read_volume(files / "atlas_aal.nii.gz", dtype=np.int32), image)
    brain = image.data[0] > 0
    labels = np.zeros(atlas.shape, np.uint8)
    for value, members in enumerate(AAL_STRUCTURES.values(), start=1):
        labels[np.isin(atlas, members) & brain] = value
    near = ndimage.binary_dilation(labels > 0)
    labels[near & (labels == 0) & (atlas == 0) & brain] = len(AAL_STRUCTURES) + 1
    return DemoCase((image,), labels)


def stored_as_ras(volume: Volume) -> Volume:
    """Returns a volume whose voxel axes x, y and z point right, forward and up, every voxel at its place."""
    turned = reoriented(volume, "RAS")
    return Volume(turned.data, turned.spacing, turned.affine)


def resample_nearest(labels: Volume, grid: Volume) -> np.ndarray:
    """Returns ``labels`` on the voxels of ``grid``, ``[D, H, W]``, 0 outside; both must lie in the same space."""
    to_labels = np.linalg.inv(labels.affine) @ grid.affine
    # Affines speak of (x, y, z), arrays of (z, y, x).
    matrix, offset = to_labels[:3, :3][::-1, ::-1], to_labels[:3, 3][::-1]
    return ndimage.affine_transform(
        labels.data[0], matrix, offset, output_shape=grid.data.shape[1:], order=0, mode="constant", cval=0
    )


def any_image(files: Path, subject: str) -> DemoCase:
    """Returns a volume without a label map."""
    path = files / IMAGE_FILES[subject] if subject in IMAGE_FILES else anatomical_file()
    return DemoCase((read_volume(path, dtype=None),))


def anatomical_file() -> Path:
    """Returns the small T1 volume in nibabel's own tests; not every build of nibabel carries them."""
    return Path(str(resources.files("nibabel") / "tests" / "data" / "anatomical.nii"))
