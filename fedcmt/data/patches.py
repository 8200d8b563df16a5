"""A client's patches: its cases opened once, batches of any round from any place on, made ahead of their use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from fedcmt.config import DataConfig
from fedcmt.data.backend import resolve_backend
from fedcmt.data.readahead import Maker, ReadAhead
from fedcmt.data.source import CaseReader
from fedcmt.data.torch_pipeline import Batch, PatchSource, TorchMaker
from fedcmt.seeding import sample_generator

_logger = logging.getLogger("fedcmt.data")


class Patches:
    """Batches of one client's patches.

    Args:
        source: Whose patches, and what they undergo.
        settings: Backend, threads and timeout.
        seed: The federation's.
        purpose: ``"training"`` or ``"validation"``; each has random numbers of its own.
        device: Where the batches will be used.
    """

    def __init__(
        self, source: PatchSource, settings: DataConfig, *, seed: int, purpose: str, device: torch.device
    ) -> None:
        self._source, self._settings, self._device = source, settings, device
        self._generator = partial(sample_generator, seed, client=source.client, purpose=f"{purpose} patches")
        self._backend = resolve_backend(settings.backend, device).name
        self._readers: list[CaseReader] = []  # idle ones; their cases stay open between rounds

    @contextmanager
    def batches(self, round_index: int, count: int, *, first: int = 0) -> Iterator[ReadAhead[Batch]]:
        """Batches ``first`` to ``first + count`` of a round; what they hold depends on nothing before.

        Args:
            round_index: 1 for the first; 0 for what is the same in every round.
            count: Number of batches.
            first: Place of the first in the round.

        Raises:
            InputError: A case cannot be read.
            RunError: Reading hangs again and again.
        """
        lent: list[CaseReader] = []
        ahead = ReadAhead(
            lambda: self._maker(round_index, lent),
            first=first,
            count=count,
            threads=min(self._threads(), count),
            ahead=self._settings.ahead,
            timeout=self._settings.timeout,
            note=_logger.warning,
        )
        with ahead:
            yield ahead
        if not ahead.replaced:  # otherwise a thread that hangs may still hold one of them
            self._readers += lent

    def reader(self) -> CaseReader:
        """A reader for the calling thread alone."""
        return CaseReader(self._source.folder, self._source.rules.channels, self._source.client)

    def _threads(self) -> int:
        return self._settings.threads or (4 if self._device.type == "cuda" else 1)

    def _maker(self, round_index: int, lent: list[CaseReader]) -> Maker[Batch]:
        generator: Callable[[int], np.random.Generator] = lambda index: self._generator(  # noqa: E731
            round_index=round_index, index=index
        )
        lent.append(self._readers.pop() if self._readers else self.reader())
        if self._backend == "dali":
            from fedcmt.data.dali import DaliMaker

            ahead = max(self._settings.ahead, self._threads())  # as ReadAhead counts
            return DaliMaker(self._source, lent[-1], generator, self._device, ahead)
        return TorchMaker(self._source, lent[-1], generator, pinned=self._device.type == "cuda")
