"""Training on all clients' data at once, as if they stood in one place: strategy ``joint``.

The upper reference that a federation is measured against. Clients hold the same encoder, those of a group the same
adaptor, those of equal task and target the same decoder, and one optimizer steps them all. A step takes a batch of each
client, as many steps a round as each would make alone; a tensor's gradient is the mean over the clients that hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import reduce
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from fedcmt.client import Client
from fedcmt.config import ClientConfig
from fedcmt.errors import InputError
from fedcmt.exchange import ClientUpdate, Outgoing
from fedcmt.network import Part
from fedcmt.trainer import Trainer


def check_clients(clients: Sequence[ClientConfig]) -> None:
    """Look whether all clients take part from the first round.

    Raises:
        InputError: One joins later.
    """
    for client in clients:
        if client.joins_at_round > 1:
            raise InputError(
                "strategy 'joint' trains all clients from the first round",
                client=client.name,
                field="joins_at_round",
                fix="leave it out, or use another strategy",
            )


def pool(clients: Sequence[Client]) -> None:
    """Give the clients the same parameters where they are to share them, and one optimizer.

    Running statistics of batch norm stay with each client, as in a federation.
    """
    owners: dict[tuple[Part, Any], Trainer] = {}
    for client in clients:
        keys: dict[Part, Any] = {"encoder": None, "adaptor": client.plan.group, "decoder": _job(client)}
        for part, key in keys.items():
            owner = owners.setdefault((part, key), client.trainer)
            if owner is not client.trainer:
                client.trainer.share(part, owner)
    parameters = {id(p): p for client in clients for p in client.trainer.network.parameters()}
    optimizer = clients[0].trainer.new_optimizer(list(parameters.values()))
    for client in clients:
        client.trainer.optimizer = optimizer


def _job(client: Client) -> tuple[Any, ...]:
    """Equal for clients of equal task and target whose outputs mean the same, in number and order."""
    told, dataset = client.describe(), client.plan.dataset
    outputs = dict(dataset.labels)
    if told.task == "classification":
        outputs = {name: index for index, name in enumerate(dataset.class_names or ())}
    values = tuple(value for name, value in sorted(outputs.items()) if name not in ("background", "ignore"))
    return told.task, told.target, client.plan.num_heads, values


def fit(
    clients: Sequence[Client],
    received: Mapping[str, Outgoing | None],
    round_index: int,
    on_step: Callable[[str, int, int, float], None],
) -> Iterator[ClientUpdate]:
    """A round of the pooled clients.

    Args:
        clients: After :func:`pool`.
        received: Name -> the common start; None after the first round.
        round_index: 1 for the first.
        on_step: Called with client, step, number of steps and loss.

    Yields:
        For each client what training changed, which is the same encoder for all.
    """
    optimizer = clients[0].trainer.optimizer
    with ExitStack() as training:
        for client in clients:
            client.begin(received[client.name])
            training.enter_context(client.trainer.training(round_index, client.steps))
        done = dict.fromkeys(clients, 0)
        for turn in turns([client.steps for client in clients]):
            gradients: dict[Parameter, list[Tensor]] = {}
            for client in [clients[index] for index in turn]:
                loss = client.trainer.gradient()
                for parameter in client.trainer.network.parameters():
                    if parameter.grad is not None:
                        gradients.setdefault(parameter, []).append(parameter.grad)
                        parameter.grad = None
                done[client] += 1
                on_step(client.name, done[client], client.steps, loss)
            for parameter, each in gradients.items():
                # In place, since a step must find the memory order of the parameter.
                parameter.grad = reduce(Tensor.add_, each).div_(len(each))
            optimizer.step()
    for client in clients:
        yield client.finish(client.trainer.fitted(), round_index, received[client.name])


def turns(steps: Sequence[int]) -> Iterator[list[int]]:
    """For each step of a round the indices of those who take part: as often as they have steps, spread evenly."""
    longest = max(steps)
    for step in range(longest):
        yield [i for i, count in enumerate(steps) if (step + 1) * count // longest > step * count // longest]
