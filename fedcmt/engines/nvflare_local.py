"""A provisioned federation on one machine: NVFlare's server and a client for each site, in processes of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from fedcmt.checkpoint import Workspace
from fedcmt.config import FederationConfig
from fedcmt.engines.launch import wait_while
from fedcmt.engines.nvflare_provision import Kits, provision
from fedcmt.engines.nvflare_supervise import Supervisor


class LocalProcesses:
    """Start-up kits that run on this machine; a context manager that ends them.

    Args:
        kits: The kits.
        restarting: Whether NVFlare starts a process anew that died, as it does in production.
    """

    def __init__(self, kits: Kits, *, restarting: bool = False) -> None:
        self._kits, self._restarting = kits, restarting
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, names: Iterable[str]) -> None:
        """Start kits by name."""
        for name in names:
            kit = self._kits.folder / name
            for leftover in kit.glob("*.fl"):  # of processes that were killed
                leftover.unlink()
            command = [str(kit / "startup" / "sub_start.sh"), *([] if self._restarting else ["--once"])]
            with open(kit / "console.log", "ab") as log:
                self._running[name] = subprocess.Popen(
                    command, cwd=kit, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )

    def kill(self, name: str) -> None:
        """End a kit's processes at once and without warning, as when its machine loses power."""
        process = self._running.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def __enter__(self) -> LocalProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for name, process in list(self._running.items()):
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            self.kill(name)


def run_in_processes(
    config: FederationConfig, folder: Path, look: Callable[[], None], show: Callable[[str], None]
) -> Path:
    """Run a federation in separate processes of this machine that speak mTLS over the loopback, until it ends.

    Args:
        config: The federation's settings, checked.
        folder: An empty place for the start-up kits.
        look: Called again and again meanwhile.
        show: Shows one line of what the supervisor does.

    Returns:
        The server's log.

    Raises:
        InputError: A mistake in config or data.
        RunError: The run could not go on.
    """
    kits, _ = provision(config, folder, port=free_port(), one_machine=True)
    names = [client.name for client in config.clients]
    stop = threading.Event()
    with LocalProcesses(kits) as processes:
        processes.start([kits.host, *names])
        supervisor = Supervisor(lambda: config, kits, Workspace(config.workspace_folder()), show, stop.is_set)
        failed: list[BaseException] = []

        def supervise() -> None:
            try:
                supervisor.run()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=supervise, daemon=True)
        thread.start()
        try:
            wait_while(thread.is_alive, look)
        finally:
            stop.set()
        if failed:
            raise failed[0]
    return kits.server / "console.log"


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def server_workspace(kits: Kits, config: FederationConfig) -> Path:
    """The federation's workspace on the server's machine, as its kit says."""
    from fedcmt.engines.nvflare_settings import SITE_FILE, at_site, read_site_settings

    own = read_site_settings(kits.server / "local" / SITE_FILE)
    return at_site(config, own, kits.server, None).workspace_folder()
