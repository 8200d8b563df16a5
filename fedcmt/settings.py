"""What every group of settings is made of, and the one line that says what is wrong with one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fedcmt.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("should be 1 to 64 letters, digits, '_' or '-', starting with a letter or digit")
    return name


Name = Annotated[str, AfterValidator(_checked_name)]
# Upper bounds are far beyond use; they turn a slip of the keyboard into a line instead of a machine out of memory.
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Width = Annotated[int, Field(ge=1, le=4096)]
Depth = Annotated[int, Field(ge=1, le=16)]
Strides = Annotated[list[Annotated[int, Field(ge=1, le=8)]], Field(min_length=3, max_length=3)]
Kernel = Annotated[list[Annotated[int, Field(ge=1, le=31)]], Field(min_length=3, max_length=3)]
Extent = Annotated[list[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=3, max_length=3)]
Spacing = Annotated[list[Annotated[float, Field(ge=0.01, le=100)]], Field(min_length=3, max_length=3)]


class Settings(BaseModel):
    """A group of settings: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], data: Any, where: str = "") -> Model:
    """Build a settings model or say in one line what is wrong.

    Args:
        model: The pydantic model.
        data: What the user wrote.
        where: Name of the enclosing field, for the message.

    Raises:
        InputError: Names the field, what was found, and for an unknown key the nearest known one.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    location = [str(part) for part in first["loc"]]
    client = _client_name(data, first["loc"])
    field = ".".join([part for part in (where, *location) if part]) or None
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
        raise InputError(
            f"unknown key '{location[-1]}'",
            client=client,
            field=field,
            fix=f"did you mean '{close[0]}'?" if close else None,
        ) from None
    shown = first["type"] != "missing" and not isinstance(first["input"], (dict, list))
    found = f", found {str(first['input'])[:80]!r}" if shown else ""
    raise InputError(first["msg"].removeprefix("Value error, ") + found, client=client, field=field) from None


def _client_name(data: Any, location: Sequence[str | int]) -> str | None:
    if len(location) > 1 and location[0] == "clients" and isinstance(location[1], int):
        entry = data["clients"][location[1]]
        return str(entry["name"])[:80] if isinstance(entry, Mapping) and "name" in entry else f"number {location[1]}"
    return None


def _fields_at(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Names of the fields of the group of settings at a location, within entries of lists too."""
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            inner = [kind for kind in (annotation, *get_args(annotation)) if _is_model(kind)]
            model = inner[0] if inner else model
    return list(model.model_fields)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
