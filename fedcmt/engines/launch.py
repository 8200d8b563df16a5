"""Before and after a distributed run that is started from one machine: checks, progress, and the result."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedcmt import strategies
from fedcmt.checkpoint import Workspace
from fedcmt.config import FederationConfig
from fedcmt.continuing import check_same_federation
from fedcmt.errors import InputError, RunError
from fedcmt.federation import FederationResult
from fedcmt.files import read_json, write_json
from fedcmt.preparation import load_datasets

_LOOK_AGAIN = 0.3  # seconds


def run_on(engine: str, config: FederationConfig, *, fresh: bool, show: Callable[[str], None]) -> FederationResult:
    """Run a federation on NVFlare from this machine.

    Args:
        engine: ``nvflare`` for its simulator, ``nvflare-poc`` for local processes with certificates.
        config: The federation's settings.
        fresh: Start over instead of resuming.
        show: Shows one line of progress.

    Raises:
        InputError: A mistake in config or data, or NVFlare is not installed.
        RunError: The run could not go on.
    """
    require_nvflare()
    from fedcmt.engines.nvflare_local import run_in_processes
    from fedcmt.engines.nvflare_simulator import run_in_simulator

    workspace = _check_before(config, fresh=fresh)
    folder = workspace.path.resolve() / "nvflare"
    shutil.rmtree(folder, ignore_errors=True)
    with _followed(workspace.log, show) as look:
        if engine == "nvflare":
            log = run_in_simulator(config, folder, look)
        else:
            log = run_in_processes(config, folder, look, show)
    return _result_of(workspace, config, log)


def require_nvflare() -> None:
    """Look whether NVFlare is installed.

    Raises:
        InputError: It is not.
    """
    if importlib.util.find_spec("nvflare") is None:
        raise InputError(
            "NVFlare is not installed", field="--engine", fix="pip install 'fedcmt[nvflare]', or use --engine inprocess"
        )


def check_strategy(config: FederationConfig) -> None:
    """Look whether a strategy fits the clients and may run where they do not share a process.

    Raises:
        InputError: It does not.
    """
    strategy = strategies.create(config.strategy)
    strategy.check([client.name for client in config.clients])
    if strategy.pooled:
        raise InputError(
            f"strategy '{strategy.name}' pools all clients' data, which never leave them here",
            field="strategy",
            fix="run it with --engine inprocess, or choose a federated strategy",
        )


def _check_before(config: FederationConfig, *, fresh: bool) -> Workspace:
    """Everything that can be wrong with config and data where server and clients share a machine.

    Raises:
        InputError: A mistake; nothing was written then.
    """
    check_strategy(config)
    workspace = Workspace(config.workspace_folder())
    load_datasets(config)
    if not fresh:
        committed = next(iter(workspace.saved_server_rounds()), 0)
        check_same_federation(workspace, config, committed)
    with workspace.locked():
        if fresh:
            workspace.clear()
        write_json(workspace.status, {"state": "starting", "round": 0, "rounds": config.rounds})
    return workspace


@contextmanager
def _followed(log: Path, show: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Show what is appended to a log from now on; the block calls what it gets to look again."""
    position = log.stat().st_size if log.is_file() else 0

    def look() -> None:
        nonlocal position
        if log.is_file():
            with open(log, encoding="utf-8") as file:
                file.seek(position)
                for line in iter(file.readline, ""):
                    show(line.rstrip("\n").partition(" ")[2])
                position = file.tell()

    yield look
    look()


def wait_while(running: Callable[[], bool], look: Callable[[], None]) -> None:
    """Wait for something that runs elsewhere, showing its progress."""
    while running():
        look()
        time.sleep(_LOOK_AGAIN)


def _result_of(workspace: Workspace, config: FederationConfig, log: Path) -> FederationResult:
    """What a run left behind.

    Raises:
        InputError: It ended over a mistake in data or settings.
        RunError: It is not finished; the reason is given.
    """
    status = read_json(workspace.status)
    state, reason = status["state"], status.get("reason", f"see {log}")
    if state == "failed":
        raise InputError(reason)
    if state != "finished":
        word = "ended" if state in ("running", "starting") else state
        raise RunError(f"{word} after round {status['round']} of {config.rounds}: {reason}")
    return FederationResult(workspace.path, config.rounds, read_json(workspace.results))
