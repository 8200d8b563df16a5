"""A site with its real trainer: exact resuming, filters and quantizers on the update, what leaves the site."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from in_memory import InMemory, RealSite, of_kind, run
from phantoms import federation

from fedcmt import federation as engine
from fedcmt import run_federation
from fedcmt.config import FederationConfig, load_config
from fedcmt.engines import coordinator as coordinator_module
from fedcmt.engines.messages import Fit, Fitted, Message, MessageError, Prepare
from fedcmt.engines.privacy import UpdateFilters, dequantized
from fedcmt.errors import InputError
from fedcmt.layout import FlatLayout, Segment


@pytest.fixture
def make(raw_datasets: Path, preprocessed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Configs of a small segmenting federation; nothing is scored or reported at the end."""
    monkeypatch.setattr(coordinator_module, "write_report", lambda path: path)
    monkeypatch.setattr(engine, "_score", lambda *_: {})
    monkeypatch.setattr(engine, "_present", lambda *_: None)

    def config(name: str = "w", clients: int = 2, **changes: object) -> FederationConfig:
        settings = federation(raw_datasets, preprocessed, tmp_path / name, **changes)
        settings["clients"] = settings["clients"][:clients]
        settings["training"] = {**settings["training"], "local_steps": 1}
        settings["nvflare"] = {"min_clients": 1, "start_timeout": 1, **changes.get("nvflare", {})}
        return load_config(settings)

    return config


def state(config: FederationConfig) -> bytes:
    return (config.workspace_folder() / "server" / "round-0002.safetensors").read_bytes()


def client_state(config: FederationConfig, name: str) -> bytes:
    return (config.workspace_folder() / "clients" / name / "state" / "round-0002.safetensors").read_bytes()


def test_a_trainer_killed_between_rounds_and_a_stopped_server_change_no_bit(make: Callable) -> None:
    calm, troubled = make("calm"), make("troubled")
    run_federation(calm)
    carrier = InMemory(troubled, make=RealSite)

    def dies(name: str, message: Message) -> None:
        if name == "ct_regions" and of_kind(message, Fit, 2) and not message.tensors:
            carrier.kill(name)

    assert run(carrier, troubled, rounds=1)[0] == "stopped"
    carrier = InMemory(troubled, make=RealSite)
    carrier.before = dies
    assert run(carrier, troubled)[0] == "finished"
    assert state(troubled) == state(calm)
    for name in ("ct_plain", "ct_regions"):
        assert client_state(troubled, name) == client_state(calm, name)


def test_decoders_travel_where_the_strategy_says_so(make: Callable) -> None:
    calm, distributed = make("calm", strategy="asymfedavg"), make("distributed", strategy="asymfedavg")
    run_federation(calm)
    assert run(InMemory(distributed, make=RealSite), distributed)[0] == "finished"
    assert state(distributed) == state(calm)


def test_a_decoder_stays_where_nobody_shares_it(make: Callable) -> None:
    config = make(strategy="fedcmt")  # one of the two predicts regions
    carrier, sent = InMemory(config, make=RealSite), []
    carrier.after = lambda name, m: sent.append(sorted(m.tensors)) or m if isinstance(m.body, Fitted) else m
    assert run(carrier, config)[0] == "finished"
    assert sent == [["adaptor", "encoder"]] * 4


def test_nothing_travels_with_the_local_strategy(make: Callable) -> None:
    calm, distributed = make("calm", strategy="local"), make("distributed", strategy="local")
    run_federation(calm)
    carrier = InMemory(distributed, make=RealSite)
    assert run(carrier, distributed)[0] == "finished"
    assert client_state(distributed, "ct_plain") == client_state(calm, "ct_plain")
    assert not any(of_kind(message, Fit, 2) and message.tensors for _, message in carrier.asked)


