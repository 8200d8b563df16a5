"""A client's entry of ``results.json``: what of it leaves the site, and what the server takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcmt.engines.messages import MessageError, Text
from fedcmt.settings import Name

Shares = Literal["no", "scores", "files"]  # of single cases: nothing, names and scores, paths too (one machine)


class Case(BaseModel):
    """One case of an entry; paths are empty where files stay at the site."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    case: Text
    images: list[Text]
    truth: Text | None
    prediction: Text | None
    scores: dict[Text, dict[Text, float | None]] | None = None
    probabilities: dict[Text, float | None] | None = None


class Entry(BaseModel):
    """As docs/workspace.md describes it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    client: Name
    group: Text
    task: Literal["segmentation", "classification"]
    dataset: Text
    modality: Text
    num_channels: int = Field(ge=1)
    score_kind: Literal["test", "validation", "training-site"]
    model: dict[Text, int | float | str | None]
    labels: dict[Text, int | list[int]] | None = None
    class_names: list[Text] | None = None
    cases: list[Case] = Field(max_length=100_000)
    mean: dict[Text, dict[Text, float | None] | float | None]


def shared(entry: Mapping[str, Any], shares: Shares) -> dict[str, Any]:
    """What of an entry may be known beyond the site."""
    if shares == "files":
        return dict(entry)
    return {**entry, "cases": [_without_files(case, entry) for case in entry["cases"]] if shares == "scores" else []}


def _without_files(case: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    files: dict[str, Any] = {"images": []} | (
        {"prediction": None, "truth": None} if entry["task"] == "segmentation" else {}
    )
    return {**case, **files}


def checked_entry(entry: Mapping[str, Any], client: str, *, takes_files: bool) -> dict[str, Any]:
    """A client's entry as the server takes it; paths are taken on one machine only, for they would be read here.

    Raises:
        MessageError: It does not fit the schema or speaks of another client.
    """
    try:
        checked = Entry.model_validate(dict(entry))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise MessageError(f"result does not fit the schema: {place}: {first['msg']}") from None
    if checked.client != client:
        raise MessageError(f"result of client {checked.client}")
    return dict(entry) if takes_files else shared(entry, "scores")
