"""An MR scanner: T1, T2, PD and FLAIR weighting from the spin-echo signal, bias field, Rician noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from anatomy import SHAPE, Anatomy, Tissue, coarse
from scipy.ndimage import gaussian_filter

# Proton density (water 1), T1 and T2 in ms at 1.5 T. Flowing blood leaves the slice before its echo: a flow void.
_TISSUES = {
    Tissue.AIR: (0.0, 1000, 50),
    Tissue.FAT: (0.9, 280, 80),
    Tissue.MUSCLE: (0.75, 950, 40),
    Tissue.BONE: (0.15, 350, 20),
    Tissue.LIVER: (0.70, 550, 45),
    Tissue.SPLEEN: (0.80, 1050, 75),
    Tissue.KIDNEY: (0.82, 950, 90),
    Tissue.FLUID: (0.95, 2600, 300),
    Tissue.VESSEL: (0.12, 1400, 150),
    Tissue.LESION: (0.82, 1000, 95),
    Tissue.CYST: (0.98, 2900, 350),
    Tissue.FATTY_LIVER: (0.80, 380, 62),
}
# Repetition, echo and inversion time in ms; no inversion where the last is 0.
_SEQUENCES = {"T1": (500, 12, 0), "T2": (4000, 90, 0), "PD": (3500, 20, 0), "FLAIR": (9000, 100, 2100)}
CHANNELS = tuple(_SEQUENCES)
_SCALE = 1000.0  # stored units of a signal of 1


@dataclass(frozen=True)
class MRScanner:
    """What differs between sites.

    Attributes:
        channels: Contrasts, in the order of the channels.
        noise: Standard deviation of the complex signal's noise, water at full magnetisation being 1.
        bias: Standard deviation of the logarithm of the bias field.
        timing: Factors on repetition and echo time.
        field: Factor on T1, which grows with the field strength.
        blur: Sigma of the point spread in voxels.
    """

    channels: tuple[str, ...]
    noise: float
    bias: float
    timing: tuple[float, float]
    field: float
    blur: float

    @classmethod
    def draw(cls, rng: np.random.Generator, noise: float, channels: tuple[str, ...]) -> MRScanner:
        """A site's scanner; ``noise`` is a factor."""
        timing = rng.uniform(0.85, 1.2), rng.uniform(0.85, 1.2)
        return cls(
            channels, noise * rng.uniform(0.02, 0.035), rng.uniform(0.1, 0.25), timing, rng.uniform(0.9, 1.2),
            rng.uniform(0.35, 0.6),
        )  # fmt: skip

    def scan(self, anatomy: Anatomy, rng: np.random.Generator) -> np.ndarray:
        """An image `[C, D, H, W]`, float32, never negative."""
        tissues = np.array([_TISSUES[tissue] for tissue in Tissue], float) * rng.normal(1, 0.08, (len(Tissue), 3))
        texture = gaussian_filter(rng.normal(size=anatomy.tissue.shape), 2.5)
        texture = 1 + 0.05 * texture / texture.std()
        return np.stack([self._channel(name, tissues, texture, anatomy, rng) for name in self.channels])

    def _channel(
        self, name: str, tissues: np.ndarray, texture: np.ndarray, anatomy: Anatomy, rng: np.random.Generator
    ) -> np.ndarray:
        values = self._signals(name, tissues)
        fine = values[anatomy.tissue]
        for share, tissue in ((anatomy.lesion, Tissue.LESION), (anatomy.cyst, Tissue.CYST)):
            fine += share * (values[tissue] - fine)
        signal = gaussian_filter(coarse(fine * texture), self.blur) * _bias_field(rng, self.bias)
        real, imaginary = rng.normal(0, self.noise, (2, *SHAPE))
        return (_SCALE * np.hypot(signal + real, imaginary)).astype(np.float32)

    def _signals(self, name: str, tissues: np.ndarray) -> np.ndarray:
        """Magnitude of the spin echo, with inversion recovery where the sequence has one."""
        repetition, echo, inversion = np.array(_SEQUENCES[name]) * (*self.timing, 1.0)
        density, t1, t2 = tissues.T
        t1 = t1 * self.field
        recovered = 1 - np.exp(-repetition / t1)
        if inversion:
            recovered = 1 - 2 * np.exp(-inversion * self.field / t1) + np.exp(-repetition / t1)
        return np.abs(density * recovered * np.exp(-echo / t2))


def _bias_field(rng: np.random.Generator, strength: float) -> np.ndarray:
    """The exponential of a random polynomial of degree 2, with mean 0 and the given standard deviation."""
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    terms = np.stack([z, y, x, z * y, z * x, y * x, z * z, y * y, x * x])
    field = np.tensordot(rng.normal(size=len(terms)), terms, 1)
    return np.exp(strength * (field - field.mean()) / field.std())
