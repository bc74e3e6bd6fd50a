"""What a user asks for, and what becomes of it: settings, plan, texts, the stream that is sampled, finished chunks."""

from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.video_request import VideoRequest

__all__ = ["SamplingParams", "VideoRequest"]
