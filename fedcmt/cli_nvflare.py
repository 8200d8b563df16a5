"""``fedcmt nvflare``: from a config to a federation of several institutions."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedcmt.checkpoint import Workspace
from fedcmt.config import FederationConfig, load_config
from fedcmt.errors import InputError


def add_nvflare_commands(commands: Any) -> None:
    """Add ``export``, ``provision`` and ``supervise`` below ``nvflare``."""
    parser = commands.add_parser("nvflare", help="run a federation across institutions, on NVFlare")
    below = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        text = (function.__doc__ or "").strip().rstrip(".")
        added: argparse.ArgumentParser = below.add_parser(
            function.__name__, help=text[:1].lower() + text[1:], description=function.__doc__
        )
        added.set_defaults(function=function)
        added.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the federation")
        added.add_argument(
            "--set", action="append", default=[], metavar="KEY.PATH=VALUE", dest="overrides", help="override a setting"
        )
        return added

    exporting = command(export)
    exporting.add_argument("-o", "--output", type=Path, required=True, metavar="JOB", help="folder of the job")
    provisioning = command(provision)
    provisioning.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the kits")
    _add_address(provisioning)
    provisioning.add_argument(
        "--one-machine", action="store_true", help="kits for this machine, with the config's folders"
    )
    supervising = command(supervise)
    supervising.add_argument("--kits", type=Path, required=True, metavar="DIR", help="folder that provision wrote")


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--server", default="localhost", metavar="HOST", help="name of the server's machine (default localhost)"
    )
    parser.add_argument("--port", type=int, default=8002, help="of the server (default 8002)")


def _config(options: argparse.Namespace) -> FederationConfig:
    from fedcmt.engines.launch import check_strategy, require_nvflare

    require_nvflare()
    config = load_config(options.config, options.overrides)
    check_strategy(config)
    return config


def export(options: argparse.Namespace) -> None:
    """Write the job of a federation, for ``nvflare job submit``."""
    config = _config(options)
    from fedcmt.engines.nvflare_job import write_job

    if options.output.exists():
        raise InputError(f"{options.output} exists", field="-o", fix="choose a new folder")
    write_job(config, options.output, one_machine=False)
    print(f"{options.output}: nvflare job submit -j {options.output} --startup-kit KITS/admin@fedcmt.org")


def provision(options: argparse.Namespace) -> None:
    """Write start-up kits with certificates; again, for clients that are new in the config."""
    config = _config(options)
    from fedcmt.engines.nvflare_provision import provision as make_kits

    kits, new = make_kits(
        config, options.output, host=options.server, port=options.port, one_machine=options.one_machine
    )
    print(f"{kits.folder}: " + (f"new {', '.join(new)}" if new else "nothing new"))


def supervise(options: argparse.Namespace) -> None:
    """Submit the federation's job, and again after whatever ended it, until the federation is finished."""
    config = _config(options)
    from fedcmt.engines.nvflare_local import server_workspace
    from fedcmt.engines.nvflare_provision import existing_kits
    from fedcmt.engines.nvflare_supervise import Supervisor

    kits = existing_kits(options.kits)
    workspace = Workspace(server_workspace(kits, config))
    supervisor = Supervisor(
        lambda: load_config(options.config, options.overrides),
        kits,
        workspace,
        lambda line: print(line, flush=True),
    )
    supervisor.run()
    print(f"finished {config.rounds} rounds; open {workspace.path / 'report.html'}")
