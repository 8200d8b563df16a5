"""A distributed run over a carrier in memory: no fault of one client costs anybody else anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from in_memory import InMemory, of_kind, run
from phantoms import TINY_TOPOLOGY

from fedcmt.config import FederationConfig, load_config
from fedcmt.engines import coordinator as coordinator_module
from fedcmt.engines.messages import Close, Fit, Fitted, Message, Score, Scored

NAMES = ["ct_a", "ct_b", "mr_c"]


@pytest.fixture(autouse=True)
def _without_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing the report takes longer than everything else here."""
    if "with_report" not in request.fixturenames:
        monkeypatch.setattr(coordinator_module, "write_report", lambda path: path)


@pytest.fixture
def with_report() -> None:
    """For tests that look at the report."""


@pytest.fixture
def config(tmp_path: Path) -> FederationConfig:
    """Three clients that pretend to train, two rounds."""
    return load_config(
        {
            "name": "pretence",
            "rounds": 2,
            "raw": str(tmp_path),
            "preprocessed": str(tmp_path),
            "workspace": str(tmp_path / "w"),
            "topology": TINY_TOPOLOGY,
            "strategy": {"name": "fedcmt", "server_momentum": 0.5},
            "nvflare": {"min_clients": 2, "start_timeout": 1},
            "clients": [
                {"name": name, "dataset": 800 + i, "modality": name[:2].upper()} for i, name in enumerate(NAMES)
            ],
        }
    )


def changed(config: FederationConfig, **changes: Any) -> FederationConfig:
    return load_config({**config.model_dump(mode="json"), **changes})


def lines(config: FederationConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.workspace_folder() / "metrics.jsonl").read_text().splitlines()]


def server_lines(config: FederationConfig) -> list[dict[str, Any]]:
    return [line for line in lines(config) if line["kind"] == "server"]


def state(config: FederationConfig, round_index: int = 2) -> bytes:
    return (config.workspace_folder() / "server" / f"round-{round_index:04d}.safetensors").read_bytes()


@pytest.fixture
def undisturbed(config: FederationConfig) -> bytes:
    """The server's state after the same federation without any fault."""
    calm = changed(config, workspace=str(config.workspace_folder().with_name("calm")))
    assert run(InMemory(calm), calm)[0] == "finished"
    assert [line["absent"] for line in server_lines(calm)] == [{}, {}]
    return state(calm)


def test_parameters_are_sent_once_a_round(config: FederationConfig) -> None:
    carrier = InMemory(config)
    assert run(carrier, config)[0] == "finished"
    fits = [message for name, message in carrier.asked if isinstance(message.body, Fit) and name == "ct_a"]
    assert [bool(message.tensors) for message in fits] == [True, False]
    first, second = [line for line in lines(config) if line.get("client") == "ct_a"]
    assert second["bytes_received"] < 0.6 * first["bytes_received"]
    assert server_lines(config)[0]["bytes_received"] == sum(
        line["bytes_sent"] for line in lines(config) if line["kind"] == "client" and line["round"] == 1
    )


@pytest.mark.usefixtures("with_report")
def test_a_trainer_that_dies_misses_the_round_and_is_back_in_the_next(config: FederationConfig) -> None:
    carrier = InMemory(config)

    def dies(name: str, message: Message) -> str | None:
        if name == "mr_c" and of_kind(message, Fit, 1):
            carrier.kill(name)
            return "the trainer process ended (killed by SIGKILL)"
        return None

    carrier.before = dies
    ended, notes, _ = run(carrier, config)
    assert ended == "finished"
    first, second = server_lines(config)
    assert (first["clients"], second["clients"]) == (NAMES[:2], NAMES)
    assert first["absent"] == {"mr_c": "the trainer process ended (killed by SIGKILL)"}
    assert second["absent"] == {}
    assert any("mr_c: misses round 1" in note for note in notes)
    assert "killed by SIGKILL" in (config.workspace_folder() / "report.html").read_text()


