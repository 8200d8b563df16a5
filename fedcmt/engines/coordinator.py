"""The server's side of a distributed run: the round loop over any carrier of messages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

from fedcmt import strategies
from fedcmt.checkpoint import Workspace, results_of
from fedcmt.config import FederationConfig, dump_config
from fedcmt.continuing import check_same_federation, go_on
from fedcmt.curves import Curves
from fedcmt.device import choose_device
from fedcmt.engines.enrolment import Carrier, Enrolment, failure
from fedcmt.engines.entries import checked_entry
from fedcmt.engines.messages import (
    WIRE_DTYPES,
    Announced,
    Close,
    Closed,
    Fit,
    Fitted,
    Message,
    MessageError,
    NotHeld,
    Score,
    Scored,
    checked_line,
)
from fedcmt.engines.parameters import WireParameters, received_update
from fedcmt.engines.privacy import DESTROYED
from fedcmt.errors import InputError, RunError
from fedcmt.files import read_json, write_json, write_text
from fedcmt.initial_weights import read_weights, report_matches
from fedcmt.report import write_report
from fedcmt.server import Server
from fedcmt.topology import AgreedTopology

_PATIENCE = 90  # seconds

State = Literal["running", "finished", "paused", "stopped", "failed"]


@dataclass
class _Round:
    """What happened in a round so far."""

    index: int
    went_on_from: dict[str, int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)  # bytes from a client
    received: dict[str, int] = field(default_factory=dict)  # bytes to a client
    cosines: dict[str, float] = field(default_factory=dict)  # of filtered updates
    not_held: list[str] = field(default_factory=list)
    lines: dict[str, dict[str, Any]] = field(default_factory=dict)


class Coordinator:
    """Runs a federation over a carrier.

    Args:
        config: The federation's settings, with the server's own folders and device.
        carrier: Reaches the clients.
        note: Shows one line to the server's engineer.
        one_machine: Whether clients' files can be read here.
    """

    def __init__(
        self,
        config: FederationConfig,
        carrier: Carrier,
        note: Callable[[str], None],
        *,
        one_machine: bool = False,
    ) -> None:
        self._config, self._carrier, self._note = config, carrier, note
        self._one_machine = one_machine
        self._workspace = Workspace(config.workspace_folder())
        self._stop = threading.Event()
        self._server: Server | None = None
        self._lines: list[dict[str, Any]] = []
        self._held: dict[str, dict[str, Announced]] = {}  # client -> parameters it has
        self._wire = WireParameters(WIRE_DTYPES[config.nvflare.wire_dtype])
        self._prepared: list[str] = []  # clients that can train in this job
        self._here: list[str] = []  # those of them that are connected
        self._unavailable: dict[str, str] = {}
        self.status: dict[str, Any] = {"state": "running", "round": 0, "rounds": config.rounds}

    def stop_after_round(self) -> None:
        """End in good order when the round under way is committed."""
        self._stop.set()

    def refuse(self, client: str, message: Message) -> None:
        """Record an answer that nobody waits for any more."""
        body, index = message.body, self.status["round"]
        about = f"of round {body.round}" if isinstance(body, Fitted) else f"({type(body).__name__})"
        self._note(f"{client}: late or repeated answer {about} refused, {index} rounds are finished")

    def run(self) -> State:
        """Run until the federation is finished, stopped or has to pause; the reason stands in ``status.json``."""
        try:
            with ExitStack() as stack:
                self._lock(stack)
                self._run(stack)
        except RunError as error:
            self._tell("paused", str(error))
        except InputError as error:
            self._tell("failed", str(error))
        state: State = self.status["state"]
        return state

    def _lock(self, stack: ExitStack) -> None:
        """Take the workspace; a server that was killed may leave a job behind which takes a moment to notice."""
        try:
            stack.enter_context(self._workspace.locked(_PATIENCE))
        except InputError as error:
            raise RunError(str(error)) from None

    def _run(self, stack: ExitStack) -> None:
        self._open()
        assert self._server is not None
        curves = stack.enter_context(Curves(self._workspace.tensorboard, self._server.round_index))
        for round_index in range(self._server.round_index + 1, self._config.rounds + 1):
            if self._carrier.ended():
                raise RunError("the job was ended")
            new = self._round(round_index)
            self._lines += new
            self._commit()
            curves.add(new)
            if self._stop.is_set() and round_index < self._config.rounds:
                self._tell("stopped", "asked to end after this round")
                return
        self._finish()

    def _tell(self, state: State, reason: str | None = None) -> None:
        done = self._server.round_index if self._server else self.status["round"]
        self.status = {"state": state, "round": done, "rounds": self._config.rounds}
        self.status |= {"here": sorted(self._here), "unavailable": self._unavailable}
        if reason:
            self.status["reason"] = reason
            self._note(f"{state}: {reason}")
        write_json(self._workspace.status, self.status)

    def _open(self) -> None:
        workspace, config = self._workspace, self._config
        strategy = strategies.create(config.strategy)
        committed = next(iter(workspace.saved_server_rounds()), 0)
        check_same_federation(workspace, config, committed)
        enrolment = Enrolment(config, workspace, self._carrier, self._note, committed)
        connected = enrolment.wait(self._config.quorum(committed + 1))
        contract = enrolment.contract(connected)
        descriptions = enrolment.prepare(connected, contract.topology)
        self._prepared = self._here = [name for name in connected if name not in enrolment.absent]
        self._unavailable = dict(enrolment.absent)
        weights = read_weights(config.initial_weights) if config.initial_weights and not committed else None
        self._server = Server(
            strategy,
            contract.topology,
            list(descriptions.values()),
            seed=config.seed,
            rounds=config.rounds,
            device=choose_device(config.device),
            backend=config.backend,
            quarantine_ratio=config.quarantine_ratio,
            initial_weights=weights,
        )
        if weights is not None and config.initial_weights is not None:
            report_matches(config.initial_weights, self._server.matched, None, self._note)
        for remark in self._server.remarks:
            self._note(remark)
        self._restore(contract)
        self._tell("running")

    def _restore(self, contract: AgreedTopology) -> None:
        """Go on after the newest round that can be read."""
        assert self._server is not None
        write_text(self._workspace.config, dump_config(self._config))
        write_json(self._workspace.contract, contract.as_json())
        workspace, server = self._workspace, self._server
        self._lines = go_on(
            workspace,
            workspace.saved_server_rounds(),
            lambda round_index: server.restore(workspace.server_state(round_index)),
            self._note,
        )

    def _round(self, round_index: int) -> list[dict[str, Any]]:
        """One round: clients train, the server makes its step, clients are scored with the result."""
        server, now = self._server, _Round(round_index)
        assert server is not None
        server.begin(round_index)
        connected = self._carrier.connected()
        self._here = [name for name in self._prepared if name in connected]
        here = [name for name in server.members if name in self._here]
        now.absent = {n: self._unavailable.get(n, "not connected") for n in self._expected(round_index) - set(here)}
        self._note(f"round {round_index}/{self._config.rounds}: {', '.join(here)} train")
        self._wire.forget()
        self._ask_to_fit(now, here, resend=False)
        if now.not_held:
            self._ask_to_fit(now, now.not_held, resend=True)
        server.set_aside()
        quorum = self._config.quorum(round_index)
        if len(server.accepted) < quorum:
            reasons = {**now.absent, **server.refused}
            told = "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items()))
            raise RunError(f"round {round_index}: {len(server.accepted)} updates, {quorum} are needed ({told})")
        server_line = server.finish()
        self._wire.forget()
        self._ask_to_close(now)
        return self._round_lines(now, server_line)

    def _expected(self, round_index: int) -> set[str]:
        assert self._server is not None
        return set(self._server.members) | (self._config.members(round_index) & set(self._unavailable))

    def _ask_to_fit(self, now: _Round, clients: Sequence[str], *, resend: bool) -> None:
        requests = {name: self._fit_request(name, now.index, resend=resend) for name in clients}
        for name, message in requests.items():
            now.received[name] = now.received.get(name, 0) + message.nbytes + len(message.header())
        absent = self._carrier.ask(
            requests,
            timeout=self._config.nvflare.round_timeout,
            on_answer=lambda name, message: self._on_fitted(now, name, message),
        )
        for name, reason in absent.items():
            now.absent[name] = reason
            self._held.pop(name, None)
            self._note(f"{name}: misses round {now.index}: {reason}")

    def _fit_request(self, name: str, round_index: int, *, resend: bool) -> Message:
        assert self._server is not None
        outgoing, config = self._server.outgoing(name), self._config.nvflare
        parameters, tensors = self._wire.of(outgoing)
        held = parameters is not None and self._held.get(name) == parameters and not resend
        body = Fit(
            round=round_index,
            after_round=self._state_round(name),
            joins_at_round=self._server.membership(name).joins_at_round,
            trained=list(outgoing.trained) if outgoing else [],  # type: ignore[arg-type]
            parameters=parameters,  # type: ignore[arg-type]
            sends_decoder=outgoing is not None and outgoing.sends_decoder,
            reply_dtype=config.wire_dtype,
        )
        return Message(body, {} if held else tensors, {} if held else parameters)

    def _state_round(self, name: str) -> int:
        """The last round that a client has closed."""
        closed = [line["round"] for line in self._lines if line["kind"] == "client" and line["client"] == name]
        return max(closed, default=0)

    def _on_fitted(self, now: _Round, name: str, message: Message) -> None:
        assert self._server is not None
        now.sent[name] = now.sent.get(name, 0) + message.nbytes + len(message.header())
        body = message.body
        if isinstance(body, NotHeld) and name not in now.not_held:
            now.not_held.append(name)
            return
        reason = None
        if not isinstance(body, Fitted):
            now.absent[name] = failure(message)
            self._note(f"{name}: misses round {now.index}: {now.absent[name]}")
            return
        try:
            message.check()
            update = received_update(name, body, message, self._config.nvflare)
        except MessageError as error:
            reason = str(error)
            self._server.refuse(name, reason)
        else:
            reason = self._server.accept(update)
        if reason is not None:
            self._note(f"{name}: its update of round {now.index} is not used: {reason}")
        now.went_on_from[name] = body.went_on_from
        if body.cosine_after_filters is not None:
            now.cosines[name] = body.cosine_after_filters
            if body.cosine_after_filters < DESTROYED:
                self._note(
                    f"{name}: warning: filters leave an update of cosine {body.cosine_after_filters:.2f} to what was "
                    "learned"
                )

    def _ask_to_close(self, now: _Round) -> None:
        assert self._server is not None
        requests = {}
        for name in now.went_on_from:
            parameters, tensors = self._wire.of(self._server.outgoing(name))
            body = Close(
                round=now.index,
                refused=self._server.refused.get(name),
                parameters=parameters,  # type: ignore[arg-type]
            )
            requests[name] = Message(body, tensors, parameters or {})
            now.received[name] = now.received.get(name, 0) + requests[name].nbytes + len(requests[name].header())

        def on_answer(name: str, message: Message) -> None:
            now.sent[name] = now.sent.get(name, 0) + len(message.header())
            body = message.body
            try:
                if not isinstance(body, Closed):
                    raise MessageError(failure(message))
                now.lines[name] = checked_line(body.line, name, now.index)
            except MessageError as error:
                now.absent[name] = f"not scored: {error}"
                self._note(f"{name}: {now.absent[name]}")
                return
            request = requests[name].body
            assert isinstance(request, Close)
            self._held[name] = dict(request.parameters or {})  # type: ignore[arg-type]

        missing = self._carrier.ask(requests, timeout=self._config.nvflare.round_timeout, on_answer=on_answer)
        for name, reason in missing.items():
            now.absent[name] = f"not scored: {reason}"
            self._held.pop(name, None)
            self._note(f"{name}: {now.absent[name]}")

    def _round_lines(self, now: _Round, server_line: dict[str, Any]) -> list[dict[str, Any]]:
        order = [client.name for client in self._config.clients]
        lines = []
        for name in sorted(now.lines, key=order.index):
            line = now.lines[name] | {"bytes_sent": now.sent[name], "bytes_received": now.received[name]}
            if now.cosines.get(name) is not None:
                line["cosine_after_filters"] = now.cosines[name]
            lines.append(line)
        server_line["absent"] = dict(sorted(now.absent.items()))
        server_line["bytes_sent"] = sum(now.received.values())
        server_line["bytes_received"] = sum(now.sent.values())
        for name, stood in now.went_on_from.items():
            if stood != self._state_round(name):
                self._note(f"{name}: its state after round {self._state_round(name)} is lost, it went on from {stood}")
        self._note(f"round {now.index}: {len(server_line['clients'])} updates used, {len(lines)} clients scored")
        return [*lines, server_line]

    def _commit(self) -> None:
        """Make a round durable; the server's state comes last."""
        assert self._server is not None
        index = self._server.round_index
        self._workspace.write_metrics(self._lines)
        self._server.save(self._workspace.server_state(index))
        self._workspace.discard_old_server_states(index)
        self._tell("running")

    def _finish(self) -> None:
        """Let clients score their models, and write results and report."""
        path, entries = self._workspace.results, {}
        if path.is_file() and (done := read_json(path))["rounds"] == self._config.rounds:
            entries = {entry["client"]: entry for entry in done["clients"]}
        unscored: dict[str, str] = {}

        def on_answer(name: str, message: Message) -> None:
            if not isinstance(message.body, Scored):
                unscored[name] = failure(message)
            elif message.body.entry is not None:
                try:
                    entries[name] = checked_entry(message.body.entry, name, takes_files=self._one_machine)
                except MessageError as error:
                    unscored[name] = str(error)

        asked = [name for name in self._here if name not in entries]
        timeout = self._config.nvflare.round_timeout
        unscored |= self._carrier.ask({n: Message(Score()) for n in asked}, timeout=timeout, on_answer=on_answer)
        for name, reason in unscored.items():
            self._note(f"{name}: not scored: {reason}")
        ordered = [entries[client.name] for client in self._config.clients if client.name in entries]
        results = results_of(self._config, ordered)
        write_json(path, results | ({"unscored": unscored} if unscored else {}))
        self._note(f"report: {write_report(self._workspace.path)}")
        self._tell("finished")
