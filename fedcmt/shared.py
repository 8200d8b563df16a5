"""What the server holds: encoders with their optimizers' states, adaptors and, where they travel, decoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fedcmt import ops
from fedcmt.exchange import ClientDescription, ClientUpdate
from fedcmt.files import copy_into
from fedcmt.initial_weights import Matched, start_from
from fedcmt.layout import FlatLayout
from fedcmt.network import Part, build_network, parameters_of
from fedcmt.ops import StepStats
from fedcmt.seeding import derive_seed, seeded
from fedcmt.strategies import Strategy
from fedcmt.strategies.base import Combination, DecoderRound, ServerOptimizer
from fedcmt.strategies.matching import matched_mean
from fedcmt.topology import TopologyContract


@dataclass(frozen=True)
class EncoderState:
    """An encoder and the state of its server optimizer, each `[P]`."""

    params: Tensor
    momentum: Tensor | None
    second: Tensor | None


class SharedParts:
    """The parameters that clients share, and the steps that change them.

    Args:
        strategy: Says who shares what, and how updates are combined.
        contract: The topology.
        clients: All clients, later ones too.
        seed: Gives the common start.
        device: Where the parameters live.
        backend: Of :mod:`fedcmt.ops`.
        initial_weights: Tensors that the common start takes where name and shape match.

    Attributes:
        matched: Encoder and adaptors -> what they took from the initial weights.
    """

    def __init__(
        self,
        strategy: Strategy,
        contract: TopologyContract,
        clients: Sequence[ClientDescription],
        *,
        seed: int,
        device: torch.device,
        backend: ops.Backend,
        initial_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._strategy, self._device, self._backend = strategy, device, backend
        self._clients = {client.name: client for client in clients}
        self.encoder_keys = {client.name: strategy.encoder_key(client) for client in clients}
        self.adaptor_keys = {client.name: strategy.adaptor_key(client) for client in clients}
        self._decoder_keys = {client.name: strategy.decoder_key(client) for client in clients}
        self.matched: dict[str, Matched] = {}
        common = _Start(contract, seed, device, initial_weights, self.matched)
        start, self.layout = common.part(1, "encoder", "encoder")
        self._segments = strategy.segments(self.layout)
        optimizer = strategy.server_optimizer(1, 1)
        self._encoders = {
            key: EncoderState(
                ops.copy_buffer(start),
                ops.zero_buffer(start) if optimizer.beta > 0 else None,
                ops.zero_buffer(start) if optimizer.has_second_moment else None,
            )
            for key in sorted(set(self.encoder_keys.values()))
        }
        channels = {self.adaptor_keys[client.name]: client.channels for client in clients}
        initial = common.adaptors(channels)
        self._adaptors = {key: adaptor for key, (adaptor, _) in initial.items()}
        self._adaptor_layouts = {key: layout for key, (_, layout) in initial.items()}
        self._decoders: dict[str, Tensor] = {}
        self._kept: Tensor | None = None  # the direction that the strategy wants inner products with, [P]
        self.trained_encoders: set[str] = set()  # keys that a counted update has reached
        self.trained_adaptors: set[str] = set()

    def encoder(self, client: str) -> Tensor:
        """The client's encoder, `[P]`."""
        return self._encoders[self.encoder_keys[client]].params

    def adaptor(self, client: str) -> Tensor:
        """The client's adaptor, `[A]`."""
        return self._adaptors[self.adaptor_keys[client]]

    def decoder(self, client: str) -> Tensor | None:
        """The decoder that the client gets back, `[D]`."""
        return self._decoders.get(client)

    def welcome(self, client: ClientDescription) -> None:
        """Starting parameters of a client that joins a running federation.

        An encoder that nobody has trained becomes the mean of those that somebody has; an adaptor, if the client wants
        that, the one of most cases that has the same shape. The decoder is the one that it will share, if it will.
        """
        own_key = self._decoder_keys[client.name]
        common = next((self._decoders[name] for name in self._decoders if self._decoder_keys[name] == own_key), None)
        if common is not None:
            self._decoders[client.name] = common.clone()
        key = self.encoder_keys[client.name]
        trained = [self._encoders[other].params for other in sorted(self.trained_encoders)]
        if key not in self.trained_encoders and trained:
            mean = ops.weighted_mean(trained, torch.ones(len(trained)), backend=self._backend)
            assert isinstance(mean, Tensor)
            self._encoders[key].params.copy_(mean)
        key = self.adaptor_keys[client.name]
        if key not in self.trained_adaptors and client.membership.starting_adaptor == "nearest":
            own = self._adaptors[key]
            near = [other for other in sorted(self.trained_adaptors) if self._adaptors[other].shape == own.shape]
            if near:
                own.copy_(self._adaptors[max(near, key=self._cases_behind)])

    def _cases_behind(self, adaptor_key: str) -> int:
        return sum(self._clients[name].num_cases for name, key in self.adaptor_keys.items() if key == adaptor_key)

    def grow_gram(self, gram: Tensor | None, deltas: Sequence[Tensor], delta: Tensor) -> Tensor:
        """The Gram matrix with one more update, by segment where the strategy has segments."""
        return ops.gramian_append(gram, deltas, delta, segments=self._segments, backend=self._backend)

    def along_kept(self, gram: Tensor, deltas: Sequence[Tensor]) -> Tensor | None:
        """Inner products of the updates with the kept direction, `[N]` float64."""
        if self._kept is None:
            return None
        return ops.gramian_append(gram, deltas, self._kept, backend=self._backend)[-1, :-1].cpu()

    def step_encoders(
        self,
        targets: Sequence[str],
        deltas: Sequence[Tensor],
        combination: Combination,
        optimizer: ServerOptimizer,
        gram: Tensor,
    ) -> list[StepStats]:
        """Mix the encoders, then make the server optimizer's step on each.

        Args:
            targets: Keys of the encoders, M.
            deltas: Updates, N of `[P]`.
            combination: What the strategy says.
            optimizer: Of this round.
            gram: Of the updates.
        """
        states = [self._encoders[key] for key in targets]
        if combination.mixing is not None:
            self._mix([state.params for state in states], combination.mixing)
        stats: list[StepStats] = ops.server_step(
            [state.params for state in states],
            [state.momentum for state in states] if optimizer.beta > 0 else None,
            deltas,
            combination.weights if len(states) > 1 else combination.weights.reshape(1, *gram.shape[:-1]),
            lr=optimizer.lr,
            beta=optimizer.beta,
            optimizer=optimizer.optimizer,
            second=[s.second for s in states if s.second is not None] if optimizer.has_second_moment else None,
            beta2=optimizer.beta2,
            epsilon=optimizer.epsilon,
            max_norm=optimizer.max_norm,
            gram=gram if optimizer.max_norm is not None else None,
            segments=self._segments,
            backend=self._backend,
        )
        if combination.kept is not None:
            self._kept = ops.zero_buffer(states[0].params)
            ops.server_step(self._kept, None, deltas, combination.kept, lr=1.0, backend=self._backend)
        return stats

    def _mix(self, params: Sequence[Tensor], mixing: Tensor) -> None:
        """phi_i <- phi_i + sum_j (W - I)_ij phi_j, which leaves encoders that share with nobody as they are."""
        eye = torch.eye(len(params), dtype=torch.float64)
        difference = mixing - (eye if mixing.dim() == 2 else eye[:, None])
        if bool(difference.any()):
            before = [ops.copy_buffer(tensor) for tensor in params]
            ops.server_step(
                list(params), None, before, difference, lr=1.0, segments=self._segments, backend=self._backend
            )

    def step_adaptors(self, updates: Sequence[ClientUpdate]) -> dict[str, list[str]]:
        """Add the mean update of those who share an adaptor, by cases.

        Returns:
            Who shared which.
        """
        groups: dict[str, list[str]] = {}
        for update in updates:
            groups.setdefault(self.adaptor_keys[update.client], []).append(update.client)
        masks = [[update.client in members for update in updates] for members in groups.values()]
        cases = {update.client: update.num_cases for update in updates}
        means = ops.weighted_mean(
            [update.adaptor for update in updates], list(cases.values()), masks, backend=self._backend
        )
        for key, mean in zip(groups, means, strict=True):
            self._adaptors[key].add_(mean)
        if self._strategy.matches_adaptors:
            shares = {key: sum(cases[name] for name in groups.get(key, [])) for key in self._adaptors}
            for key, adaptor in matched_mean(self._adaptors, self._adaptor_layouts, shares).items():
                self._adaptors[key].copy_(adaptor)
        return groups

    def step_decoders(self, updates: Sequence[ClientUpdate], warming: Sequence[ClientUpdate]) -> None:
        """Combine the decoders, where they travel; clients that are warming up go on from their own."""
        for update in warming:
            if update.decoder is not None:
                self._decoders[update.client] = self._began(update) + update.decoder
        changes = {update.client: update.decoder for update in updates if update.decoder is not None}
        if changes:
            clients = tuple(self._clients[name] for name in changes)
            starts = {update.client: self._began(update) for update in updates if update.client in changes}
            combined = self._strategy.combine_decoders(DecoderRound(clients, starts, changes))
            shared = {self._decoder_keys[name]: decoder for name, decoder in combined.items()}
            own = combined.keys() | {update.client for update in warming}
            absent = [name for name in self._decoders if name not in own and self._decoder_keys[name] in shared]
            self._decoders |= combined | {name: shared[self._decoder_keys[name]].clone() for name in absent}

    def _began(self, update: ClientUpdate) -> Tensor:
        start = self._decoders.get(update.client, update.decoder_start)
        assert start is not None  # the server refuses updates without it
        return start

    def tensors(self) -> dict[str, Tensor]:
        """All that must be remembered, by name; writing into a tensor changes the part."""
        named = {f"strategy.{key}": value for key, value in self._strategy.state().items()}
        for key, state in self._encoders.items():
            parts = {"encoder": state.params, "momentum": state.momentum, "second": state.second}
            named |= {f"{part}.{key}": tensor for part, tensor in parts.items() if tensor is not None}
        named |= {f"adaptor.{key}": adaptor for key, adaptor in self._adaptors.items()}
        named |= {f"decoder.{name}": decoder for name, decoder in self._decoders.items()}
        return named if self._kept is None else named | {"kept": self._kept}

    def restore(self, saved: Mapping[str, Tensor], round_index: int, *, source: Path) -> None:
        """Continue from :meth:`tensors` after a round. Parts of clients that had not joined yet may be missing.

        Raises:
            InputError: Names or shapes differ.
        """
        tensors = {name: tensor.to(self._device) for name, tensor in saved.items()}
        self._strategy.restore(_taken(tensors, "strategy."))
        self._decoders = _taken(tensors, "decoder.")
        self._kept = tensors.pop("kept", None)
        own = {k: v for k, v in self.tensors().items() if k.partition(".")[0] in _OWN}
        coming = self._coming_keys(round_index)
        copy_into({k: v for k, v in own.items() if k in tensors or k not in coming}, tensors, source=source)

    def _coming_keys(self, round_index: int) -> set[str]:
        """Names of the parts of those who join after a round and of nobody else."""
        here = [c.name for c in self._clients.values() if c.membership.joins_at_round <= round_index]
        encoders = set(self._encoders) - {self.encoder_keys[name] for name in here}
        adaptors = set(self._adaptors) - {self.adaptor_keys[name] for name in here}
        names = {f"{part}.{key}" for part in ("encoder", "momentum", "second") for key in encoders}
        return names | {f"adaptor.{key}" for key in adaptors}


