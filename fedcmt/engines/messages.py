"""What travels between the server's and the clients' processes: a checked body in JSON, and flat tensors.

Nothing here executes what it reads. A message of an unknown kind, with a body that does not fit its schema, or with
tensors whose names, sizes, types or checksums are not those announced, is refused with a reason.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fedcmt.settings import Name

PROTOCOL = 2
WIRE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "uint8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in WIRE_DTYPES.items()}
_LONGEST_BODY = 16 * 2**20  # bytes of JSON; the scores of 10,000 cases fit
_MOST_ELEMENTS = 2**34

Text = Annotated[str, Field(max_length=2000)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Round = Annotated[int, Field(ge=0, le=1_000_000)]
Dtype = Literal["float32", "bfloat16", "float16", "uint8"]
Part = Literal["encoder", "adaptor", "decoder"]


class MessageError(ValueError):
    """A message that is not what it should be; ``str(error)`` is the reason."""


class Body(BaseModel):
    """Of a message: nothing unknown, nothing converted, no undefined numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Announced(Body):
    """A tensor that comes with the message, or that the receiver holds already."""

    dtype: Dtype
    numel: int = Field(ge=0, le=_MOST_ELEMENTS)
    crc32: int = Field(ge=0, lt=2**32)


class TellShapes(Body):
    """To a client: say what choosing a topology needs."""


class Shapes(Body):
    """From a client: the fields of :class:`fedcmt.exchange.ShapeSummary`."""

    num_cases: int = Field(ge=1)
    spacing: list[float] = Field(min_length=2, max_length=3)
    median_shape: list[int] = Field(min_length=2, max_length=3)


class Prepare(Body):
    """To a client: plan, preprocess and build the network of this contract."""

    topology: dict[str, Any]
    digest: Digest
    starting: bool  # whether it begins now: checkpoints that decoders start from count


class Prepared(Body):
    """From a client: the fields of :class:`fedcmt.exchange.ClientDescription`, and what it would warn of."""

    task: Literal["segmentation", "classification"]
    modality: Annotated[str, Field(pattern=r"^[A-Za-z0-9]{1,16}$")]
    channels: int = Field(ge=1, le=4096)
    num_cases: int = Field(ge=1)
    topology: Digest
    encoder_layout: Digest
    target: Annotated[str, Field(max_length=20_000)]
    outputs: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=10_000)]
    decoder_segments: list[tuple[Text, list[int], int]] | None
    decoder_size: int | None
    notes: list[Text]


class Fit(Body):
    """To a client: train a round.

    Attributes:
        round: 1 for the first.
        after_round: The round after which the client's own state should stand; 0 for its beginning.
        joins_at_round: Its first round.
        trained: Parts that it trains.
        parameters: What it starts from; without tensors where the client holds them; None to go on from its own.
        sends_decoder: Whether its decoder is part of the update.
        reply_dtype: Of the update.
    """

    round: Round
    after_round: Round
    joins_at_round: Round
    trained: list[Part]
    parameters: dict[Part, Announced] | None
    sends_decoder: bool
    reply_dtype: Literal["float32", "bfloat16"]


class Fitted(Body):
    """From a client: its update, in the message's tensors."""

    round: Round
    num_cases: int = Field(ge=1)
    went_on_from: Round  # the round of its own state that it really went on from
    cosine_after_filters: float | None = None  # of the update as sent to the update as learned
    quantized: dict[Part, dict[str, Any]] | None = None


class NotHeld(Body):
    """From a client: send the parameters with the message, they are not here (any more)."""

    round: Round


class Close(Body):
    """To a client: score the server's new parameters, save, and report."""

    round: Round
    refused: Text | None
    parameters: dict[Part, Announced] | None


class Closed(Body):
    """From a client: its line of ``metrics.jsonl``."""

    line: dict[str, Any]


class Score(Body):
    """To a client: predict and score with the model to use."""


class Scored(Body):
    """From a client: its entry of ``results.json``; None where it has no model."""

    entry: dict[str, Any] | None


class Failed(Body):
    """From a client: it could not do it.

    Attributes:
        reason: One line.
        mistake: Whether somebody has to put data or settings right.
    """

    reason: Text
    mistake: bool = False


KINDS: dict[str, type[Body]] = {
    model.__name__: model
    for model in (
        TellShapes, Shapes, Prepare, Prepared, Fit, Fitted, NotHeld, Close, Closed, Score, Scored, Failed
    )
}  # fmt: skip