def test_parameters_that_a_new_trainer_lacks_are_sent_again(config: FederationConfig, undisturbed: bytes) -> None:
    """Killed between rounds, a trainer costs nothing but a second transfer."""
    carrier = InMemory(config)

    def dies(name: str, message: Message) -> None:
        if name == "ct_b" and of_kind(message, Fit, 2) and not message.tensors:
            carrier.kill(name)

    carrier.before = dies
    assert run(carrier, config)[0] == "finished"
    assert state(config) == undisturbed
    assert server_lines(config)[1]["absent"] == {}


def test_a_straggler_is_recorded_and_its_late_answer_refused(config: FederationConfig) -> None:
    carrier = InMemory(config)
    kept: list[Message] = []

    def late(name: str, answer: Message) -> Message | str:
        if name == "ct_a" and of_kind(answer, Fitted, 1):
            kept.append(answer)
            return "no answer within 1 s"
        return answer

    carrier.after = late
    ended, notes, coordinator = run(carrier, config)
    assert ended == "finished"
    assert server_lines(config)[0]["absent"] == {"ct_a": "no answer within 1 s"}
    assert server_lines(config)[1]["clients"] == NAMES
    before = state(config)
    coordinator.refuse("ct_a", kept[0])
    assert any("late or repeated answer of round 1 refused" in note for note in notes)
    assert state(config) == before


def test_a_replayed_update_is_refused(config: FederationConfig) -> None:
    carrier = InMemory(config)
    kept: dict[str, Message] = {}
    carrier.after = lambda name, m: kept.setdefault(name, m) if isinstance(m.body, Fitted) and name == "ct_a" else m
    ended, notes, _ = run(carrier, config)
    assert ended == "finished"
    assert server_lines(config)[1]["refused"] == {"ct_a": "update of round 1 in round 2"}
    assert any("is not used: update of round 1 in round 2" in note for note in notes)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda t: t.index_fill(0, torch.tensor([7]), float("nan")), "not finite"),
        (lambda t: t * 1e6, "times the others' median"),
        (lambda t: t[:-1].clone(), "expected"),
        (lambda t: t.to(torch.uint8), "expected float32"),
    ],
)
@pytest.mark.usefixtures("with_report")
def test_a_spoilt_update_is_set_aside_and_named_in_the_report(config: FederationConfig, spoil, reason: str) -> None:
    carrier = InMemory(config)

    def spoilt(name: str, answer: Message) -> Message:
        if name == "ct_b" and of_kind(answer, Fitted, 1):
            return Message(answer.body, {part: spoil(tensor) for part, tensor in answer.tensors.items()})
        return answer

    carrier.after = spoilt
    assert run(carrier, config)[0] == "finished"
    first, second = server_lines(config)
    assert reason in first["refused"]["ct_b"]
    assert (first["clients"], second["clients"]) == (["ct_a", "mr_c"], NAMES)
    client = next(line for line in lines(config) if line.get("client") == "ct_b")
    assert (client["participated"], reason in client["refused"]) == (False, True)
    page = (config.workspace_folder() / "report.html").read_text()
    assert "Refused updates" in page
    assert reason.replace("'", "&#39;") in page


def test_an_update_damaged_on_the_way_is_refused(config: FederationConfig) -> None:
    carrier = InMemory(config)

    def damage(name: str, answer: Message) -> Message:
        if name == "ct_b" and of_kind(answer, Fitted, 1):
            answer.tensors["encoder"].view(torch.int32)[100] ^= 1  # one bit
        return answer

    carrier.after = damage
    assert run(carrier, config)[0] == "finished"
    assert "checksum differs" in server_lines(config)[0]["refused"]["ct_b"]


def test_a_lost_quorum_pauses_with_the_reason_and_the_run_goes_on_later(
    config: FederationConfig, undisturbed: bytes
) -> None:
    carrier = InMemory(config)
    carrier.before = lambda name, m: "its host is gone" if of_kind(m, Fit, 2) and name != "mr_c" else None
    assert run(carrier, config)[0] == "paused"
    status = json.loads((config.workspace_folder() / "status.json").read_text())
    assert (status["state"], status["round"]) == ("paused", 1)
    assert "round 2: 1 updates, 2 are needed" in status["reason"]
    assert "ct_a: its host is gone" in status["reason"]
    assert not (config.workspace_folder() / "results.json").exists()
    assert run(InMemory(config), config)[0] == "finished"
    assert state(config) == undisturbed


