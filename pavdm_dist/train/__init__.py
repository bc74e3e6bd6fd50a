"""Training of backbones: the progressive objective, the DeepSpeed trainer, its saves and launchers."""
