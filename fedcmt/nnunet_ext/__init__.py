"""The folder for stock nnU-Net's ``nnUNet_extTrainer``; ``fedcmt doctor`` prints it."""