def test_an_update_set_aside_does_not_count_for_the_quorum(config: FederationConfig) -> None:
    strict = changed(config, nvflare={"min_clients": 3, "start_timeout": 1})
    carrier = InMemory(strict)
    carrier.after = lambda name, m: (
        Message(m.body, {p: t * 1e6 for p, t in m.tensors.items()}) if name == "ct_b" and m.tensors else m
    )
    ended, _, coordinator = run(carrier, strict)
    assert ended == "paused"
    assert "ct_b: encoder update is" in coordinator.status["reason"]


def test_too_few_clients_at_the_start_pause(config: FederationConfig) -> None:
    ended, _, coordinator = run(InMemory(config, ["ct_a"]), config)
    assert ended == "paused"
    assert "1 of 3 clients are connected, 2 are needed" in coordinator.status["reason"]


def test_ended_after_a_round_it_goes_on_bit_for_bit(config: FederationConfig, undisturbed: bytes) -> None:
    assert run(InMemory(config), config, rounds=1)[0] == "stopped"
    ended, notes, _ = run(InMemory(config), config)
    assert ended == "finished"
    assert "going on after round 1" in notes
    assert state(config) == undisturbed


def test_a_server_that_dies_before_its_commit_repeats_the_round(config: FederationConfig, undisturbed: bytes) -> None:
    carrier = InMemory(config)

    def dies(name: str, message: Message) -> None:
        if name == "mr_c" and of_kind(message, Close, 2):
            raise KeyboardInterrupt

    carrier.before = dies
    with pytest.raises(KeyboardInterrupt):
        run(carrier, config)
    assert [line["round"] for line in server_lines(config)] == [1]
    assert run(InMemory(config), config)[0] == "finished"
    assert state(config) == undisturbed


def test_a_damaged_newest_state_falls_back_to_the_one_before(config: FederationConfig, undisturbed: bytes) -> None:
    assert run(InMemory(config), config)[0] == "finished"
    newest = config.workspace_folder() / "server" / "round-0002.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert run(InMemory(config), config)[0] == "finished"
    assert state(config) == undisturbed


def test_a_client_that_first_appears_later_joins_then(config: FederationConfig) -> None:
    assert run(InMemory(config, NAMES[:2]), config, rounds=1)[0] == "stopped"
    assert server_lines(config)[0]["absent"] == {"mr_c": "not connected"}
    assert run(InMemory(config), config)[0] == "finished"
    assert server_lines(config)[1]["members"] == NAMES
    known = json.loads((config.workspace_folder() / "server" / "clients.json").read_text())
    assert [known[name]["joins_at_round"] for name in NAMES] == [1, 1, 2]


@pytest.mark.parametrize(("done", "goes"), [(1, [3]), (2, [3, 4])])
def test_a_new_client_in_the_config_joins_and_another_leaves(
    done: int, goes: list[int], config: FederationConfig
) -> None:
    """In the named round or, if that went by while the config was written, in the next; it must cost nobody the run."""
    clients = [client.model_dump(mode="json") for client in config.clients]
    start = changed(config, clients=clients[:2], rounds=done)
    assert run(InMemory(start), start)[0] == "finished"
    clients[0]["leaves_after_round"] = 1
    clients[2] |= {"joins_at_round": 2, "warmup_rounds": 1}
    for rounds in goes:  # the config stays as it is when the run is cut off and goes on
        later = changed(config, clients=clients, rounds=rounds, nvflare={"min_clients": 1})
        assert run(InMemory(later), later)[0] == "finished"
    first, second = server_lines(config)[done:]
    assert (first["members"], second["clients"]) == (["ct_b", "mr_c"], ["ct_b", "mr_c"])
    assert (first["clients"], first["warming_up"]) == (["ct_b"], ["mr_c"])


