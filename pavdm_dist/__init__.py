"""Progressive autoregressive video diffusion (PA-VDM, arXiv 2410.08151) on many machines."""

__version__ = "0.1.0"