_OWN = ("encoder", "momentum", "second", "adaptor")


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the tensors of a prefix out of a mapping, the prefix removed."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


@dataclass(frozen=True)
class _Start:
    """The common start: random numbers from the seed, and the initial weights where they fit."""

    contract: TopologyContract
    seed: int
    device: torch.device
    weights: Mapping[str, Tensor] | None
    matched: dict[str, Matched]

    def part(self, channels: int, part: Part, purpose: str) -> tuple[Tensor, FlatLayout]:
        return self._bound(self._network(channels, purpose), part, purpose)

    def adaptors(self, channels: Mapping[str, int]) -> dict[str, tuple[Tensor, FlatLayout]]:
        """Adaptors by key for these numbers of channels, each treating its first channel as all others do, and so on.

        So one encoder finds features in the same places whatever modality they come from.
        """
        widest = max(channels.values(), default=0)
        alike = [parameters_of(self._network(1, f"adaptor channel {c}"), "adaptor") for c in range(widest)]
        started = {}
        for key, count in sorted(channels.items()):
            network = self._network(count, f"adaptor {key}")
            for name, value in parameters_of(network, "adaptor").items():
                if value.dim() > 1:  # a convolution, [out, in, ...], as strong for many channels as for one
                    value.data.copy_(torch.cat([one[name] for one in alike[:count]], 1) / count**0.5)
            started[key] = self._bound(network, "adaptor", f"adaptor {key}")
        return started

    def _network(self, channels: int, purpose: str) -> nn.Module:
        with seeded(derive_seed(self.seed, purpose=f"initial {purpose}")):
            return build_network(self.contract.architecture("segmentation"), channels, 2)

    def _bound(self, network: nn.Module, part: Part, purpose: str) -> tuple[Tensor, FlatLayout]:
        if self.weights is not None:
            self.matched[purpose] = start_from(network, self.weights, [part])
        parameters = parameters_of(network, part)
        layout = FlatLayout.of(parameters.items())
        return layout.bind(parameters, self.device), layout