def test_another_federations_workspace_is_refused(config: FederationConfig) -> None:
    assert run(InMemory(config), config)[0] == "finished"
    other = changed(config, seed=9)
    ended, _, coordinator = run(InMemory(other), other)
    assert ended == "failed"
    assert "field 'seed'" in coordinator.status["reason"]


def test_bfloat16_halves_the_bytes(config: FederationConfig) -> None:
    half = changed(
        config, workspace=str(config.workspace_folder().with_name("half")), nvflare={"wire_dtype": "bfloat16"}
    )
    for each in (config, half):
        assert run(InMemory(each), each)[0] == "finished"
    full, short = server_lines(config)[0], server_lines(half)[0]
    for key in ("bytes_sent", "bytes_received"):
        assert 0.5 <= short[key] / full[key] < 0.6
    assert short["step_norm"] == pytest.approx(full["step_norm"], rel=0.01)


def test_a_client_that_cannot_be_scored_is_named_and_asked_again(config: FederationConfig) -> None:
    carrier = InMemory(config)
    carrier.before = lambda name, m: "no answer" if isinstance(m.body, Score) and name == "mr_c" else None
    assert run(carrier, config)[0] == "finished"
    path = config.workspace_folder() / "results.json"
    assert json.loads(path.read_text())["unscored"] == {"mr_c": "no answer"}
    assert run(InMemory(config), config)[0] == "finished"
    results = json.loads(path.read_text())
    assert "unscored" not in results
    assert [entry["client"] for entry in results["clients"]] == NAMES


@pytest.mark.usefixtures("with_report")
def test_paths_from_another_machine_are_not_taken(config: FederationConfig) -> None:
    assert run(InMemory(config), config)[0] == "finished"
    entries = json.loads((config.workspace_folder() / "results.json").read_text())["clients"]
    assert all(case["images"] == [] and case["truth"] is None for entry in entries for case in entry["cases"])
    assert "its files stay at the client" in (config.workspace_folder() / "report.html").read_text()


def test_a_result_that_does_not_fit_is_not_written(config: FederationConfig) -> None:
    carrier = InMemory(config)
    carrier.after = lambda name, m: Message(Scored(entry={"client": name})) if isinstance(m.body, Scored) else m
    assert run(carrier, config)[0] == "finished"
    results = json.loads((config.workspace_folder() / "results.json").read_text())
    assert results["clients"] == []
    assert "does not fit the schema" in results["unscored"]["ct_a"]


def test_the_topology_is_chosen_from_what_clients_tell(config: FederationConfig) -> None:
    automatic = changed(config, topology={"auto": True, "features": [4, 8, 16], "adaptor_width": 4}, rounds=1)
    assert run(InMemory(automatic), automatic)[0] == "finished"
    contract = json.loads((automatic.workspace_folder() / "contract.json").read_text())
    assert list(contract["chosen_from"]) == NAMES


def test_answers_of_another_kind_are_absences_not_crashes(config: FederationConfig) -> None:
    carrier = InMemory(config)
    carrier.before = lambda name, m: Message(Score()) if of_kind(m, Fit, 1) and name == "mr_c" else None
    assert run(carrier, config)[0] == "finished"
    assert server_lines(config)[0]["absent"]["mr_c"] == "answered Score"


@pytest.mark.parametrize("change", [{"round": 7}, {"client": "ct_b"}, {"extra": 1}, {"seconds": {"train": "x"}}])
def test_a_line_that_does_not_fit_is_not_written(config: FederationConfig, change: dict[str, Any]) -> None:
    carrier = InMemory(config)

    def forge(name: str, answer: Message) -> Message:
        if name == "ct_a" and hasattr(answer.body, "line"):
            return Message(answer.body.model_copy(update={"line": {**answer.body.line, **change}}))
        return answer

    carrier.after = forge
    assert run(carrier, config)[0] == "finished"
    assert not [line for line in lines(config) if line.get("client") == "ct_a"]
    assert "not scored: line" in server_lines(config)[0]["absent"]["ct_a"]
