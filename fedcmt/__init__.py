"""FedCMT: federated learning across modalities and tasks for medical imaging."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedcmt.config import FederationConfig, load_config
    from fedcmt.errors import InputError
    from fedcmt.federation import FederationResult, run_federation

__version__ = "0.1.0"
__all__ = ["FederationConfig", "FederationResult", "InputError", "load_config", "run_federation"]

# Loaded on first use: `import fedcmt` stays quick and needs neither nnU-Net nor the compiled extension.
_HOMES = {"FederationConfig": "config", "load_config": "config", "InputError": "errors",
          "FederationResult": "federation", "run_federation": "federation"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"fedcmt.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fedcmt' has no attribute {name!r}")
