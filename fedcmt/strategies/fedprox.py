"""FedProx: local training that stays near what was received (Li et al., MLSys 2020, arXiv 1812.06127)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedcmt.settings import Settings
from fedcmt.strategies.client_work import ClientWork
from fedcmt.strategies.fedavg import AveragingSettings, FedAvg


class FedProxSettings(AveragingSettings):
    """Settings of FedProx."""

    proximal: float = Field(0.01, ge=0, le=1000, description="mu of mu/2 |w - received|^2 in the local loss")


class FedProx(FedAvg):
    """Federated averaging with the proximal term (equation 2) over encoder and adaptor, the parts that are shared."""

    name: ClassVar[str] = "fedprox"
    settings_model: ClassVar[type[Settings]] = FedProxSettings
    settings: FedProxSettings

    @property
    def client_work(self) -> ClientWork:
        """Local training with the proximal term."""
        return ClientWork(proximal=self.settings.proximal)
