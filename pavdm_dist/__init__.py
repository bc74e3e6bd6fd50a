"""Progressive autoregressive video diffusion (PA-VDM, arXiv 2410.08151) on many machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pavdm_dist.method.levels import NoiseSchedule
    from pavdm_dist.method.schedule import WindowPlan
    from pavdm_dist.pipeline import PAVDMPipeline
    from pavdm_dist.request.sampling import SamplingParams
    from pavdm_dist.request.video_request import VideoRequest

__version__ = "0.1.0"

__all__ = ["NoiseSchedule", "PAVDMPipeline", "SamplingParams", "VideoRequest", "WindowPlan", "__version__"]

_ROOMS = {
    "NoiseSchedule": "method.levels",
    "PAVDMPipeline": "pipeline",
    "SamplingParams": "request.sampling",
    "VideoRequest": "request.video_request",
    "WindowPlan": "method.schedule",
}


def __getattr__(name: str) -> Any:
    """Loads a public name's room at first use, so that ``import pavdm_dist`` costs nothing."""
    if name in _ROOMS:
        from importlib import import_module

        return getattr(import_module(f"pavdm_dist.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'pavdm_dist' has no attribute {name!r}")