def test_a_client_that_missed_a_round_goes_on_from_its_own_last_state(make: Callable) -> None:
    config = make(rounds=3)
    carrier = InMemory(config, make=RealSite)

    def dies(name: str, message: Message) -> str | None:
        if name == "ct_regions" and of_kind(message, Fit, 2):
            carrier.kill(name)
            return "the trainer process ended (killed by SIGKILL)"
        return None

    carrier.before = dies
    stood: list[int] = []
    carrier.after = lambda name, m: stood.append(m.body.went_on_from) or m if isinstance(m.body, Fitted) else m
    assert run(carrier, config)[0] == "finished"
    assert stood == [0, 0, 1, 2, 1]  # in round 3 one of them from its state after round 1
    saved = (config.workspace_folder() / "clients" / "ct_regions" / "state").iterdir()
    assert sorted(path.name for path in saved) == ["round-0001.safetensors", "round-0003.safetensors"]


def test_a_client_that_lost_its_files_starts_its_decoder_anew(make: Callable) -> None:
    config = make()
    assert run(InMemory(config, make=RealSite), config, rounds=1)[0] == "stopped"
    shutil.rmtree(config.workspace_folder() / "clients" / "ct_regions")
    ended, notes, _ = run(InMemory(config, make=RealSite), config)
    assert ended == "finished"
    assert "ct_regions: its state after round 1 is lost, it went on from 0" in notes


def test_a_site_says_what_is_wrong_with_its_data_and_the_others_go_on(make: Callable, tmp_path: Path) -> None:
    config = make()
    elsewhere = config.model_copy(update={"raw": tmp_path})

    def site(config: FederationConfig, name: str) -> RealSite:
        return RealSite(elsewhere if name == "ct_regions" else config, name)

    ended, notes, coordinator = run(InMemory(config, make=site), config)
    assert ended == "finished"
    assert "client 'ct_regions'" in coordinator.status["unavailable"]["ct_regions"]
    assert any(note.startswith("ct_regions: client 'ct_regions'") for note in notes)


def test_scores_of_cases_stay_at_a_site_that_does_not_share_them(make: Callable) -> None:
    config = make(clients=1, rounds=1)
    ended, _, _ = run(InMemory(config, make=lambda config, name: RealSite(config, name, "no")), config)
    assert ended == "finished"
    (entry,) = json.loads((config.workspace_folder() / "results.json").read_text())["clients"]
    assert entry["cases"] == []
    assert entry["mean"]
    own = json.loads((config.workspace_folder() / "clients" / "ct_plain" / "results.json").read_text())
    assert own["cases"][0]["images"]


def test_messages_that_do_not_fit_are_refused(make: Callable) -> None:
    site = RealSite(make(clients=1), "ct_plain")
    prepare = Message(Prepare(topology={}, digest="0" * 64, starting=True))
    assert "topology differs from its digest" in site.answer(prepare).body.reason
    damaged = Message(
        Fit(
            round=1,
            after_round=0,
            joins_at_round=1,
            trained=[],
            parameters=None,
            sends_decoder=False,
            reply_dtype="float32",
        ),
        {"encoder": torch.ones(3)},
        Message(prepare.body, {"encoder": torch.zeros(3)}).manifest(),
    )
    assert "checksum differs" in site.answer(damaged).body.reason
    assert "does not answer" in site.answer(Message(Fitted(round=1, num_cases=1, went_on_from=0))).body.reason
    site.lose()


LAYOUTS = {
    "encoder": FlatLayout((Segment("encoder.a", (40, 25), 0), Segment("encoder.b", (500,), 1008)), 1520),
    "adaptor": FlatLayout((Segment("adaptor.w", (30,), 0),), 32),
}


def update() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    parts = {name: torch.zeros(layout.size) for name, layout in LAYOUTS.items()}
    for name, layout in LAYOUTS.items():
        for segment in layout.segments:
            segment.view(parts[name]).copy_(torch.randn(segment.shape, generator=generator) * 1e-3)
    return parts


def filters(make: Callable, *entries: dict, quantizer: str = "none") -> UpdateFilters:
    return UpdateFilters(make(nvflare={"filters": list(entries), "quantizer": quantizer}).nvflare)


