"""The conditioning film of ``pavdm sample``: its end, which videos go on from, and what is said about it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.config import SampleConfig
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.picture import kept_share
from pavdm_dist.io.shots import LastShot, last_pictures, last_shot
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.streams import clip_frames_needed, clip_frames_used
from pavdm_dist.values.rates import as_rate

logger = logging.getLogger(__name__)

# Shares of a picture that are cut off without a word: 16:9 is never a multiple of eight on both sides.
_SMALL_LOSS = 0.05
_TOLD = {
    "hdr": "its pictures are HDR: they are brought to the range of SDR, as all frames here",
    "transparent": "its pictures are transparent in parts: they are shown on black",
    "interlaced": "its pictures are interlaced: their fields are not taken apart",
    "perhaps mirrored": "where it is stored mirrored it is shown so: data of an unknown kind hides whether it is",
}


@dataclass(frozen=True)
class Film:
    """What of a film a run takes.

    Attributes:
        clip: uint8 ``[t, H, W, 3]``, the end of its last shot: all that the first new frame can depend on.
        before: what of that shot comes before the clip, picture by picture.
    """

    clip: Tensor
    before: Callable[[], Iterator[np.ndarray]]


def open_film(config: SampleConfig, params: SamplingParams, checkpoint: Checkpoint) -> Film:
    """Reads ``config.video``: with ``include_input`` all of it, in constant memory, else its end alone.

    Raises:
        MediaError: not a film that can be read.
        ConfigError: it is too short.
    """
    assert config.video is not None
    path, rate, size = config.video, as_rate(params.fps), (params.height, params.width)
    used = clip_frames_used(params, checkpoint)
    shot = last_shot(path, rate, None if config.include_input else used)
    found = shot.num_frames(rate)
    legal, fewest = checkpoint.codec_spec.usable_frames(found), clip_frames_needed(params, checkpoint)
    if legal < fewest:
        behind = "" if shot.gap is None else f" behind a gap of {float(shot.gap):.2f} s in its timestamps"
        raise ConfigError(
            f"video={path}: has {legal} usable frames at {params.fps:g} fps{behind}, start={params.start} needs at"
            f" least {fewest}"
        )
    _tell(path, shot, size)
    count = min(legal, used)
    clip = np.stack(list(last_pictures(path, shot, rate, count, size)))
    return Film(torch.from_numpy(clip), lambda: islice(last_pictures(path, shot, rate, legal, size), legal - count))


def _tell(path: str, shot: LastShot, size: tuple[int, int]) -> None:
    """Warns of what is not taken as it is."""
    lost = 1 - float(kept_share((shot.height, shot.width), size))
    if lost > _SMALL_LOSS:
        logger.warning(
            "video=%s is %dx%d (height x width), the run is %dx%d: %.0f %% of its picture is cut off; set height and"
            " width to its shape to keep it",
            path, shot.height, shot.width, *size, 100 * lost,
        )  # fmt: skip
    if shot.gap is not None:
        logger.warning(
            "video=%s: its timestamps have a gap of %.2f s; what lies before it is left out", path, float(shot.gap)
        )
    for remark in shot.remarks:
        logger.warning("video=%s: %s", path, _TOLD[remark])
