"""Keeps a federation running in a provisioned NVFlare: submits its job, and again after whatever ended it.

A running job cannot take in a site that has been away or is new, and does not outlive its server. So the job is ended
in good order when a site is back or the config has changed, and submitted again; the federation goes on after its last
finished round, because its state stands outside of any job.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcmt.checkpoint import Workspace
from fedcmt.config import FederationConfig
from fedcmt.engines.nvflare_controller import STATUS, STOP
from fedcmt.engines.nvflare_job import write_job
from fedcmt.engines.nvflare_provision import ADMIN, Kits
from fedcmt.errors import InputError
from fedcmt.files import read_json

_LOOK_AGAIN = 5.0  # seconds; each look is a line in the server's audit log
_SETTLED = 5.0  # seconds for which a site must have been back before the others' job is ended for it
_LOST = 15.0  # seconds after which a job without a process is given up
_LONGEST_PAUSE = 60.0  # seconds between attempts that fail one after the other


@dataclass
class _Away:
    """Since when sites that the running job lacks have been connected."""

    since: dict[str, float] = field(default_factory=dict)

    def settled(self, lacking: set[str]) -> bool:
        now = time.monotonic()
        self.since = {name: self.since.get(name, now) for name in lacking}
        return any(now - since >= _SETTLED for since in self.since.values())


class Supervisor:
    """Supervises one federation.

    Args:
        read_config: Gives the federation's settings as they are now.
        kits: The start-up kits; those of the administrator and the server are on this machine.
        workspace: The server's.
        show: Shows one line.
        stopped: Whether somebody wants supervision to end.
    """

    def __init__(
        self,
        read_config: Callable[[], FederationConfig],
        kits: Kits,
        workspace: Workspace,
        show: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._read_config, self._kits, self._workspace = read_config, kits, workspace
        self._show, self._stopped = show, stopped
        self._session: Any = None
        self._said = ""
        self._lost: set[str] = set()  # jobs that went down with their server, though it says that they run

    def run(self) -> bool:
        """Supervise until the federation is finished.

        Returns:
            Whether it is; False where supervision was ended before.

        Raises:
            InputError: A mistake in settings or data that somebody has to put right.
        """
        failures = 0
        try:
            while not self._stopped():
                config = self._read_config()
                if self._finished(config):
                    return True
                try:
                    before = self._round()
                    job = self._running_job(config) or self._submit(config)
                    if job is not None:
                        self._watch(job, config)
                        if (status := self._status())["state"] == "failed":
                            raise InputError(status["reason"])
                        failures = 0 if self._round() > before else failures + 1
                except InputError:
                    raise
                except Exception as error:  # NVFlare raises anything when its server dies in the middle of a command
                    self._say(f"no answer from NVFlare's server ({type(error).__name__}); trying again")
                    self._disconnect()
                    failures += 1
                self._sleep(min(_LOOK_AGAIN * 2 ** min(failures, 6), _LONGEST_PAUSE))
            return False
        finally:
            self._disconnect()

    def _say(self, text: str) -> None:
        if text != self._said:
            self._show(text)
            self._said = text

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stopped():
            time.sleep(0.2)

    def _status(self) -> dict[str, Any]:
        if not self._workspace.status.is_file():
            return {"state": "starting", "round": 0, "rounds": 0}
        status: dict[str, Any] = read_json(self._workspace.status)
        return status

    def _round(self) -> int:
        return int(self._status()["round"])

    def _finished(self, config: FederationConfig) -> bool:
        status = self._status()
        return status["state"] == "finished" and status["rounds"] == config.rounds

    def _connected(self) -> Any:
        if self._session is None:
            from nvflare.fuel.flare_api.flare_api import new_secure_session

            self._session = new_secure_session(ADMIN, str(self._kits.admin), timeout=10.0, auto_login_max_tries=1)
        return self._session

    def _disconnect(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            try:
                session.close()
            except Exception as error:  # the server is gone; nothing is lost with the session
                self._say(f"session with NVFlare's server lost ({type(error).__name__})")

    def _sites(self) -> set[str]:
        return {client.name for client in self._connected().get_connected_client_list()}

    def _running_job(self, config: FederationConfig) -> str | None:
        """A job of this federation that an earlier supervisor left running."""
        for job in self._connected().list_jobs(name_prefix=config.name, reverse=True, limit=5):
            ended = str(job.get("status", "")).startswith("FINISHED") or job["job_id"] in self._lost
            if job.get("job_name", job.get("name")) == config.name and not ended:
                return str(job["job_id"])
        return None

    def _submit(self, config: FederationConfig) -> str | None:
        """Submit the job once the sites of the next round are connected, or as many as its quorum after a while."""
        coming = self._round() + 1
        wanted, quorum = config.members(coming), config.quorum(coming)
        until = time.monotonic() + config.nvflare.start_timeout
        while not self._stopped():
            missing = wanted - self._sites()
            if not missing or (time.monotonic() > until and len(wanted) - len(missing) >= quorum):
                break
            self._say(f"waiting for {', '.join(sorted(missing))} to connect")
            self._sleep(_LOOK_AGAIN)
        if self._stopped():
            return None
        with tempfile.TemporaryDirectory() as folder:
            job = write_job(config, Path(folder) / config.name, one_machine=False)
            submitted = str(self._connected().submit_job(str(job)))
        self._say(f"job {submitted} submitted, to go on after round {self._round()}")
        return submitted

    def _watch(self, job: str, config: FederationConfig) -> None:
        """Wait for the job's end, which is asked for where the federation would gain by it."""
        away, asked, alive = _Away(), False, time.monotonic()
        while not self._stopped():
            state = str(self._connected().get_job_meta(job).get("status"))
            if state.startswith("FINISHED"):
                status = self._status()
                reason = f": {status['reason']}" if "reason" in status else ""
                self._say(
                    f"job {job} ended ({state}), federation {status['state']} after round {status['round']}{reason}"
                )
                return
            if state != "RUNNING" or self._is_run(job):
                alive = time.monotonic()
            elif time.monotonic() - alive > _LOST:
                self._say(f"job {job} is lost, its server was started anew")
                self._lost.add(job)
                return
            if state == "RUNNING" and not asked:
                why = self._why_restart(config, away)
                if why is not None:
                    self._say(f"{why}: the job ends after this round and is submitted again")
                    self._connected().do_app_command(job, STOP, {})
                    asked = True
            self._sleep(_LOOK_AGAIN)

    def _is_run(self, job: str) -> bool:
        """Whether the server has a process for a job that it takes for running; after a crash it has none."""
        from nvflare.fuel.flare_api.api_spec import InternalError, JobNotRunning, NoReply

        try:
            self._connected().do_app_command(job, STATUS, {})
        except JobNotRunning:
            return False
        except (InternalError, NoReply):  # it is there, but too young or too busy to answer
            return True
        return True

    def _why_restart(self, config: FederationConfig, away: _Away) -> str | None:
        status = self._status()
        if status["state"] != "running" or "here" not in status:
            return None
        try:
            changed = self._read_config() != config
        except InputError as error:
            self._say(f"the config was changed and is not used: {error}")
            changed = False
        if changed:
            return "the config has changed"
        known = set(status["here"]) | set(status.get("unavailable", {}))
        lacking = (config.members(int(status["round"]) + 2) & self._sites()) - known
        return f"{', '.join(sorted(lacking))} connected" if away.settled(lacking) else None
