"""Jobs and start-up kits: what is in them, and what is not."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from phantoms import federation

pytest.importorskip("nvflare")

from fedcmt.cli import main
from fedcmt.config import load_config
from fedcmt.engines.nvflare_job import CLASSES
from fedcmt.engines.nvflare_settings import at_site, read_site_settings
from fedcmt.errors import InputError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    settings = federation(tmp_path / "raw", tmp_path / "pre", tmp_path / "w", initial_weights="start.safetensors")
    settings["clients"] = settings["clients"][:2]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def provision(config: Path, *more: str) -> int:
    return main(["nvflare", "provision", str(config), "-o", str(config.parent / "fed"), *more])


def test_a_job_brings_settings_but_neither_code_nor_folders(config: Path, tmp_path: Path) -> None:
    assert main(["nvflare", "export", str(config), "-o", str(tmp_path / "job")]) == 0
    files = sorted(str(path.relative_to(tmp_path / "job")) for path in (tmp_path / "job").rglob("*") if path.is_file())
    assert files == [
        "app/config/config_fed_client.json",
        "app/config/config_fed_server.json",
        "app/config/fedcmt.yaml",
        "meta.json",
    ]
    assert str(tmp_path) not in "".join((tmp_path / "job" / file).read_text() for file in files)
    assert load_config(tmp_path / "job" / "app" / "config" / "fedcmt.yaml").seed == 3
    server = json.loads((tmp_path / "job" / "app" / "config" / "config_fed_server.json").read_text())
    assert server["server"]["task_request_interval"] < 1  # NVFlare reads it nowhere else; without it clients wait 2 s
    assert main(["nvflare", "export", str(config), "-o", str(tmp_path / "job")]) == 2


def test_kits_allow_two_classes_and_listen_on_the_loopback(config: Path) -> None:
    assert provision(config, "--port", "28231") == 0
    kits = config.parent / "fed" / "kits"
    assert sorted(path.name for path in kits.iterdir()) == ["admin@fedcmt.org", "ct_plain", "ct_regions", "localhost"]
    for name in ("ct_plain", "localhost"):
        resources = json.loads((kits / name / "local" / "resources.json").read_text())
        assert resources["class_allow_list"] == list(CLASSES)
        assert resources["class_list_enforcement_mode"] == "enforce"
        assert "/tmp/nvflare" not in json.dumps(resources)
    server = json.loads((kits / "localhost" / "startup" / "fed_server.json").read_text())["servers"][0]
    assert server["service"]["target"] == "localhost:28231"
    assert server["connection_security"] == "mtls"
    for key in kits.rglob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE((config.parent / "fed" / "authority").stat().st_mode) == 0o700


def test_a_new_client_gets_a_kit_of_the_same_authority_and_the_others_keep_theirs(config: Path) -> None:
    provision(config)
    kits = config.parent / "fed" / "kits"
    (kits / "ct_plain" / "local" / "fedcmt.yaml").write_text("device: cpu\n")
    key = (kits / "ct_plain" / "startup" / "client.key").read_bytes()
    content = yaml.safe_load(config.read_text())
    content["clients"].append({"name": "mr_two", "dataset": 803, "modality": "MR"})
    config.write_text(yaml.safe_dump(content))
    assert provision(config) == 0
    assert (kits / "ct_plain" / "local" / "fedcmt.yaml").read_text() == "device: cpu\n"
    assert (kits / "ct_plain" / "startup" / "client.key").read_bytes() == key
    roots = {(kits / name / "startup" / "rootCA.pem").read_bytes() for name in ("ct_plain", "mr_two", "localhost")}
    assert len(roots) == 1


def test_kits_of_one_machine_have_the_folders_device_and_threads_of_the_config(config: Path) -> None:
    assert provision(config, "--one-machine") == 0
    settings = load_config(config)
    for name in ("ct_plain", "localhost"):
        own = read_site_settings(config.parent / "fed" / "kits" / name / "local" / "fedcmt.yaml")
        assert (own.device, own.threads) == (settings.device, settings.threads) == ("auto", 1)
        assert (own.raw, own.share_cases) == (settings.raw, "files")


@pytest.mark.parametrize(
    ("more", "field"),
    [(["--server", "a b"], "--server"), (["--server", "ct_plain"], "--server"), (["--port", "9"], "--port")],
)
def test_what_does_not_fit_is_one_line(
    config: Path, more: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    provision(config)
    assert provision(config, *more) == 2
    assert f"field '{field}'" in capsys.readouterr().err


def test_supervise_without_kits_is_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nvflare", "supervise", str(config), "--kits", str(config.parent / "none")]) == 2
    assert "field '--kits'" in capsys.readouterr().err


def settings(tmp_path: Path, **content: Any) -> Any:
    path = tmp_path / "fedcmt.yaml"
    path.write_text(yaml.safe_dump(content))
    return read_site_settings(path)


def test_a_site_has_its_own_folders_and_filters(config: Path, tmp_path: Path) -> None:
    own = settings(tmp_path, raw="/data/raw", device="cpu", initial_weights="w.safetensors", filters=[{"name": "svt"}])
    federations = load_config(config, ["nvflare.filters=[{name: percentile}]"])
    here = at_site(federations, own, Path("/kit"), "ct_plain")
    assert (here.raw, here.workspace_folder()) == (Path("/data/raw"), Path("/kit/workspace/phantoms"))
    assert [entry.name for entry in here.nvflare.filters] == ["percentile", "svt"]
    assert here.clients[0].initial_weights == Path("/kit/w.safetensors")
    assert at_site(federations, own, Path("/kit"), None).initial_weights == Path("/kit/w.safetensors")


@pytest.mark.parametrize("content", [{"rw": "/data"}, {"share_cases": "all"}, {"filters": [{"name": "none"}]}])
def test_a_mistake_in_a_sites_settings_names_the_file(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"fedcmt\.yaml"):
        settings(tmp_path, **content)
