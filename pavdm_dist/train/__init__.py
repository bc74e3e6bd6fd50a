"""Training of the embedded model: the synthetic world, the video codec and the diffusion transformer."""
