"""The curves of ``metrics.jsonl`` for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Curves:
    """Writes lines of ``metrics.jsonl`` as TensorBoard scalars; a context manager.

    Args:
        folder: Where event files go.
        finished_rounds: Rounds done before; what an interrupted run wrote beyond them is hidden.
    """

    def __init__(self, folder: Path, finished_rounds: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=finished_rounds + 1)

    def __enter__(self) -> Curves:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add one round's lines."""
        for line in lines:
            scalars = _server_scalars(line) if line["kind"] == "server" else _client_scalars(line)
            for tag, value in scalars.items():
                if value is not None:
                    self._writer.add_scalar(tag, value, line["round"])
        self._writer.flush()


def _client_scalars(line: Mapping[str, Any]) -> dict[str, float | None]:
    name = line["client"]
    scalars = {
        f"{name}/train_loss": line["train_loss"],
        f"{name}/update_norm": line["update_norm"],
        f"{name}/learning_rate": line["learning_rate"],
    }
    for stage in ("local", "aggregated"):
        if stage in line:
            scalars[f"{name}/{stage}_{line[stage]['metric']}"] = line[stage]["score"]
            scalars[f"{name}/{stage}_loss"] = line[stage]["loss"]
    return scalars


def _server_scalars(line: Mapping[str, Any]) -> dict[str, float | None]:
    return {"server/step_norm": line["step_norm"], "server/clients": len(line["clients"])}
