"""What stock nnU-Net finds here. It drops modules of this folder from ``sys.modules``: the class lives elsewhere."""

from fedcmt.nnunet_trainer import nnUNetTrainerFedCMT

__all__ = ["nnUNetTrainerFedCMT"]