def test_percentile_keeps_the_largest_values_of_the_whole_update(make: Callable) -> None:
    parts, before = update(), update()
    filters(make, {"name": "percentile", "percentile": 90, "gamma": 1.0}).apply(parts, LAYOUTS)
    kept = torch.cat([parts[name] for name in parts]) != 0
    assert kept.sum().item() == pytest.approx(0.1 * 1530, abs=2)
    assert torch.equal(parts["encoder"][kept[:1520]], before["encoder"][kept[:1520]])


def test_exclude_zeroes_what_it_names(make: Callable) -> None:
    parts, before = update(), update()
    filters(make, {"name": "exclude", "exclude_vars": "encoder.b"}).apply(parts, LAYOUTS)
    assert not parts["encoder"][1008:].any()
    assert torch.equal(parts["encoder"][:1008], before["encoder"][:1008])
    assert torch.equal(parts["adaptor"], before["adaptor"])


def test_svt_adds_noise_to_a_fraction(make: Callable) -> None:
    parts, before = update(), update()
    filters(make, {"name": "svt", "fraction": 0.2, "epsilon": 1.0, "replace": False}).apply(parts, LAYOUTS)
    values = torch.cat([parts["encoder"], parts["adaptor"]])
    assert 0 < (values != 0).sum() <= 0.2 * 1530 + 1
    assert not torch.equal(parts["encoder"], before["encoder"])


def test_a_filter_with_a_wrong_setting_is_one_line(make: Callable) -> None:
    with pytest.raises(InputError, match=r"nvflare\.filters.*unexpected"):
        filters(make, {"name": "percentile", "percentle": 90})


@pytest.mark.parametrize(("quantizer", "error"), [("float16", 1e-3), ("adaquant", 0.7)])
def test_quantizers_shorten_and_come_back(make: Callable, quantizer: str, error: float) -> None:
    parts = update()
    states, packed = filters(make, quantizer=quantizer).quantize(parts)
    size = sum(t.numel() * t.element_size() for t in packed.values())
    assert size <= 0.5 * 4 * 1552
    for name, tensor in parts.items():
        back = packed[name].float() if states is None else dequantized(packed[name], states[name])
        assert back.shape == tensor.shape
        assert float((back - tensor).norm() / tensor.norm()) < error


def test_a_quantized_update_that_does_not_fit_its_description_is_refused(make: Callable) -> None:
    states, packed = filters(make, quantizer="adaquant").quantize(update())
    state = states["encoder"]
    for wrong in ({**state, "numel": 10**6}, {**state, "type": "O"}, {k: state[k] for k in ("numel", "norm")}):
        with pytest.raises(MessageError, match="does not fit"):
            dequantized(packed["encoder"], wrong)


def test_filters_reach_decoders_and_leave_the_wires_precision(make: Callable) -> None:
    nvflare = {"filters": [{"name": "exclude", "exclude_vars": "."}], "wire_dtype": "bfloat16"}
    config = make(strategy="asymfedavg", nvflare=nvflare)
    carrier, sent = InMemory(config, make=RealSite), []
    carrier.after = lambda name, m: sent.append(m.tensors) or m if isinstance(m.body, Fitted) else m
    assert run(carrier, config)[0] == "finished"
    assert [sorted(tensors) for tensors in sent] == [["adaptor", "decoder", "decoder_start", "encoder"]] * 2 + [
        ["adaptor", "decoder", "encoder"]
    ] * 2
    for tensors in sent:
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert not any(tensors[name].any() for name in ("adaptor", "decoder", "encoder"))


def test_filters_that_destroy_the_update_are_warned_of_and_recorded(make: Callable) -> None:
    config = make(clients=1, rounds=1, nvflare={"filters": [{"name": "svt", "fraction": 0.01, "epsilon": 0.1}]})
    carrier = InMemory(config, make=RealSite)
    ended, notes, _ = run(carrier, config)
    assert ended == "finished"
    line = json.loads((config.workspace_folder() / "metrics.jsonl").read_text().splitlines()[0])
    assert line["cosine_after_filters"] < 0.5
    assert any("ct_plain: warning: filters leave an update of cosine" in note for note in notes)
