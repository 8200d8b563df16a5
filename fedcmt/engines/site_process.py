"""A client's trainer as a process of its own: whatever kills it costs this client one round and nobody else anything.

Parent and child speak :mod:`fedcmt.engines.messages` over two pipes: a header's length, the header, the tensors' bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fedcmt.config import FederationConfig, load_config
from fedcmt.engines.entries import Shares
from fedcmt.engines.messages import WIRE_DTYPES, Failed, Message, MessageError, bytes_of, unpack_header
from fedcmt.errors import InputError

_LENGTH = struct.Struct("<Q")
_PIPE = 2**20  # bytes; with the usual 64 KiB an update means thousands of changes between processes
_LOOK_AGAIN = 0.2  # seconds between looks at whether the answer is still wanted


class TrainerDied(RuntimeError):
    """The trainer process ended without an answer."""


class Cancelled(RuntimeError):
    """Nobody waits for the answer any more."""


class TrainerProcess:
    """The parent's side.

    Args:
        config: The federation's settings, with the site's own folders and device.
        name: Which client it is.
        shares: See :class:`fedcmt.engines.site.Site`.
        log: File that the process's own output is appended to.
        command: What Python runs.
    """

    def __init__(
        self,
        config: FederationConfig,
        name: str,
        *,
        shares: Shares,
        log: Path,
        command: Sequence[str] = ("-m", __name__),
    ) -> None:
        from_parent, to_child = os.pipe()
        from_child, to_parent = os.pipe()
        for pipe in (to_child, to_parent):
            with suppress(OSError):  # a system with a lower limit keeps its own size
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *command, str(from_parent), str(to_parent)],
                pass_fds=(from_parent, to_parent),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        os.close(from_parent)
        os.close(to_parent)
        self._to, self._from = os.fdopen(to_child, "wb", 0), os.fdopen(from_child, "rb", 0)
        opening = {"config": config.model_dump(mode="json"), "name": name, "shares": shares}
        _write(self._to, json.dumps(opening).encode())

    @property
    def pid(self) -> int:
        """Of the trainer."""
        return self._process.pid

    def ask(self, message: Message, cancelled: Callable[[], bool] = lambda: False) -> Message:
        """Send a message and wait for its answer. Checksums are left to those at both ends of the way.

        Raises:
            TrainerDied: The process ended.
            Cancelled: The answer was no longer wanted; the process has been ended.
        """
        if self._to.closed:
            raise TrainerDied("the trainer process ended before")
        try:
            send(self._to, message)
            while not select.select([self._from], [], [], _LOOK_AGAIN)[0]:
                if cancelled():
                    self.end()
                    raise Cancelled
            return receive(self._from)
        except (OSError, EOFError):
            self.end()
            raise TrainerDied(f"the trainer process ended ({_how(self._process.returncode)})") from None

    def end(self) -> None:
        """End the process at once; what it had saved stands."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._to.close()
        self._from.close()


def _how(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    return f"exit code {returncode}"


def send(stream: BinaryIO, message: Message) -> None:
    """Write a message."""
    _write(stream, message.header().encode())
    for tensor in message.tensors.values():
        _write_all(stream, bytes_of(tensor))


def receive(stream: BinaryIO) -> Message:
    """Read a message; its tensors are checked by whoever uses them.

    Raises:
        EOFError: The other side has closed.
        MessageError: It is no message.
    """
    body, announced = unpack_header(_read(stream).decode())
    tensors: dict[str, Tensor] = {}
    for name, expected in announced.items():
        tensor = torch.empty(expected.numel, dtype=WIRE_DTYPES[expected.dtype])
        _read_into(stream, bytes_of(tensor))
        tensors[name] = tensor
    return Message(body, tensors, announced)


def _write(stream: BinaryIO, content: bytes) -> None:
    _write_all(stream, memoryview(_LENGTH.pack(len(content)) + content))


def _write_all(stream: BinaryIO, view: memoryview) -> None:
    while len(view):
        view = view[stream.write(view) :]


def _read(stream: BinaryIO) -> bytes:
    length = bytearray(_LENGTH.size)
    _read_into(stream, memoryview(length))
    content = bytearray(_LENGTH.unpack(length)[0])
    _read_into(stream, memoryview(content))
    return bytes(content)


def _read_into(stream: Any, view: memoryview) -> None:
    while len(view):
        count = stream.readinto(view)
        if not count:
            raise EOFError
        view = view[count:]


def end_with(parent: int) -> None:
    """End this process when its parent is gone: nobody would read its answer, and it would keep its workspace."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(source: BinaryIO, target: BinaryIO) -> None:
    """The trainer's side: answer until the parent closes."""
    from fedcmt.engines.site import Site  # nnU-Net and all that training needs, which the parent does without

    opening = json.loads(_read(source))
    site: Site | None = None
    mistake: str | None = None
    try:
        site = Site(
            load_config(opening["config"]),
            opening["name"],
            shares=opening["shares"],
            note=lambda text: print(text, flush=True),
        )
    except InputError as error:
        mistake = str(error)
    while True:
        try:
            message = receive(source)
        except EOFError:
            return
        except MessageError as error:
            send(target, Message(Failed(reason=f"refused: {error}")))
            continue
        if site is None:
            send(target, Message(Failed(reason=str(mistake)[:2000], mistake=True)))
        else:
            send(target, site.answer(message))


if __name__ == "__main__":
    end_with(os.getppid())
    main(os.fdopen(int(sys.argv[1]), "rb", 0), os.fdopen(int(sys.argv[2]), "wb", 0))
