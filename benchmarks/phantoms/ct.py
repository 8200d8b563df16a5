"""A CT scanner: Hounsfield units, with the beam hardening and the noise that filtered back-projection gives.

Anatomy is rendered as it is; what the scan does to it (hardening, noise) is computed on sinograms and back-projected:
reconstruction is linear, and so the errors of the projections are the errors of the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from anatomy import SHAPE, SPACING, Anatomy, Tissue, coarse
from scipy import sparse
from scipy.ndimage import gaussian_filter

# Hounsfield units in the portal venous phase.
_HU = {
    Tissue.AIR: -1000,
    Tissue.FAT: -95,
    Tissue.MUSCLE: 55,
    Tissue.BONE: 480,
    Tissue.LIVER: 100,
    Tissue.SPLEEN: 130,
    Tissue.KIDNEY: 170,
    Tissue.FLUID: 12,
    Tissue.VESSEL: 175,
    Tissue.LESION: 50,
    Tissue.CYST: 10,
    Tissue.FATTY_LIVER: 15,
}
_LOWEST, _HIGHEST = -1024, 3071
_WATER = 0.02  # attenuation of water per mm
_ANGLES, _BINS = 48, 48
_ENHANCED = [Tissue.LIVER, Tissue.SPLEEN, Tissue.KIDNEY, Tissue.VESSEL]


@dataclass(frozen=True)
class CTScanner:
    """What differs between sites.

    Attributes:
        noise: Standard deviation in HU of a voxel's noise.
        hardening: Strength of beam hardening; 1 is a scanner that corrects for water imperfectly.
        enhancement: Factor on what contrast agent adds.
        blur: Sigma of the reconstruction kernel in voxels.
    """

    noise: float
    hardening: float
    enhancement: float
    blur: float

    @classmethod
    def draw(cls, rng: np.random.Generator, noise: float) -> CTScanner:
        """A site's scanner; ``noise`` is a factor."""
        return cls(noise * rng.uniform(14, 22), rng.uniform(0.6, 1.4), rng.uniform(0.75, 1.15), rng.uniform(0.35, 0.6))

    def scan(self, anatomy: Anatomy, rng: np.random.Generator) -> np.ndarray:
        """An image `[1, D, H, W]` in Hounsfield units, whole numbers as scanners store them, as float32."""
        values = np.array([_HU[tissue] for tissue in Tissue], float)
        # How much of the contrast agent has arrived differs by patient, and so do tissues; air is the same everywhere.
        values[_ENHANCED] = 55 + (values[_ENHANCED] - 55) * self.enhancement * rng.uniform(0.7, 1.3)
        values[1:] += rng.normal(0, 9, len(values) - 1)
        fine = values[anatomy.tissue]
        for share, tissue in ((anatomy.lesion, Tissue.LESION), (anatomy.cyst, Tissue.CYST)):
            fine += share * (values[tissue] - fine)
        texture = gaussian_filter(rng.normal(size=fine.shape), 2.5)
        fine += 8 * texture / texture.std() * (anatomy.tissue > Tissue.AIR)
        exact = gaussian_filter(coarse(fine), self.blur)
        image = exact + self._hardening_error(coarse(fine)) + self._noise(rng)
        return np.clip(np.rint(image), _LOWEST, _HIGHEST)[None].astype(np.float32)

    def _hardening_error(self, hu: np.ndarray) -> np.ndarray:
        """Cupping, and dark bands between bones: long and dense paths seem to attenuate less than they do."""
        water = np.clip(hu / 1000 + 1, 0, None) * _WATER
        bone = np.where(hu > 250, water, 0)
        paths, bone_paths = _project(water), _project(bone)
        return _reconstruct(-self.hardening * (0.003 * paths**2 + 0.03 * paths * bone_paths)) / _WATER * 1000

    def _noise(self, rng: np.random.Generator) -> np.ndarray:
        """Noise of independent detector readings, reconstructed: streaky, and without low frequencies."""
        image = _reconstruct(rng.normal(size=(_ANGLES * _BINS, SHAPE[0])))
        return image * (self.noise / image.std())


@cache
def _radon() -> sparse.csr_matrix:
    """Parallel projection of a slice, `[angles * bins, H * W]`, linear between detector bins; lengths in mm."""
    y, x = (a.ravel() for a in np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in SHAPE[1:]], indexing="ij"))
    rows, columns, values = [], [], []
    for index, angle in enumerate(np.arange(_ANGLES) * np.pi / _ANGLES):
        place = x * np.cos(angle) + y * np.sin(angle) + (_BINS - 1) / 2
        left = np.floor(place).astype(int)
        for bin_index, share in ((left, left + 1 - place), (left + 1, place - left)):
            rows.append(index * _BINS + bin_index)
            columns.append(np.arange(len(x)))
            values.append(share * SPACING)
    entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    return sparse.csr_matrix(entries, shape=(_ANGLES * _BINS, len(x)))


def _project(volume: np.ndarray) -> np.ndarray:
    """`[D, H, W]` to sinograms `[angles * bins, D]`."""
    return _radon() @ volume.reshape(SHAPE[0], -1).T


@cache
def _ramp() -> np.ndarray:
    """Ramachandran and Lakshminarayanan's filter as a matrix `[bins, bins]` (Kak and Slaney, equation 3.61)."""
    distance = np.abs(np.subtract.outer(np.arange(_BINS), np.arange(_BINS)))
    odd = distance % 2 == 1
    kernel = np.where(odd, -1 / (np.pi * np.where(odd, distance, 1) * SPACING) ** 2, 0.0)
    return (kernel + np.eye(_BINS) / (4 * SPACING**2)) * SPACING


def _reconstruct(sinograms: np.ndarray) -> np.ndarray:
    """Filtered back-projection: `[angles * bins, D]` to `[D, H, W]`."""
    filtered = np.einsum("bc,acd->abd", _ramp(), sinograms.reshape(_ANGLES, _BINS, -1))
    slices = _radon().T @ filtered.reshape(_ANGLES * _BINS, -1) * (np.pi / _ANGLES / SPACING)
    return slices.T.reshape(SHAPE)
