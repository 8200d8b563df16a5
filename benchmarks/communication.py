"""Communication of a round over mTLS on one machine: seconds, processor seconds, bytes, and the server's memory.

    python benchmarks/communication.py --parameters 31000000 --clients 4 --dtype float32 --rounds 4

Server and clients are provisioned NVFlare processes. Each client's trainer is a process that returns random numbers in
place of an update, so that only messages, checks and transport take time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal

from fedcmt.checkpoint import Workspace
from fedcmt.config import load_config
from fedcmt.engines import nvflare_job, nvflare_provision
from fedcmt.engines.messages import WIRE_DTYPES, Fit, Fitted, Message, announce
from fedcmt.engines.nvflare_controller import FedCMTController
from fedcmt.engines.nvflare_executor import FedCMTExecutor
from fedcmt.engines.nvflare_local import LocalProcesses, free_port
from fedcmt.engines.nvflare_settings import settings_of
from fedcmt.engines.nvflare_tensors import register
from fedcmt.engines.site_process import TrainerProcess, receive, send

SETTINGS = "FEDCMT_BENCHMARK"


class BenchmarkController(FedCMTController):
    """Sends parameters to all clients and takes their updates, for some rounds."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Called by NVFlare."""
        self._context, self._abort = fl_ctx, abort_signal
        wanted = json.loads(os.environ[SETTINGS])
        while len(self.connected()) < wanted["clients"]:
            time.sleep(0.2)
        torch.set_num_threads(1)
        base = _peak()
        encoder = torch.randn(wanted["parameters"]).to(WIRE_DTYPES[wanted["dtype"]])
        rows: list[dict[str, Any]] = []
        for index in range(1, wanted["rounds"] + 1):
            started, arrived = time.perf_counter(), {}
            parameters = {"encoder": announce(encoder)}
            body = Fit(
                round=index, after_round=0, joins_at_round=1, trained=[], parameters=parameters, reply_dtype="float32"
            )

            def on_answer(name: str, message: Message, arrived: dict[str, Any] = arrived) -> None:
                message.check()
                arrived[name] = message.tensors["encoder"]

            message = Message(body, {"encoder": encoder}, parameters)
            missing = self.ask(dict.fromkeys(self.connected(), message), timeout=300, on_answer=on_answer)
            rows.append({"seconds": time.perf_counter() - started, "missing": dict(missing), "updates": len(arrived)})
            arrived.clear()  # as the server lets go of them after its step
        usage = resource.getrusage(resource.RUSAGE_SELF)
        rows.append({"base_mib": base, "peak_mib": _peak(), "server_cpu": usage.ru_utime + usage.ru_stime})
        Path(wanted["result"]).write_text(json.dumps(rows))


class BenchmarkExecutor(FedCMTExecutor):
    """Starts a trainer that returns random numbers."""

    def _start(self, fl_ctx: FLContext) -> TrainerProcess:
        name = fl_ctx.get_identity_name()
        config, _ = settings_of(fl_ctx, name)
        folder = Workspace(config.workspace_folder()).client(name).path
        return TrainerProcess(config, name, shares="no", log=folder / "trainer.log", command=(__file__, "--trainer"))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _trainer(source: int, target: int) -> None:
    torch.set_num_threads(1)
    incoming, outgoing = os.fdopen(source, "rb", 0), os.fdopen(target, "wb", 0)
    incoming.read(int.from_bytes(incoming.read(8), "little"))
    update: torch.Tensor | None = None
    while True:
        try:
            message = receive(incoming)
        except EOFError:
            return
        message.check()
        if update is None:
            update = torch.randn(message.tensors["encoder"].numel()).to(message.tensors["encoder"].dtype)
        send(outgoing, Message(Fitted(round=1, num_cases=1, went_on_from=0), {"encoder": update}))


def main(options: argparse.Namespace) -> None:
    """Provision, run, print."""
    register()
    folder = Path(tempfile.mkdtemp())
    names = [f"site_{index}" for index in range(options.clients)]
    config = load_config(
        {
            "name": "benchmark",
            "raw": str(folder),
            "preprocessed": str(folder),
            "workspace": str(folder / "workspace"),
            "clients": [{"name": name, "dataset": 1, "modality": "CT"} for name in names],
        }
    )
    wanted = vars(options) | {"result": str(folder / "result.json")}
    os.environ[SETTINGS] = json.dumps({k: v for k, v in wanted.items() if k != "trainer"})
    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    os.environ["OMP_NUM_THREADS"] = "1"
    classes = ("communication.BenchmarkController", "communication.BenchmarkExecutor")
    nvflare_job.CLASSES = nvflare_provision.CLASSES = classes
    kits, _ = nvflare_provision.provision(config, folder, port=free_port(), one_machine=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with LocalProcesses(kits) as processes:
        processes.start([kits.host, *names])
        _run(config, kits, folder, names)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    *rounds, server = json.loads((folder / "result.json").read_text())
    size = options.parameters * torch.empty(0, dtype=WIRE_DTYPES[options.dtype]).element_size() / 2**20
    print([round(row["seconds"], 2) for row in rounds], [row["missing"] for row in rounds if row["missing"]])
    print(
        f"server {server['base_mib']:.0f} -> {server['peak_mib']:.0f} MiB peak: "
        f"{(server['peak_mib'] - server['base_mib']) / size:.2f} x model; "
        f"all processes {after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.1f} CPU s"
    )


def _run(config: Any, kits: Any, folder: Path, names: list[str]) -> None:
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    session = None
    while session is None or {c.name for c in session.get_connected_client_list()} < set(names):
        try:
            session = session or new_secure_session(nvflare_provision.ADMIN, str(kits.admin), timeout=5.0)
        except Exception:
            time.sleep(1)
        time.sleep(0.5)
    job = session.submit_job(str(nvflare_job.write_job(config, folder / "job", one_machine=False)))
    print(session.monitor_job_and_return_job_meta(job, timeout=500)[1]["status"])
    session.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=31_000_000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--trainer", nargs=2, type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.trainer:
        _trainer(*chosen.trainer)
        sys.exit()
    main(chosen)
