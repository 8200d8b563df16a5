"""A federation as an NVFlare job: settings, no code. The classes it names are installed with FedCMT at every site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import yaml

from fedcmt.config import FederationConfig
from fedcmt.engines.nvflare_settings import JOB_FILE, MACHINE_SETTINGS
from fedcmt.engines.nvflare_wire import TASK
from fedcmt.files import write_json, write_text

CLASSES = ("fedcmt.engines.nvflare_controller.FedCMTController", "fedcmt.engines.nvflare_executor.FedCMTExecutor")

# NVFlare's own pace is for jobs of hours; these are looked at by every process of the job.
_ASK_AGAIN = 0.2  # seconds after which a client without work asks for some, and after which one that has answered does
_PACE = {
    "max_runner_sync_timeout": 600.0,  # a busy server may take minutes to start its side of the job
    "task_check_interval": 2.0,
    "dead_client_grace_period": 10.0,
    "dead_client_check_lead_time": 10.0,
}
_NO_FILTERS: dict[str, Any] = {"task_data_filters": [], "task_result_filters": [], "components": []}


def write_job(config: FederationConfig, folder: Path, *, one_machine: bool) -> Path:
    """Write the job's folder.

    Args:
        config: The federation's settings.
        folder: Where to; replaced file by file.
        one_machine: Whether server and clients see the same folders, which the job then names.

    Returns:
        The folder.
    """
    app = folder / "app" / "config"
    write_json(
        folder / "meta.json",
        {
            "name": config.name,
            "resource_spec": {},
            "min_clients": 1,
            "deploy_map": {"app": ["@ALL"]},
        },
    )
    workflows = [{"id": "fedcmt", "path": CLASSES[0], "args": {}}]
    server = {"server": {"task_request_interval": _ASK_AGAIN}, "workflows": workflows}
    executors = [{"tasks": [TASK], "executor": {"path": CLASSES[1], "args": {}}}]
    client = {"default_task_fetch_interval": _ASK_AGAIN, "executors": executors}
    for side, own in (("server", server), ("client", client)):
        write_json(app / f"config_fed_{side}.json", {"format_version": 2, **_PACE, **_NO_FILTERS, **own})
    write_text(app / JOB_FILE, yaml.safe_dump(_settings(config, one_machine), sort_keys=False))
    return folder


def _settings(config: FederationConfig, one_machine: bool) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(config.model_dump_json())
    if not one_machine:
        for key in MACHINE_SETTINGS:
            settings.pop(key)
        for client in settings["clients"]:
            client.pop("initial_weights")
        return settings
    settings["workspace"] = str(config.workspace_folder().resolve())
    folders: tuple[Literal["raw", "preprocessed"], ...] = ("raw", "preprocessed")
    for which in folders:
        settings[which] = str(config.folder(which).resolve())
    for entry in [settings, *settings["clients"]]:
        if entry["initial_weights"] is not None:
            entry["initial_weights"] = str(Path(entry["initial_weights"]).resolve())
    return settings
