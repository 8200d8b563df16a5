"""Where a job's settings come from: the job brings the federation's, each site has its own folders and device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from pydantic import Field

from fedcmt.config import FederationConfig, FilterConfig, load_config
from fedcmt.engines.entries import Shares
from fedcmt.errors import InputError
from fedcmt.settings import Settings, Width, validated

JOB_FILE = "fedcmt.yaml"  # beside the job's own configuration
SITE_FILE = "fedcmt.yaml"  # in the folder `local` of a start-up kit

# Of one machine: a job for other machines does not bring them.
MACHINE_SETTINGS = ("raw", "preprocessed", "workspace", "initial_weights", "device", "threads")


class SiteSettings(Settings):
    """``local/fedcmt.yaml`` of a start-up kit. Relative paths start at the kit's folder."""

    raw: Path | None = Field(None, description="nnU-Net's raw datasets; default: nnUNet_raw")
    preprocessed: Path | None = Field(None, description="default: nnUNet_preprocessed")
    workspace: Path | None = Field(None, description="default: workspace/<name> in the kit's folder")
    initial_weights: Path | None = Field(
        None, description="checkpoint that decoder or, on the server, encoder start from"
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] | None = None
    threads: Width | None = None
    share_cases: Shares = Field(
        "no", description="of single cases: no; scores, with their names; or files, paths too, where all is one machine"
    )
    filters: list[FilterConfig] = Field([], description="privacy filters of this site, after those of the config")


def settings_of(fl_ctx: FLContext, site: str | None) -> tuple[FederationConfig, Shares]:
    """The settings of the job that runs, as they are at this site.

    Args:
        fl_ctx: NVFlare's context.
        site: The client's name; None at the server.

    Returns:
        Settings, and what of single cases may be known beyond the site.

    Raises:
        InputError: A file is missing or wrong.
    """
    workspace: Any = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT) or fl_ctx.get_engine().get_workspace()
    job = Path(workspace.get_app_config_dir(fl_ctx.get_job_id())) / JOB_FILE
    config = load_config(job)
    local = Path(workspace.get_site_config_dir()) / SITE_FILE
    if not local.is_file():
        return config, "no" if config.raw is None else "files"  # a job of one machine brings its folders
    own = read_site_settings(local)
    return at_site(config, own, Path(workspace.get_root_dir()), site), own.share_cases


def read_site_settings(path: Path) -> SiteSettings:
    """Read ``local/fedcmt.yaml``.

    Raises:
        InputError: It is no YAML or has a wrong setting.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no valid YAML: {' '.join(str(error).split())}", field=SITE_FILE) from None
    return validated(SiteSettings, content, SITE_FILE)


def at_site(config: FederationConfig, own: SiteSettings, root: Path, site: str | None) -> FederationConfig:
    """A federation's settings with those of one site.

    Args:
        config: The federation's.
        own: The site's.
        root: Where its relative paths start.
        site: The client's name; None at the server.
    """
    changes: dict[str, Any] = {"workspace": root / (own.workspace or Path("workspace") / config.name)}
    for key in ("raw", "preprocessed", "device", "threads"):
        value = getattr(own, key)
        if value is not None:
            changes[key] = root / value if isinstance(value, Path) else value
    weights = None if own.initial_weights is None else root / own.initial_weights
    if site is None:
        changes["initial_weights"] = weights
    else:
        changes["clients"] = [
            client.model_copy(update={"initial_weights": weights}) if client.name == site else client
            for client in config.clients
        ]
        filters = [*config.nvflare.filters, *own.filters]
        changes["nvflare"] = config.nvflare.model_copy(update={"filters": filters})
    return config.model_copy(update=changes)
