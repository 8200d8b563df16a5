"""Randomness: every generator is derived from (seed, client, round, purpose), so a resumed run draws alike."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, *, client: str = "", round_index: int = 0, purpose: str) -> int:
    """A 32-bit seed for one purpose of one client in one round.

    Args:
        seed: The federation's seed.
        client: Client name; empty for the server.
        round_index: Round, 1 for the first; 0 for what happens before the rounds.
        purpose: What the numbers are for, e.g. ``"training"``.
    """
    text = f"{seed}\x1f{client}\x1f{round_index}\x1f{purpose}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def sample_generator(seed: int, *, client: str, round_index: int, purpose: str, index: int) -> np.random.Generator:
    """NumPy's generator of one sample: it depends on no other sample, so any order and any start give the same.

    Args:
        seed: The federation's seed.
        client: Client name.
        round_index: Round, 1 for the first; 0 for what is the same in every round.
        purpose: What the samples are for, e.g. ``"training patches"``.
        index: Place of the sample in its round, 0 for the first.
    """
    text = f"{seed}\x1f{client}\x1f{round_index}\x1f{purpose}\x1f{index}"
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
    return np.random.Generator(np.random.PCG64(key))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global generators for a block, and put them back afterwards.

    torch initialises networks from its global generator; there is no other way to steer it.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
