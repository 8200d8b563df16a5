"""What is refused on arrival, tensors through NVFlare's serialization, and a trainer process that dies."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

pytest.importorskip("nvflare")

from fedcmt.config import load_config
from fedcmt.engines.messages import Close, Fit, Fitted, Message, MessageError, Score, announce, unpack_header
from fedcmt.engines.nvflare_tensors import Gathering
from fedcmt.engines.nvflare_wire import from_wire, to_shareable
from fedcmt.engines.site_process import Cancelled, TrainerDied, TrainerProcess, receive, send

FIT = Fit(
    round=3,
    after_round=2,
    joins_at_round=1,
    trained=["adaptor"],
    parameters=None,
    sends_decoder=False,
    reply_dtype="float32",
)


def header(**changes: Any) -> str:
    return json.dumps({**json.loads(Message(FIT).header()), **changes})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no header"),
        (b"bytes", "no header"),
        ("x" * 2**25, "too long"),
        ("{", "no message"),
        ("[]", "no message"),
        ("[" * 100_000, "no message"),
        (header(protocol=1), "versions differ"),
        (header(kind="os.system"), "no message"),
        (header(kind=["Fit"]), "no message"),
        (header(body={}), "schema: round"),
        (header(body={**FIT.model_dump(), "more": 1}), "schema: more"),
        (header(body={**FIT.model_dump(), "round": "3"}), "schema: round"),
        (header(body={**FIT.model_dump(), "round": -1}), "schema: round"),
        (header(body={**FIT.model_dump(), "trained": ["head"]}), "schema: trained"),
        (header(tensors={"encoder": {"dtype": "object", "numel": 1, "crc32": 0}}), "schema: dtype"),
        (header(tensors={"encoder": {"dtype": "float32", "numel": -1, "crc32": 0}}), "schema: numel"),
        (header(tensors={"encoder": 5}), "schema"),
        (header(tensors=None), "no message"),
    ],
)
def test_headers_that_do_not_fit_are_refused(text: Any, reason: str) -> None:
    with pytest.raises(MessageError, match=reason):
        unpack_header(text)


def test_a_header_says_all_that_was_said() -> None:
    body, announced = unpack_header(Message(FIT, {"encoder": torch.arange(5.0)}).header())
    assert body == FIT
    assert announced == {"encoder": announce(torch.arange(5.0))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("size", [0, 1, 17, 3_000_001])
def test_tensors_come_through_nvflare_as_they_were(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randint(0, 255, (size,)).to(dtype)
    message = from_wire(to_shareable(Message(FIT, {"encoder": tensor, "adaptor": tensor[:3].clone()})))
    message.check()
    assert torch.equal(message.tensors["encoder"], tensor)
    assert message.body == FIT


def arrived(shareable: Any) -> Any:
    """Pieces as they are gathered from the network."""
    pieces, gathering, result = shareable["DXO"]["data"], Gathering(), None
    for index, piece in enumerate(pieces.values()):
        result = gathering.consume_items([save({f"T{index}": piece.clone()})], result)
    shareable["DXO"]["data"] = dict(zip(pieces, (result or {}).values(), strict=True))
    return shareable


def test_pieces_that_arrive_side_by_side_are_not_copied_again() -> None:
    tensor = torch.randn(3_000_001)
    shareable = arrived(to_shareable(Message(FIT, {"encoder": tensor, "adaptor": torch.ones(16)})))
    first = shareable["DXO"]["data"]["encoder.0"]
    message = from_wire(shareable)
    message.check()
    assert torch.equal(message.tensors["encoder"], tensor)
    assert message.tensors["encoder"].data_ptr() == first.data_ptr()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda pieces: pieces.pop("encoder.1"), "with 786432 of 2250000 float32 values"),
        (lambda pieces: pieces.update({"encoder.0": pieces["encoder.0"].double()}), "arrived with 0 of"),
        (lambda pieces: pieces.update({"encoder.2": torch.ones(2**20)}), "do not make 2250000"),
        (lambda pieces: pieces.update({"encoder.1": torch.empty(0)}), "do not make"),
        (lambda pieces: pieces.update({"encoder.1": torch.Size([0])}), "arrived with"),
        (lambda pieces: pieces["encoder.2"].add_(1), "checksum differs"),
        (lambda pieces: pieces.update({"encoder.0": pieces["encoder.1"].clone()}), "checksum"),
    ],
)
def test_tensors_that_are_not_whole_are_refused(spoil: Any, reason: str) -> None:
    shareable = to_shareable(Message(FIT, {"encoder": torch.randn(2_250_000)}))
    spoil(shareable["DXO"]["data"])
    with pytest.raises(MessageError, match=reason):
        from_wire(shareable).check()


def test_what_is_no_message_of_ours_is_refused() -> None:
    from nvflare.apis.dxo import DXO, DataKind
    from nvflare.apis.shareable import Shareable

    for foreign in (Shareable(), DXO(DataKind.WEIGHTS, {"a": 1}).to_shareable(), Shareable({"DXO": {"data": 5}})):
        with pytest.raises(MessageError):
            from_wire(foreign)


def test_messages_go_through_pipes() -> None:
    source, target = os.pipe()
    tensors = {"encoder": torch.randn(300_000), "adaptor": torch.randn(7).bfloat16()}
    message = Message(Close(round=1, refused=None, parameters=None), tensors)
    with os.fdopen(source, "rb", 0) as incoming, os.fdopen(target, "wb", 0) as outgoing:
        writer = threading.Thread(target=send, args=(outgoing, message))
        writer.start()
        got = receive(incoming)
        writer.join()
    got.check()
    assert got.body == message.body
    assert all(torch.equal(got.tensors[name], tensors[name]) for name in tensors)


TRAINER = """
import os, sys, time
from fedcmt.engines.messages import Fitted, Message
from fedcmt.engines.site_process import receive, send
source, target = os.fdopen(int(sys.argv[1]), "rb", 0), os.fdopen(int(sys.argv[2]), "wb", 0)
source.read(int.from_bytes(source.read(8), "little"))
print("started", flush=True)
while True:
    message = receive(source)
    if message.body.round == 9:
        time.sleep(600)
    if message.body.round == 8:
        os.write(target.fileno(), b"12345")
        os._exit(3)
    send(target, Message(Fitted(round=message.body.round, num_cases=1, went_on_from=0), message.tensors))
