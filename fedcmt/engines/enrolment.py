"""Who takes part: clients connect, agree on the topology and describe themselves, which is kept for the next start."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from pydantic import ValidationError

from fedcmt.checkpoint import Workspace
from fedcmt.config import FederationConfig
from fedcmt.engines.messages import Body, Failed, Message, Prepare, Prepared, Shapes, TellShapes
from fedcmt.errors import InputError, RunError
from fedcmt.exchange import ClientDescription, Membership, ShapeSummary
from fedcmt.files import read_json, write_json
from fedcmt.layout import FlatLayout
from fedcmt.topology import AgreedTopology, TopologyContract

_LOOK_AGAIN = 0.2  # seconds between looks at who is connected


class Carrier(Protocol):
    """Carries messages to the clients and their answers back."""

    def expected(self) -> Sequence[str]:
        """Clients that have been told of this run; no other will ever connect to it."""

    def connected(self) -> Sequence[str]:
        """Clients that can be asked now."""

    def ask(
        self, requests: Mapping[str, Message], *, timeout: float, on_answer: Callable[[str, Message], None]
    ) -> Mapping[str, str]:
        """Ask clients at the same time.

        Args:
            requests: Client -> message.
            timeout: Seconds after which nobody is waited for any more.
            on_answer: Called with client and answer as they arrive, one at a time.

        Returns:
            Why the others gave no answer, by client.
        """

    def ended(self) -> bool:
        """Whether somebody wants the run to end at once."""


class Enrolment:
    """Enrols clients.

    Args:
        config: The federation's settings.
        workspace: The server's.
        carrier: Reaches the clients.
        note: Shows one line to the server's engineer.
        committed: The last finished round.
    """

    def __init__(
        self,
        config: FederationConfig,
        workspace: Workspace,
        carrier: Carrier,
        note: Callable[[str], None],
        committed: int,
    ) -> None:
        self._config, self._workspace, self._carrier, self._note = config, workspace, carrier, note
        self._committed = committed
        self._known: dict[str, dict[str, Any]] = {}
        if committed and workspace.known_clients.is_file():
            self._known = read_json(workspace.known_clients)
        self._settings = {client.name: client for client in config.clients}
        self.absent: dict[str, str] = {}  # client -> why it cannot take part in this job

    def wait(self, quorum: int) -> list[str]:
        """Wait until all clients of the next round that are expected are connected, or for the start timeout.

        Returns:
            Who is.

        Raises:
            RunError: Too few, for the round's quorum.
        """
        wanted = self._config.members(self._committed + 1)
        until = time.monotonic() + self._config.nvflare.start_timeout
        while True:
            here = [name for name in self._carrier.connected() if name in self._settings]
            coming = (wanted & set(self._carrier.expected())) - set(here)
            if not coming or self._carrier.ended() or time.monotonic() > until:
                break
            time.sleep(_LOOK_AGAIN)
        self.absent = dict.fromkeys(sorted(wanted - set(here)), "not connected")
        if len(wanted & set(here)) < quorum:
            raise RunError(
                f"{len(wanted & set(here))} of {len(wanted)} clients are connected, {quorum} are needed; "
                f"missing: {', '.join(self.absent)}"
            )
        return here

    def contract(self, clients: Sequence[str]) -> AgreedTopology:
        """The given topology, the one this workspace began with, or one chosen from what the clients tell."""
        if not self._config.topology.auto:
            return AgreedTopology(TopologyContract.of(self._config.topology), {})
        if self._committed and self._workspace.contract.is_file():
            return AgreedTopology.from_json(self._workspace.contract)
        answers = self._ask(clients, TellShapes(), Shapes)
        told = {
            name: ShapeSummary(shapes.num_cases, tuple(shapes.spacing), tuple(shapes.median_shape))
            for name, shapes in sorted(answers.items())
            if isinstance(shapes, Shapes)
        }
        if not told:
            raise RunError(f"no client told its shapes ({_reasons(self.absent)})")
        contract = TopologyContract.of(self._config.topology, list(told.values()))
        self._note(f"topology chosen: strides {contract.arch_kwargs['strides']}, digest {contract.digest()[:12]}")
        return AgreedTopology(contract, told)

    def prepare(self, clients: Sequence[str], contract: TopologyContract) -> dict[str, ClientDescription]:
        """Let clients plan and preprocess.

        Returns:
            Descriptions of all clients that ever told theirs, those included that are not here now.
        """
        starting = {name: self._joins(name) > self._committed for name in clients}
        digest = contract.digest()
        for begins in (False, True):
            chosen = [name for name in clients if starting[name] == begins]
            body = Prepare(topology=dict(contract.arch_kwargs), digest=digest, starting=begins)
            for name, told in self._ask(chosen, body, Prepared).items():
                assert isinstance(told, Prepared)
                for note in told.notes:
                    self._note(note if note.startswith(f"{name}:") else f"{name}: {note}")
                self._known[name] = {"joins_at_round": self._joins(name), "told": told.model_dump(mode="json")}
        write_json(self._workspace.known_clients, self._known)
        return {name: self._description(name) for name in sorted(self._known) if name in self._settings}

    def _joins(self, name: str) -> int:
        """Its first round: as configured, or the next where it first came later than that."""
        configured = self._settings[name].joins_at_round
        known = self._known.get(name, {}).get("joins_at_round")
        if known is not None and known <= self._committed:
            return int(known)
        return max(configured, self._committed + 1)

    def _description(self, name: str) -> ClientDescription:
        entry = self._known[name]
        membership = replace(self._settings[name].membership, joins_at_round=int(entry["joins_at_round"]))
        try:
            # What was told in JSON went through the strict schema when it arrived.
            return _described(name, Prepared.model_validate(entry["told"], strict=False), membership)
        except (ValidationError, ValueError) as error:
            raise InputError(f"its description is damaged ({type(error).__name__})", client=name) from None

    def _ask(self, clients: Sequence[str], body: Body, expected: type[Body]) -> dict[str, Body]:
        answers: dict[str, Body] = {}

        def on_answer(name: str, message: Message) -> None:
            if isinstance(message.body, expected):
                answers[name] = message.body
            else:
                self.absent[name] = failure(message)
                self._note(f"{name}: {self.absent[name]}")

        requests = {name: Message(body) for name in clients if name not in self.absent}
        missing = self._carrier.ask(requests, timeout=self._config.nvflare.preparation_timeout, on_answer=on_answer)
        for name, reason in missing.items():
            self.absent[name] = reason
            self._note(f"{name}: {reason}")
        return answers


def failure(message: Message) -> str:
    """Why an answer is not the one that was hoped for."""
    if isinstance(message.body, Failed):
        return message.body.reason
    return f"answered {type(message.body).__name__}"


def _described(name: str, told: Prepared, membership: Membership) -> ClientDescription:
    layout = None
    if told.decoder_segments is not None and told.decoder_size is not None:
        layout = FlatLayout.from_rows(told.decoder_segments, told.decoder_size)
    return ClientDescription(
        name,
        told.task,
        told.modality,
        told.channels,
        told.num_cases,
        told.topology,
        told.encoder_layout,
        told.target,
        tuple(told.outputs),
        layout,
        membership,
    )


def _reasons(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
