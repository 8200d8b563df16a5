"""Runs a federation and kills itself (SIGKILL) at a named point: python killed_run.py POINT CONFIG."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from fedcmt import federation, files, run_federation
from fedcmt.trainer import Trainer


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def kill_in_training(round_index: int, client: str) -> None:
    """In the second local step."""
    fit = Trainer.fit

    def watched(self: Trainer, now: int, steps: int, on_step) -> object:
        def check(step: int, loss: float) -> None:
            on_step(step, loss)
            if (now, self._client, step) == (round_index, client, 2):
                die()

        return fit(self, now, steps, check)

    Trainer.fit = watched


def kill_in_write(name: str) -> None:
    """With half of a file written."""
    fsync, write_bytes = os.fsync, files.write_bytes

    def half(path: Path, content: bytes) -> None:
        if str(path).endswith(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_name(f".{path.name}.part"), "wb") as file:
                file.write(content[: len(content) // 2])
                file.flush()
                fsync(file.fileno())
            die()
        write_bytes(path, content)

    files.write_bytes = half


def kill_between_rounds(round_index: int) -> None:
    """When a round is committed and the next has not begun."""
    commit = federation.commit

    def watched(workspace, server, *rest) -> None:
        commit(workspace, server, *rest)
        if server.round_index == round_index:
            die()

    federation.commit = watched


POINTS = {
    "training-1": lambda: kill_in_training(1, "ct_regions"),
    "client-state-1": lambda: kill_in_write("mr_two/state/round-0001.safetensors"),
    "best-1": lambda: kill_in_write("ct_plain/best.safetensors"),
    "metrics-1": lambda: kill_in_write("metrics.jsonl"),
    "server-state-1": lambda: kill_in_write("server/round-0001.safetensors"),
    "between-1": lambda: kill_between_rounds(1),
    "training-2": lambda: kill_in_training(2, "mr_class"),
    "server-state-2": lambda: kill_in_write("server/round-0002.safetensors"),
    "results": lambda: kill_in_write("results.json"),
}

if __name__ == "__main__":
    POINTS[sys.argv[1]]()
    run_federation(sys.argv[2])
