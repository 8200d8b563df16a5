"""One setting changed from the command line: ``--set key.path=value``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from fedcmt.errors import InputError

_EVERY_CLIENT = "clients.*."


def apply_override(data: dict[str, Any], override: str) -> None:
    """Change a setting in place.

    Args:
        data: A configuration as read from YAML.
        override: ``key.path=value``, the value in YAML; a list entry is named by its number or its name.

    Raises:
        InputError: It is no setting, or names no entry.
    """
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise InputError(f"'{override}' is no setting", field="--set", fix="write --set key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"the value of '{override}' is no valid YAML", field="--set") from None
    node: Any = data
    if path.startswith(_EVERY_CLIENT) and isinstance(data.get("clients"), list):
        for index in range(len(data["clients"])):
            apply_override(data, override.replace("*", str(index), 1))
        return
    *parents, last = path.split(".")
    for key in parents:
        node = _step_into(node, key, override)
    if isinstance(node, list):
        node[_list_index(node, last, override)] = value
    else:
        node[last] = value


def _step_into(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, key, override)]
    child = node.setdefault(key, {})
    if key == "strategy" and isinstance(child, str):
        child = node[key] = {"name": child}
    if key == "topology" and child == "auto":
        child = node[key] = {"auto": True}
    if not isinstance(child, (dict, list)):
        raise InputError(f"'{key}' in '{override}' has no settings below it", field="--set")
    return child


def _list_index(entries: list[Any], key: str, override: str) -> int:
    for index, entry in enumerate(entries):
        if key == str(index) or (isinstance(entry, Mapping) and entry.get("name") == key):
            return index
    raise InputError(f"'{override}' names no entry '{key}'", field="--set")