@dataclass(frozen=True)
class Message:
    """A body with tensors.

    Attributes:
        body: What is said.
        tensors: Flat tensors by name, `[numel]` each.
        announced: What the sender said of each tensor; made here where the message begins.
    """

    body: Body
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    announced: Mapping[str, Announced] | None = None

    def manifest(self) -> Mapping[str, Announced]:
        """What the tensors must be where they arrive."""
        if self.announced is not None:
            return self.announced
        return {name: announce(tensor) for name, tensor in self.tensors.items()}

    def header(self) -> str:
        """The body, and what the tensors must be, as JSON."""
        return json.dumps(
            {
                "protocol": PROTOCOL,
                "kind": type(self.body).__name__,
                "body": self.body.model_dump(mode="json"),
                "tensors": {name: entry.model_dump() for name, entry in self.manifest().items()},
            },
            allow_nan=False,
        )

    def check(self) -> None:
        """Compare the tensors with what was announced.

        Raises:
            MessageError: They differ.
        """
        manifest = self.manifest()
        if set(manifest) != set(self.tensors):
            raise MessageError(f"tensors {sorted(self.tensors)} arrived, {sorted(manifest)} were announced")
        for name, expected in manifest.items():
            check_tensor(name, self.tensors[name], expected)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's bytes, not copied where it is in the computer's own memory."""
    return tensor.detach().cpu().view(torch.uint8).numpy().data


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a contiguous tensor's bytes: about a gigabyte a second, and no flipped or swapped bits go unseen."""
    return zlib.crc32(bytes_of(tensor))


def announce(tensor: Tensor) -> Announced:
    """What a receiver must find."""
    return Announced(dtype=_NAMES[tensor.dtype], numel=tensor.numel(), crc32=checksum(tensor))  # type: ignore[arg-type]


def unpack_header(header: Any) -> tuple[Body, dict[str, Announced]]:
    """Body and announced tensors of a header.

    Raises:
        MessageError: It does not fit the schema.
    """
    if not isinstance(header, str) or len(header) > _LONGEST_BODY:
        raise MessageError("no header, or one that is too long")
    try:
        content = json.loads(header)
        if content["protocol"] != PROTOCOL:
            raise MessageError(f"protocol {str(content['protocol'])[:20]}, expected {PROTOCOL}: versions differ")
        body = KINDS[content["kind"]].model_validate_json(json.dumps(content["body"]))
        return body, {str(name): Announced.model_validate(entry) for name, entry in content["tensors"].items()}
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise MessageError(f"body does not fit the schema: {place}: {first['msg']}"[:500]) from None
    except MessageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MessageError(f"no message of this protocol ({type(error).__name__})") from None


def check_tensor(name: str, tensor: Any, expected: Announced) -> None:
    """Compare a tensor with what was announced.

    Raises:
        MessageError: It differs.
    """
    if not isinstance(tensor, Tensor) or tensor.dim() != 1:
        raise MessageError(f"{name} should be a flat tensor. Got {type(tensor).__name__}.")
    if tensor.dtype != WIRE_DTYPES[expected.dtype] or tensor.numel() != expected.numel:
        raise MessageError(
            f"{name} should be [{expected.numel}] {expected.dtype}. Got {list(tensor.shape)} {tensor.dtype}."
        )
    if checksum(tensor) != expected.crc32:
        raise MessageError(f"{name} was damaged on the way: its checksum differs")


class ClientLine(BaseModel):
    """A client's line of ``metrics.jsonl`` as the server takes it; docs/workspace.md says what the keys mean."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["client"]
    round: int
    client: Name
    group: Text
    task: Literal["segmentation", "classification"]
    phase: Literal["training", "warm-up"]
    validated_on: Text
    num_cases: int
    local_steps: int
    train_loss: float
    learning_rate: float
    update_norm: float | None  # of values that are not finite
    participated: bool
    refused: Text | None = None
    local: dict[str, Any]
    aggregated: dict[str, Any] | None = None
    adopted: dict[str, Any] | None = None
    own_share: float | None = None
    personal: dict[str, Any] | None = None
    personal_steps: int | None = None
    best: dict[str, Any]
    seconds: dict[str, float]


def checked_line(line: Mapping[str, Any], client: str, round_index: int) -> dict[str, Any]:
    """A client's line, if it is one and speaks of this client and round.

    Raises:
        MessageError: It is not.
    """
    try:
        checked = ClientLine.model_validate(dict(line))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise MessageError(
            f"line does not fit the schema: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None
    if (checked.client, checked.round) != (client, round_index):
        raise MessageError(f"line of client {checked.client}, round {checked.round}")
    return dict(line)
