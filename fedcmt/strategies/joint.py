"""Centralised training on all clients' data: the upper reference of a federation, and no federation itself."""

from __future__ import annotations

from typing import ClassVar

from fedcmt.strategies.local import Local


class Joint(Local):
    """One encoder, an adaptor a group, a decoder a task and target, and one optimizer for all; see `fedcmt.joint`.

    It moves what a federation keeps apart, so only an engine that holds all clients in its own process runs it.
    """

    name: ClassVar[str] = "joint"
    pooled: ClassVar[bool] = True
