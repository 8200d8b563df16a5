"""A federation in NVFlare's simulator: server and every client in processes of one machine, without certificates."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fedcmt.config import FederationConfig
from fedcmt.engines.launch import wait_while
from fedcmt.engines.nvflare_job import CLASSES, write_job
from fedcmt.files import write_json


def run_in_simulator(config: FederationConfig, folder: Path, look: Callable[[], None]) -> Path:
    """Run a federation in the simulator, or go on with one, until it ends.

    Args:
        config: The federation's settings, checked.
        folder: An empty place for the simulator's files.
        look: Called again and again meanwhile.

    Returns:
        The simulator's log.
    """
    job = write_job(config, folder / "job", one_machine=True)
    # NVFlare builds no class that a site has not allowed, in its simulator neither.
    write_json(folder / "run" / "local" / "resources.json", {"format_version": 2, "class_allow_list": list(CLASSES)})
    names = [client.name for client in config.clients]
    log = folder / "simulator.log"
    command = [
        sys.executable, "-m", "nvflare.private.fed.app.simulator.simulator", str(job),
        "-w", str(folder / "run"), "-c", ",".join(names), "-t", str(len(names)),
    ]  # fmt: skip
    with open(log, "wb") as output:
        # A session of its own, so that whatever it starts can be ended with it.
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=_environment())
        try:
            wait_while(lambda: process.poll() is None, look)
        finally:
            _end_group(process)
    return log


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started in its session."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
