"""Processes of a provisioned mTLS federation are killed, every kind of them, and the run ends as it should.

Takes half an hour: python -m pytest -m long tests/test_engines_faults.py
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml
from phantoms import federation

from fedcmt.cli import main
from fedcmt.engines.nvflare_local import LocalProcesses, free_port
from fedcmt.engines.nvflare_provision import Kits, existing_kits

pytestmark = pytest.mark.long

NAMES = ["ct_plain", "ct_regions", "mr_two"]
ROUNDS = 14
# Words in the command of a process: an NVFlare parent, its job, and the trainer that the job starts.
KINDS_AT_CLIENTS = ("client_train", "worker_process", "site_process")
KINDS_AT_SERVER = ("server_train", "runner_process")


class Federation:
    """Kits, their processes, and a supervisor, all started by the commands that the documents name."""

    def __init__(self, folder: Path, settings: dict) -> None:
        self.folder, self.config = folder, folder / "config.yaml"
        self.workspace = folder / "w"
        folder.mkdir(exist_ok=True)
        self.config.write_text(yaml.safe_dump({**settings, "workspace": str(self.workspace)}))
        self.provision("--port", str(free_port()))
        self.kits: Kits = existing_kits(folder / "federation")
        self.processes = LocalProcesses(self.kits, restarting=True)
        self._supervisor: subprocess.Popen[bytes] | None = None

    def provision(self, *more: str) -> None:
        target = ["-o", str(self.folder / "federation"), "--one-machine"]
        assert main(["nvflare", "provision", str(self.config), *target, *more]) == 0

    def supervise(self) -> None:
        command = [sys.executable, "-m", "fedcmt.cli", "nvflare", "supervise", str(self.config)]
        with open(self.folder / "supervisor.log", "ab") as log:
            self._supervisor = subprocess.Popen(
                [*command, "--kits", str(self.folder / "federation")], stdout=log, stderr=log
            )

    def lines(self) -> list[dict]:
        path = self.workspace / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        return [line for line in map(json.loads, text.splitlines()) if line["kind"] == "server"]

    def wait(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, self.said()
            assert self._supervisor is not None
            assert self._supervisor.poll() in (None, 0), self.said()
            time.sleep(0.3)

    def wait_for_rounds(self, count: int) -> None:
        """Wait until so many more rounds are finished."""
        wanted = len(self.lines()) + count
        self.wait(lambda: len(self.lines()) >= wanted)

    def said(self) -> str:
        log = self.workspace / "server" / "log.txt"
        return (self.folder / "supervisor.log").read_text()[-3000:] + (log.read_text()[-3000:] if log.exists() else "")

    def find(self, what: str, kit: str) -> list[psutil.Process]:
        """Processes whose command holds some words and that belong to a kit."""
        found = []
        for process in psutil.process_iter(["cmdline", "ppid"]):
            line = " ".join(process.info["cmdline"] or [])
            chain = line
            if "site_process" in line:  # says nothing of its kit, its parent does
                try:
                    chain += " ".join(psutil.Process(process.info["ppid"]).cmdline())
                except psutil.Error:
                    continue
            if what in line and f"/kits/{kit}" in chain and str(self.folder) in chain:
                found.append(process)
        return found

    def kill(self, what: str, kit: str) -> None:
        found = self.find(what, kit)
        assert found, (what, kit)
        for process in found:
            process.kill()

    def kill_one(self, what: str, rng: random.Random) -> int:
        """Kill a process of a kind, at one of the places that have it; returns how many there were to kill, 0 or 1."""
        kit = self.kits.host if what in KINDS_AT_SERVER else rng.choice(NAMES)
        found = self.find(what, kit)[:1]
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return len(found)

    def kill_supervisor(self) -> int:
        """Kill the supervisor and start another; returns 1."""
        assert self._supervisor is not None
        self._supervisor.kill()
        self._supervisor.wait()
        self.supervise()
        return 1

    def end(self) -> None:
        if self._supervisor is not None and self._supervisor.poll() is None:
            self._supervisor.kill()
            self._supervisor.wait()
        self.processes.__exit__()


@contextmanager
def running(folder: Path, settings: dict, names: list[str] = NAMES) -> Iterator[Federation]:
    made = Federation(folder, settings)
    try:
        made.processes.start([made.kits.host, *names])
        made.supervise()
        yield made
    finally:
        made.end()


def settings_of(raw: Path, preprocessed: Path, **changes: object) -> dict:
    settings = federation(raw, preprocessed, Path("unused"), rounds=ROUNDS)
    settings["clients"] = settings["clients"][:3]
    settings["training"] = {**settings["training"], "local_steps": 20}
    settings["nvflare"] = {"min_clients": 2, "round_timeout": 240, "start_timeout": 60}
    return {**settings, **changes}


def test_every_kind_of_process_may_be_killed(raw_datasets: Path, preprocessed: Path, tmp_path: Path) -> None:
    rounds = 60  # of a second each; a host needs some twenty to be back
    with running(tmp_path, settings_of(raw_datasets, preprocessed, rounds=rounds)) as run:
        run.wait_for_rounds(1)
        run.kill("site_process", "mr_two")  # the trainer of one client
        run.wait_for_rounds(2)
        run.processes.kill("ct_regions")  # the NVFlare parent of one client, and with it what it started in its session
        for process in run.find("worker_process", "ct_regions") + run.find("site_process", "ct_regions"):
            process.kill()  # its whole host
        run.wait(lambda: len(run.lines()) >= 4)
        run.processes.start(["ct_regions"])
        run.wait(lambda: any("ct_regions connected" in text for text in run.said().splitlines()), 300)
        run.wait_for_rounds(2)
        run.kill("runner_process", run.kits.host)  # the server's job
        run.wait(lambda: (run.workspace / "results.json").is_file(), 400)
        run.wait(lambda: run._supervisor.poll() == 0, 60)
    lines = run.lines()
    assert [line["round"] for line in lines] == list(range(1, rounds + 1))
    assert all(len(line["clients"]) >= 2 for line in lines)
    for line in lines:
        assert set(line["clients"]) | set(line["refused"]) | set(line["absent"]) == set(NAMES)
    assert lines[-1]["clients"] == NAMES
    results = json.loads((run.workspace / "results.json").read_text())
    assert [entry["client"] for entry in results["clients"]] == NAMES
    assert "killed by SIGKILL" in run.said() or any("SIGKILL" in str(line["absent"]) for line in lines)


def test_a_killed_server_costs_the_round_under_way_only(
    raw_datasets: Path, preprocessed: Path, finished_in_process: Path, tmp_path: Path
) -> None:
    """Server parent and job are killed together; the result is that of an undisturbed run, bit for bit."""
    with running(tmp_path, settings_of(raw_datasets, preprocessed, rounds=5)) as run:
        run.wait_for_rounds(2)
        for process in run.find("server_train", run.kits.host) + run.find("runner_process", run.kits.host):
            process.kill()  # the start script starts the server anew
        run.wait(lambda: (run.workspace / "results.json").is_file(), 500)
        run.wait(lambda: run._supervisor.poll() == 0, 60)
    lines = run.lines()
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line["clients"] == NAMES for line in lines)
    state = Path("server") / "round-0005.safetensors"
    assert (run.workspace / state).read_bytes() == (finished_in_process / state).read_bytes()


def test_twenty_minutes_of_random_kills(
    raw_datasets: Path, preprocessed: Path, finished_in_process: Path, tmp_path: Path
) -> None:
    """Any process, the server and the supervisor too, at any time; in the end every round is accounted for."""
    rng = random.Random(0)
    killed: Counter[str] = Counter()
    with running(tmp_path, settings_of(raw_datasets, preprocessed, rounds=100_000)) as run:
        until = time.monotonic() + 20 * 60
        while time.monotonic() < until:
            time.sleep(rng.uniform(10, 60))
            what = rng.choice([*KINDS_AT_CLIENTS, *KINDS_AT_SERVER, "supervisor"])
            killed[what] += run.kill_supervisor() if what == "supervisor" else run.kill_one(what, rng)
        content = yaml.safe_load(run.config.read_text())
        content["rounds"] = run.lines()[-1]["round"] + 6
        run.config.write_text(yaml.safe_dump(content))
        run.wait(lambda: (run.workspace / "results.json").is_file(), 600)
        run.wait(lambda: run._supervisor.poll() == 0, 60)
    lines = run.lines()
    print(f"{len(lines)} rounds, killed: {dict(killed)}")
    assert [line["round"] for line in lines] == list(range(1, content["rounds"] + 1))
    for line in lines:
        assert set(line["clients"]) | set(line["refused"]) | set(line["absent"]) == set(NAMES)
    assert sum(killed.values()) >= 15
    results, expected = (
        json.loads((folder / "results.json").read_text()) for folder in (run.workspace, finished_in_process)
    )
    assert shape_of(results) == shape_of(expected)


def shape_of(value: object) -> object:
    """Keys and types of JSON, numbers and lists of any length alike."""
    if isinstance(value, dict):
        return {key: shape_of(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shape_of(entry) for entry in value[:1]]
    return "number" if isinstance(value, int | float) else type(value).__name__


@pytest.fixture
def finished_in_process(raw_datasets: Path, preprocessed: Path, tmp_path: Path) -> Path:
    """Workspace of the same federation, undisturbed and in process."""
    from fedcmt import run_federation

    workspace = tmp_path / "undisturbed"
    run_federation(settings_of(raw_datasets, preprocessed, rounds=5) | {"workspace": str(workspace)})
    return workspace


def test_a_wrong_certificate_gets_nothing(raw_datasets: Path, preprocessed: Path, tmp_path: Path) -> None:
    with running(tmp_path, settings_of(raw_datasets, preprocessed, rounds=3), NAMES[:2]) as run:
        other = Federation(tmp_path / "other", settings_of(raw_datasets, preprocessed))
        kit = run.kits.client("mr_two") / "startup"
        for file in ("client.crt", "client.key"):
            (kit / file).write_bytes((other.kits.client("mr_two") / "startup" / file).read_bytes())
        run.processes.start(["mr_two"])
        run.wait(lambda: (run.workspace / "results.json").is_file(), 300)
    assert all(line["absent"] == {"mr_two": "not connected"} for line in run.lines())
    console = (run.kits.client("mr_two") / "console.log").read_text()
    assert "Successfully registered" not in console
    assert "CERTIFICATE_VERIFY_FAILED" in console or "ertificate" in console or "SSL" in console


def test_a_client_joins_a_running_federation_and_another_leaves(
    raw_datasets: Path, preprocessed: Path, tmp_path: Path
) -> None:
    """Rounds go by while the config is written; the newcomer joins in the named one or, if it is over, in the next."""
    settings = settings_of(raw_datasets, preprocessed, rounds=16)
    later = settings["clients"][2]
    with running(tmp_path, {**settings, "clients": settings["clients"][:2]}, NAMES[:2]) as run:
        run.wait_for_rounds(2)
        content = yaml.safe_load(run.config.read_text())
        content["clients"][1]["leaves_after_round"] = 13
        content["clients"].append({**later, "joins_at_round": 4, "warmup_rounds": 1})
        run.config.write_text(yaml.safe_dump(content))
        run.provision("--port", _port(run.kits))
        run.processes.start(["mr_two"])
        run.wait(lambda: (run.workspace / "results.json").is_file(), 400)
    lines = {line["round"]: line for line in run.lines()}
    assert sorted(lines) == list(range(1, 17))
    joined = min(index for index, line in lines.items() if "mr_two" in line["members"])
    assert 4 <= joined <= 11
    assert (lines[joined]["warming_up"], lines[joined + 1]["clients"]) == (["mr_two"], NAMES)
    assert lines[14]["clients"] == ["ct_plain", "mr_two"]
    clients = [json.loads(line) for line in (run.workspace / "metrics.jsonl").read_text().splitlines()]
    for name, last in (("ct_plain", 16), ("ct_regions", 13)):
        scores = {line["round"]: line["aggregated"]["score"] for line in clients if line.get("client") == name}
        # The newcomer's updates count from the round after its first.
        assert min(scores[later] for later in range(joined + 1, last + 1)) > scores[joined] - 0.03, name


def _port(kits: Kits) -> str:
    project = yaml.safe_load((kits.folder.parent / "project.yml").read_text())
    return str(project["participants"][0]["fed_learn_port"])
