"""Reading, computing and writing of many cases, overlapping, with a bounded number of cases in memory."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fedcmt.errors import InputError, RunError

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Computed = TypeVar("Computed")

_WAITING = 1  # cases between two stages
_POLL_SECONDS = 0.2
_END = object()

# What can be wrong with one case. Anything else is a defect and ends the run.
CASE_ERRORS = (InputError, RunError, OSError, MemoryError)


@dataclass(frozen=True)
class _Done:
    """What a stage hands on: a value or the error that took its place."""

    item: Any
    value: Any = None
    error: BaseException | None = None


class Pipeline(Generic[Item, Loaded, Computed]):
    """Three stages: two threads read and write while the caller's thread computes.

    Args:
        load: Item -> what is computed with.
        compute: Item, loaded -> what is written. Runs in the caller's thread.
        store: Item, computed -> nothing.
        finished: Told of every item at its end, in order, with its error or None; may raise to end the run.
    """

    def __init__(
        self,
        load: Callable[[Item], Loaded],
        compute: Callable[[Item, Loaded], Computed],
        store: Callable[[Item, Computed], None],
        finished: Callable[[Item, BaseException | None], None],
    ) -> None:
        self._load, self._compute, self._store, self._finished = load, compute, store, finished
        self._loaded: queue.Queue[Any] = queue.Queue(_WAITING)
        self._computed: queue.Queue[Any] = queue.Queue(_WAITING)
        self._stop = threading.Event()
        self._defect: BaseException | None = None

    def run(self, items: Iterable[Item]) -> None:
        """Take all items through the stages.

        Raises:
            BaseException: What `finished` raised, or an error that is no case's own.
        """
        threads = [
            threading.Thread(target=self._read, args=(items,), name="read", daemon=True),
            threading.Thread(target=self._write, name="write", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            while not self._stop.is_set() and (done := self._take(self._loaded)) is not _END:
                self._put(self._computed, self._attempt(self._compute, done))
            self._put(self._computed, _END)
            threads[1].join()
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        if self._defect is not None:
            raise self._defect

    def _read(self, items: Iterable[Item]) -> None:
        with self._ending_on_defect():
            for item in items:
                self._put(self._loaded, self._attempt(lambda item, _: self._load(item), _Done(item)))
                if self._stop.is_set():
                    return
        self._put(self._loaded, _END)

    def _write(self) -> None:
        with self._ending_on_defect():
            while (done := self._take(self._computed)) is not _END:
                done = self._attempt(self._store, done)
                self._finished(done.item, done.error)

    def _attempt(self, stage: Callable[[Any, Any], Any], done: _Done) -> _Done:
        if done.error is not None:
            return done
        try:
            return _Done(done.item, stage(done.item, done.value))
        except CASE_ERRORS as error:
            return _Done(done.item, error=error)

    def _ending_on_defect(self) -> _Ending:
        return _Ending(self)

    def stop(self, defect: BaseException) -> None:
        """End all stages; `run` raises the defect."""
        self._defect = self._defect or defect
        self._stop.set()

    def _put(self, target: queue.Queue[Any], value: Any) -> None:
        while not self._stop.is_set():
            try:
                target.put(value, timeout=_POLL_SECONDS)
                return
            except queue.Full:
                continue

    def _take(self, source: queue.Queue[Any]) -> Any:
        while not self._stop.is_set():
            try:
                return source.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
        return _END


class _Ending:
    """Carries an error of a thread to the caller."""

    def __init__(self, pipeline: Pipeline[Any, Any, Any]) -> None:
        self._pipeline = pipeline

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is not None:
            self._pipeline.stop(error)
        return True
