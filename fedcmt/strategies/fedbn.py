"""FedBN: normalisation stays local (Li et al., ICLR 2021, arXiv 2102.07623)."""

from __future__ import annotations

from typing import ClassVar

from fedcmt.strategies.client_work import NORMALISATION, ClientWork
from fedcmt.strategies.fedavg import FedAvg


class FedBN(FedAvg):
    """Federated averaging of everything but normalisation parameters, in encoder and adaptor.

    Clients put their own values into the segments of normalisation after receiving, and send zeros for them; the
    server's step then leaves these segments as they began, and they add nothing to inner products. Running statistics
    of batch norm stay local under every strategy.
    """

    name: ClassVar[str] = "fedbn"

    @property
    def client_work(self) -> ClientWork:
        """Scale and offset of every normalisation stay."""
        return ClientWork(stays_local=NORMALISATION)
