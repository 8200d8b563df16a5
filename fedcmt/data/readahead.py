"""Items made ahead of their use by background threads, handed out in order; threads that hang are replaced."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Protocol, TypeVar

import torch
from threadpoolctl import threadpool_limits

from fedcmt.errors import RunError

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)

_MOST_ATTEMPTS = 3  # at one item
_LONGEST_FAREWELL = 10.0  # seconds


class Maker(Protocol[Item_co]):
    """Makes items in one thread. An item depends on its index alone, so that any thread can make it again."""

    def make(self, index: int) -> Item_co:
        """The item of an index."""

    def doing(self) -> str:
        """What is being worked on, for messages; called from other threads."""


@dataclass
class _Worker(Generic[Item]):
    maker: Maker[Item]
    index: int | None = None  # being made
    since: float = 0.0
    abandoned: bool = False


@dataclass
class _Shared(Generic[Item]):
    """What threads and consumer share, under one lock."""

    waiting: deque[int] = field(default_factory=deque)
    done: dict[int, Item | BaseException] = field(default_factory=dict)
    workers: list[_Worker[Item]] = field(default_factory=list)
    closed: bool = False
    worked: float = 0.0  # CPU seconds on finished items
    changed: threading.Condition = field(default_factory=threading.Condition)


class ReadAhead(Generic[Item]):
    """Iterates over items `first`, `first + 1`, ...; a context manager that ends its threads.

    The order and content of items depend neither on the number of threads nor on what happens to them.

    Args:
        makers: Gives a new maker for every thread.
        first: Index of the first item.
        count: Items in all.
        threads: That make items.
        ahead: Items made or in the making beyond the one in use: the bound of memory.
        timeout: Seconds after which a thread at one item counts as hanging.
        note: Told when a thread is replaced.

    Raises:
        RunError: One item made several threads hang.
    """

    def __init__(
        self,
        makers: Callable[[], Maker[Item]],
        *,
        first: int,
        count: int,
        threads: int,
        ahead: int,
        timeout: float,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._makers, self._threads, self._timeout, self._note = makers, threads, timeout, note
        self._next, self._end, self._ahead = first, first + count, max(ahead, threads)
        self._given = first  # to the threads
        self._shared: _Shared[Item] = _Shared()
        self._attempts: dict[int, int] = {}
        self.seconds_waited = 0.0  # in which the consumer stood still
        self.replaced = 0  # threads that hung

    @property
    def seconds_worked(self) -> float:
        """CPU time of the threads on finished items."""
        with self._shared.changed:
            return self._shared.worked

    def __enter__(self) -> ReadAhead[Item]:
        started = time.perf_counter()
        for _ in range(self._threads):
            self._start()
        self._hand_out()
        self.seconds_waited = time.perf_counter() - started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shared = self._shared
        with shared.changed:
            shared.closed = True
            shared.waiting.clear()
            shared.done.clear()
            shared.changed.notify_all()
            # Threads at work are waited for, a while: nothing of them should outlive the block.
            deadline = time.monotonic() + min(self._timeout, _LONGEST_FAREWELL)
            while any(w.index is not None for w in shared.workers) and time.monotonic() < deadline:
                shared.changed.wait(deadline - time.monotonic())

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._next == self._end:
            raise StopIteration
        asked = time.perf_counter()
        item = self._awaited(self._next)
        self.seconds_waited += time.perf_counter() - asked
        if isinstance(item, BaseException):
            raise item
        self._next += 1
        self._hand_out()
        return item

    def _awaited(self, index: int) -> Item | BaseException:
        shared = self._shared
        with shared.changed:
            while index not in shared.done:
                now = time.monotonic()
                busy = [worker for worker in shared.workers if worker.index is not None]
                for worker in busy:
                    if now - worker.since > self._timeout:
                        self._replace(worker)
                soonest = min((worker.since + self._timeout - now for worker in busy), default=self._timeout)
                shared.changed.wait(max(soonest, 0.01))
            return shared.done.pop(index)

    def _replace(self, worker: _Worker[Item]) -> None:
        """Give a hanging thread's item to a new thread. The old one ends by itself, if it ever goes on."""
        assert worker.index is not None
        index, doing = worker.index, worker.maker.doing()
        self._attempts[index] = self._attempts.get(index, 0) + 1
        self.replaced += 1
        worker.abandoned = True
        self._shared.workers.remove(worker)
        if self._attempts[index] == _MOST_ATTEMPTS:
            self._shared.done[index] = RunError(f"{doing}: nothing within {self._timeout:g} s, {_MOST_ATTEMPTS} times")
            return
        self._note(f"{doing}: nothing within {self._timeout:g} s, trying again")
        self._shared.waiting.appendleft(index)
        self._start()

    def _start(self) -> None:
        worker = _Worker(self._makers())
        self._shared.workers.append(worker)
        threading.Thread(target=_work, args=(worker, self._shared), daemon=True, name="fedcmt-data").start()

    def _hand_out(self) -> None:
        with self._shared.changed:
            until = min(self._next + self._ahead, self._end)
            self._shared.waiting.extend(range(self._given, until))
            self._given = max(self._given, until)
            self._shared.changed.notify_all()


def _work(worker: _Worker[Item], shared: _Shared[Item]) -> None:
    """A thread's life."""
    torch.get_num_threads()  # torch sets this thread's number at its first use; only then can it be changed
    with threadpool_limits(1, "openmp"):
        while True:
            with shared.changed:
                while not shared.waiting and not shared.closed:
                    shared.changed.wait()
                if shared.closed or worker.abandoned:
                    return
                worker.index, worker.since = shared.waiting.popleft(), time.monotonic()
            started = time.thread_time()
            try:
                item: Item | BaseException = worker.maker.make(worker.index)
            except BaseException as error:  # handed to the consumer, whose turn it is to raise it
                item = error
            with shared.changed:
                if worker.abandoned:
                    return
                if not shared.closed:
                    shared.done[worker.index] = item
                shared.worked += time.thread_time() - started
                worker.index = None
                shared.changed.notify_all()
