"""Start-up kits for a federation's server, clients and administrator: certificates, addresses, permissions."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedcmt.config import ClientConfig, FederationConfig
from fedcmt.engines.nvflare_job import CLASSES
from fedcmt.engines.nvflare_settings import SITE_FILE, SiteSettings
from fedcmt.errors import InputError, RunError
from fedcmt.files import write_json, write_text

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")
ADMIN = "admin@fedcmt.org"  # NVFlare wants an address; no mail is ever sent
_BUILDERS = [
    {"path": "nvflare.lighter.impl.workspace.WorkspaceBuilder", "args": {"template_file": ["master_template.yml"]}},
    {"path": "nvflare.lighter.impl.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
    {"path": "nvflare.lighter.impl.cert.CertBuilder"},
    {"path": "nvflare.lighter.impl.signature.SignatureBuilder"},
]


@dataclass(frozen=True)
class Kits:
    """The start-up kits of a federation."""

    folder: Path
    host: str

    @property
    def server(self) -> Path:
        """The server's."""
        return self.folder / self.host

    @property
    def admin(self) -> Path:
        """Of the administrator, who submits jobs."""
        return self.folder / ADMIN

    def client(self, name: str) -> Path:
        """A client's."""
        return self.folder / name


def provision(
    config: FederationConfig, folder: Path, *, host: str = "localhost", port: int = 8002, one_machine: bool = False
) -> tuple[Kits, list[str]]:
    """Write project file and start-up kits.

    Run again with a config that names further clients it makes their kits and leaves those that exist as they are.

    Args:
        config: The federation's settings.
        folder: Where to: ``project.yml``, ``kits/<name>``, and ``authority/``, which holds the private key that signs
            all certificates and never leaves the machine.
        host: Name under which clients reach the server; it listens on this name's address alone where that is the
            loopback's.
        port: Of the server.
        one_machine: Whether all kits are for this machine and use the folders of the config.

    Returns:
        The kits, and the names of those that are new.

    Raises:
        InputError: The host's name is none, or the folder belongs to another server.
        RunError: NVFlare could not do it.
    """
    if not _HOST.fullmatch(host):
        raise InputError(f"'{host[:80]}' is no name of a host", field="--server", fix="use a name that clients resolve")
    if host in [client.name for client in config.clients]:
        raise InputError("a client has the name of the server's host", client=host, field="--server")
    project = _project(config, host, port)
    _check_same_server(folder / "project.yml", project)
    write_text(folder / "project.yml", yaml.safe_dump(project, sort_keys=False))
    made = _make(project, folder / "authority")
    kits, new = Kits(folder / "kits", host), []
    for source in sorted(made.iterdir()):
        target = kits.folder / source.name
        if not (source / "startup").is_dir() or target.exists():
            continue
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part)
        if source.name != ADMIN:
            _settle(part, config, source.name, one_machine)
        part.rename(target)
        new.append(source.name)
    return kits, new


def existing_kits(folder: Path) -> Kits:
    """The kits that :func:`provision` wrote.

    Raises:
        InputError: There are none.
    """
    path = folder / "project.yml"
    if not path.is_file():
        raise InputError(f"{folder} holds no start-up kits", field="--kits", fix="name what 'provision' wrote")
    project = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Kits(folder / "kits", str(project["participants"][0]["name"]))


def _project(config: FederationConfig, host: str, port: int) -> dict[str, Any]:
    participants: list[dict[str, Any]] = [
        {"name": host, "type": "server", "org": "hub", "fed_learn_port": port, "admin_port": port}
    ]
    participants += [{"name": client.name, "type": "client", "org": _org(client)} for client in config.clients]
    participants.append({"name": ADMIN, "type": "admin", "org": "hub", "role": "project_admin"})
    return {
        "api_version": 3,
        "name": config.name,
        "description": f"FedCMT federation {config.name}",
        "participants": participants,
        "builders": _BUILDERS,
    }


def _org(client: ClientConfig) -> str:
    return client.name.replace("-", "_")


def _check_same_server(path: Path, project: dict[str, Any]) -> None:
    if not path.is_file():
        return
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key in ("name", "fed_learn_port"):
        old, new = before["participants"][0][key], project["participants"][0][key]
        if old != new:
            raise InputError(
                f"{path.parent} was provisioned for {key} {old}, found {new}",
                field="--server" if key == "name" else "--port",
                fix="give the same, or use another folder",
            )


def _make(project: dict[str, Any], folder: Path) -> Path:
    """Let NVFlare make certificates and kits, with the same authority as before."""
    from nvflare.lighter.constants import CtxKey, WorkDir
    from nvflare.lighter.provision import prepare_builders, prepare_project
    from nvflare.lighter.provisioner import Provisioner

    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        context = Provisioner(str(folder), prepare_builders(project)).provision(prepare_project(project))
    if context.get(CtxKey.BUILD_ERROR):
        raise RunError(f"NVFlare could not provision: {' '.join(said.getvalue().split())[-500:]}")
    return Path(context[WorkDir.CURRENT_PROD_DIR])


def _settle(kit: Path, config: FederationConfig, name: str, one_machine: bool) -> None:
    """What a site has of its own: which classes jobs may use, and where its data are."""
    local = kit / "local"
    resources = json.loads((local / "resources.json.default").read_text())
    resources["class_allow_list"] = list(CLASSES)
    if "allow_log_streaming" in resources:
        resources["allow_log_streaming"] = False  # logs may name cases
    _keep_jobs_in(kit.with_name(name).resolve(), resources)
    write_json(local / "resources.json", resources)
    own = _of_one_machine(config, name) if one_machine else SiteSettings()
    keys = own.model_dump(mode="json", exclude_defaults=True)
    write_text(local / SITE_FILE, _SITE_HEADER + (yaml.safe_dump(keys, sort_keys=False) if keys else ""))


def _of_one_machine(config: FederationConfig, name: str) -> SiteSettings:
    weights = next((client for client in config.clients if client.name == name), config).initial_weights
    return SiteSettings(
        raw=config.folder("raw").resolve(),
        preprocessed=config.folder("preprocessed").resolve(),
        workspace=config.workspace_folder().resolve(),
        initial_weights=None if weights is None else weights.resolve(),
        device=config.device,
        threads=config.threads,
        share_cases="files",
    )


def _keep_jobs_in(kit: Path, resources: dict[str, Any]) -> None:
    """Let the server keep jobs and snapshots in its kit, not in a folder that all users of a machine share."""
    for component in resources.get("components", []):
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(kit / "jobs")
    if "snapshot_persistor" in resources:
        resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(kit / "snapshots")
    for server in resources.get("servers", []):
        server["heart_beat_timeout"] = 60  # seconds until a silent site counts as gone


_SITE_HEADER = """\
# This site's own folders and limits for FedCMT; docs/deployment.md has every key. Paths start at the kit's folder.
# raw: /data/nnUNet_raw
# preprocessed: /data/nnUNet_preprocessed
# device: cuda
"""
