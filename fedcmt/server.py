"""The server: sends shared parameters, takes updates, makes the step. Knows no engine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcmt import ops
from fedcmt.errors import InputError, RunError
from fedcmt.exchange import ClientDescription, ClientUpdate, Outgoing
from fedcmt.files import copy_into, read_tensors, write_tensors
from fedcmt.initial_weights import Matched, start_from
from fedcmt.layout import FlatLayout
from fedcmt.network import Part, build_network, parameters_of
from fedcmt.seeding import derive_seed, seeded
from fedcmt.strategies import Strategy
from fedcmt.strategies.base import by_cases
from fedcmt.topology import TopologyContract


class Server:
    """Shared parameters and the round's protocol: ``begin``, ``outgoing``, ``accept`` per update, ``finish``.

    Args:
        strategy: How updates become the next step.
        contract: The topology all clients must agree on.
        clients: Who takes part.
        seed: The federation's seed; gives the common start.
        initial_weights: Tensors that the common start takes where name and shape match; see ``matched``.
        device: Where the shared parameters live.
        backend: Of :mod:`fedcmt.ops`.

    Raises:
        InputError: A client has another topology.
    """

    def __init__(
        self,
        strategy: Strategy,
        contract: TopologyContract,
        clients: Sequence[ClientDescription],
        *,
        seed: int,
        device: torch.device,
        backend: ops.Backend = "auto",
        initial_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._strategy, self._topology, self._device, self._backend = strategy, contract.digest(), device, backend
        self._clients = {client.name: client for client in clients}
        self._keys = {client.name: strategy.adaptor_key(client) for client in clients}
        self.matched: dict[str, Matched] = {}  # encoder and adaptors -> what they took from the initial weights
        start = _Start(contract, seed, device, initial_weights, self.matched)
        self._encoder, layout = start.part(1, "encoder", "encoder")
        for client in clients:
            self._check(client, layout)
        channels = {self._keys[client.name]: client.channels for client in clients}
        self._adaptors = {
            key: start.part(count, "adaptor", f"adaptor {key}")[0] for key, count in sorted(channels.items())
        }
        self._momentum = torch.zeros_like(self._encoder) if strategy.server_momentum > 0 else None
        self.round_index = 0  # the last finished round
        self._begun = 0
        self._accepted: dict[str, ClientUpdate] = {}
        self._refused: dict[str, str] = {}
        self._started = 0.0

    def _check(self, client: ClientDescription, layout: FlatLayout) -> None:
        if client.topology != self._topology or client.encoder_layout != layout.digest():
            raise InputError(
                f"its network differs from the federation's: expected topology {self._topology[:12]}, "
                f"got {client.topology[:12]}",
                client=client.name,
                field="topology",
                fix="give every client the federation's topology",
            )

    def begin(self, round_index: int) -> None:
        """Open a round.

        Raises:
            ValueError: It is not the next one.
        """
        if round_index != self.round_index + 1:
            raise ValueError(f"round should be {self.round_index + 1}, found {round_index}")
        self._begun, self._started = round_index, time.perf_counter()
        self._accepted, self._refused = {}, {}

    def outgoing(self, client: str) -> Outgoing | None:
        """What the client starts from or is scored with; None where nothing is exchanged any more."""
        if not self._strategy.federated and (self._begun > 1 or self.round_index >= 1):
            return None
        return Outgoing(self.round_index, self._encoder, self._adaptors[self._keys[client]])

    def accept(self, update: ClientUpdate) -> str | None:
        """Take an update, or say why not: wrong round, sent twice, wrong size or not finite.

        Returns:
            None, or the reason for refusing it; the client then counts as absent this round.
        """
        reason = self._fault(update)
        if reason is None:
            self._accepted[update.client] = update
        elif update.client not in self._accepted:
            self._refused[update.client] = reason
        return reason

    def _fault(self, update: ClientUpdate) -> str | None:
        if update.client not in self._clients:
            return "not a client of this federation"
        if update.round_index != self._begun:
            return f"update of round {update.round_index} in round {self._begun}"
        if update.client in self._accepted:
            return "second update in this round"
        expected = {"encoder": self._encoder, "adaptor": self._adaptors[self._keys[update.client]]}
        for part, shared in expected.items():
            tensor = getattr(update, part)
            if tensor.shape != shared.shape or tensor.dtype != shared.dtype:
                return f"{part} update is {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(shared.shape)}"
            if not bool(torch.isfinite(tensor).all()):
                return f"{part} update holds values that are not finite"
        return None

    def finish(self) -> dict[str, Any]:
        """Make the step with the accepted updates and close the round.

        Returns:
            The server's line of ``metrics.jsonl``.

        Raises:
            RunError: No update was accepted.
        """
        # The order of the clients' names, whatever order the updates arrived in.
        updates = [self._accepted[name] for name in sorted(self._accepted)]
        if not updates:
            refusals = "; ".join(f"{name}: {reason}" for name, reason in self._refused.items())
            raise RunError(f"round {self._begun}: no update was accepted ({refusals})")
        line = self._summary(updates)
        if self._strategy.federated:
            line |= self._step(updates)
        self.round_index = self._begun
        self._accepted = {}
        return line | {"seconds": time.perf_counter() - self._started}

    def _summary(self, updates: Sequence[ClientUpdate]) -> dict[str, Any]:
        return {
            "kind": "server",
            "round": self._begun,
            "strategy": self._strategy.name,
            "clients": [update.client for update in updates],
            "weights": None,
            "cosines": None,
            "step_norm": None,
            "groups": {},
            "refused": dict(self._refused),
        }

    def _step(self, updates: Sequence[ClientUpdate]) -> dict[str, Any]:
        deltas = [update.encoder for update in updates]
        num_cases = torch.tensor([update.num_cases for update in updates])
        gram = ops.gramian(deltas, backend=self._backend).cpu()
        weights = self._strategy.weights(gram, num_cases)
        stats = ops.server_step(
            self._encoder,
            self._momentum,
            deltas,
            weights,
            backend=self._backend,
            lr=self._strategy.server_learning_rate,
            beta=self._strategy.server_momentum,
        )
        if stats.nonfinite:
            raise RunError(f"round {self._begun}: {stats.nonfinite} values of the combined step are not finite")
        groups = self._step_adaptors(updates)
        return {"weights": weights.tolist(), "cosines": cosines(gram), "step_norm": stats.norm, "groups": groups}

    def _step_adaptors(self, updates: Sequence[ClientUpdate]) -> dict[str, list[str]]:
        groups: dict[str, list[ClientUpdate]] = {}
        for update in updates:
            groups.setdefault(self._keys[update.client], []).append(update)
        for key, members in groups.items():
            share = by_cases(torch.tensor([member.num_cases for member in members]))
            ops.server_step(
                self._adaptors[key], None, [member.adaptor for member in members], share, lr=1.0, backend=self._backend
            )
        return {key: [member.client for member in members] for key, members in groups.items()}

    def _tensors(self) -> dict[str, Tensor]:
        momentum = {} if self._momentum is None else {"momentum": self._momentum}
        return {
            "encoder": self._encoder,
            **momentum,
            **{f"adaptor.{key}": adaptor for key, adaptor in self._adaptors.items()},
        }

    def save(self, path: Path) -> None:
        """Write the state after the last finished round, atomically."""
        write_tensors(
            path,
            self._tensors(),
            {"round": self.round_index, "topology": self._topology, "strategy": self._strategy.name},
        )

    def restore(self, path: Path) -> None:
        """Continue from a saved state.

        Raises:
            InputError: It is damaged or of another federation.
        """
        tensors, facts = read_tensors(path)
        if facts["topology"] != self._topology:
            raise InputError(
                f"{path} holds a federation of another topology",
                field="topology",
                fix="use another workspace, or --fresh to start over",
            )
        copy_into(self._tensors(), {name: t.to(self._device) for name, t in tensors.items()}, source=path)
        self.round_index = self._begun = facts["round"]


def cosines(gram: Tensor) -> list[list[float | None]]:
    """Cosines `[N, N]` of the updates; None where one is zero."""
    lengths = gram.diagonal().clamp_min(0).sqrt()
    table = gram / lengths[:, None] / lengths[None, :]
    return [[float(value) if torch.isfinite(value) else None for value in row] for row in table]


@dataclass(frozen=True)
class _Start:
    """The common start: random numbers from the seed, and the initial weights where they fit."""

    contract: TopologyContract
    seed: int
    device: torch.device
    weights: Mapping[str, Tensor] | None
    matched: dict[str, Matched]

    def part(self, channels: int, part: Part, purpose: str) -> tuple[Tensor, FlatLayout]:
        with seeded(derive_seed(self.seed, purpose=f"initial {purpose}")):
            network = build_network(self.contract.architecture("segmentation"), channels, 2)
        if self.weights is not None:
            self.matched[purpose] = start_from(network, self.weights, [part])
        parameters = parameters_of(network, part)
        layout = FlatLayout.of(parameters.items())
        return layout.bind(parameters, self.device), layout