"""


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    config = load_config({"name": "one", "clients": [{"name": "a", "dataset": 1, "modality": "CT"}]})
    started = TrainerProcess(config, "a", shares="no", log=tmp_path / "log" / "trainer.log", command=(str(script),))
    yield started
    started.end()


def fit(round_index: int) -> Message:
    return Message(FIT.model_copy(update={"round": round_index}), {"encoder": torch.arange(100_000.0)})


def test_a_trainer_answers(trainer: TrainerProcess, tmp_path: Path) -> None:
    answer = trainer.ask(fit(1))
    answer.check()
    assert isinstance(answer.body, Fitted)
    assert torch.equal(answer.tensors["encoder"], torch.arange(100_000.0))
    assert (tmp_path / "log" / "trainer.log").read_text() == "started\n"


def test_a_trainer_that_is_killed_is_named_so(trainer: TrainerProcess) -> None:
    trainer.ask(fit(1))
    killer = threading.Timer(0.3, os.kill, (trainer.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(TrainerDied, match="killed by SIGKILL"):
        trainer.ask(fit(9))
    with pytest.raises(TrainerDied):
        trainer.ask(fit(1))


def test_a_trainer_that_dies_in_the_middle_of_its_answer(trainer: TrainerProcess) -> None:
    with pytest.raises(TrainerDied, match="exit code 3"):
        trainer.ask(fit(8))


def test_a_trainer_whose_answer_is_not_wanted_any_more_is_ended(trainer: TrainerProcess) -> None:
    trainer.ask(fit(1))
    with pytest.raises(Cancelled):
        trainer.ask(fit(9), lambda: True)
    with pytest.raises(ProcessLookupError):
        os.kill(trainer.pid, 0)


def test_a_trainer_ends_with_its_parent(tmp_path: Path) -> None:
    """The real trainer's watch over its parent, in a process whose parent is killed."""
    script = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import os, time\\n"
        "from fedcmt.engines.site_process import end_with\\nend_with(os.getppid())\\n"
        "print(os.getpid(), flush=True)\\ntime.sleep(600)'], stdout=sys.stdout)\n"
        "time.sleep(600)\n"
    )
    import subprocess
    import time

    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        if (Path(f"/proc/{child}") / "stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.2)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_a_score_carries_no_tensors() -> None:
    assert Message(Score()).nbytes == 0
