"""Going on in a workspace: which settings may change, who may join or leave later, and from which round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fedcmt.checkpoint import Workspace
from fedcmt.config import FederationConfig, load_config
from fedcmt.data.backend import BackendChoice, resolve_backend
from fedcmt.errors import InputError

# A workspace goes on only with the settings it was made with; these change no result of the rounds already done.
_FREE_TO_CHANGE = {
    "rounds",
    "device",
    "threads",
    "backend",
    "inference",
    "workspace",
    "raw",
    "preprocessed",
    "preprocessing_workers",
    "quarantine_ratio",
    "nvflare",
    "data",  # but not its backend, see patch_backend
}


def first_rounds(config: FederationConfig) -> dict[str, int]:
    """Client -> first round it takes part in."""
    return {client.name: client.joins_at_round for client in config.clients}


def check_same_federation(workspace: Workspace, config: FederationConfig, committed: int | None = None) -> None:
    """Compare a config with the one that a workspace was made with.

    Args:
        workspace: The workspace.
        config: The config now.
        committed: The last finished round where clients are elsewhere: who joins or leaves too late for the configured
            round does so with the next one, since nobody can know what round is under way. None where server and
            clients share the workspace, which then tells, and takes the config by its word.

    Raises:
        InputError: They are of different federations.
    """
    if not workspace.config.is_file():
        return
    earlier = load_config(workspace.config)
    before, now = earlier.model_dump(mode="json"), config.model_dump(mode="json")
    changed = sorted(key for key in now if key not in _FREE_TO_CHANGE and now[key] != before[key])
    if changed == ["clients"]:
        clients: list[dict[str, Any]] = now["clients"]
        if committed is None:
            committed = max(workspace.committed_rounds(first_rounds(earlier)), default=0)
            _check_newcomers(before["clients"], clients, committed)
        else:
            clients = _from_next_round(before["clients"], clients, committed)
        if _same_until(before["clients"], clients, committed):
            return
    if changed:
        raise InputError(
            f"{workspace.path} was made with another '{changed[0]}'",
            field=changed[0],
            fix="use the same settings, another workspace, or --fresh to start over",
        )


def patch_backend(config: FederationConfig, device: torch.device, workspace: Workspace | None) -> BackendChoice:
    """The backend of a federation's patches: chosen once, kept in the workspace, since noise differs between them.

    Raises:
        InputError: The workspace was made with another one.
    """
    kept = "auto"
    if workspace is not None and workspace.config.is_file():
        kept = load_config(workspace.config).data.backend
    wanted = config.data.backend
    if kept != "auto" and wanted not in ("auto", kept):
        raise InputError(
            f"{workspace and workspace.path} was made with backend {kept}, found {wanted}",
            field="data.backend",
            fix=f"use {kept} or auto, another workspace, or --fresh to start over",
        )
    choice = resolve_backend(wanted if kept == "auto" else kept, device)
    return choice if kept == "auto" else BackendChoice(choice.name, "as this federation began")


def go_on(
    workspace: Workspace, rounds: Sequence[int], restore: Callable[[int], None], note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Restore the newest round whose files can be read.

    Args:
        workspace: Whose lines of metrics belong to them.
        rounds: Committed ones, newest first.
        restore: Brings everybody to where they stood after a round.
        note: Shows one line.

    Returns:
        The lines of metrics up to that round; none where no round is committed.

    Raises:
        InputError: Not even the oldest can be read.
    """
    for index, round_index in enumerate(rounds):
        try:
            restore(round_index)
        except InputError as error:
            if index == len(rounds) - 1:
                raise
            note(f"round {round_index} cannot be restored ({error}); trying the one before")
            continue
        note(f"going on after round {round_index}")
        return workspace.read_metrics(round_index)
    return []


def _check_newcomers(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], committed: int) -> None:
    known = {client["name"] for client in before}
    for client in now:
        if client["name"] not in known and client["joins_at_round"] <= committed:
            raise InputError(
                f"round {client['joins_at_round']} is over, {committed} are finished",
                client=client["name"],
                field="joins_at_round",
                fix=f"let it join at round {committed + 1} or later",
            )


def _from_next_round(
    before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], committed: int
) -> list[dict[str, Any]]:
    """A list of clients in which who is new joins, and who leaves early, after the finished rounds at the soonest."""
    known = {client["name"]: client["leaves_after_round"] for client in before}
    clients = []
    for client in now:
        joins, last = client["joins_at_round"], client["leaves_after_round"]
        if client["name"] not in known:
            joins = max(joins, committed + 1)
        elif last is not None and (known[client["name"]] is None or known[client["name"]] >= committed):
            last = max(last, committed)
        clients.append({**client, "joins_at_round": joins, "leaves_after_round": last})
    return clients


def _same_until(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], round_index: int) -> bool:
    """Whether two lists of clients tell the same history up to a round: others may join, and some leave, later."""

    def known(client: Mapping[str, Any]) -> dict[str, Any]:
        last = client["leaves_after_round"]
        past = last if last is not None and last < round_index else None
        return {**client, "leaves_after_round": past}

    def joined(clients: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        here = [known(client) for client in clients if client["joins_at_round"] <= round_index]
        return sorted(here, key=lambda client: str(client["name"]))

    return joined(before) == joined(now)
