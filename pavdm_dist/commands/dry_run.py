"""``pavdm sample --dry-run``: what a command would refuse, do and cost."""

from __future__ import annotations

from typing import Any

from pavdm_dist.commands.plan import plan_report
from pavdm_dist.commands.sample import check_videos
from pavdm_dist.config import SampleConfig
from pavdm_dist.errors import ConfigError


def dry_run(config: SampleConfig, overwrite: bool) -> dict[str, Any]:
    """The plan (:func:`~pavdm_dist.commands.plan.plan_report`) of what would be begun.

    Nothing is computed, and nothing changes but that leftovers of processes that died are cleared away.

    Raises:
        ConfigError: what the command would refuse, or an output that it could not write.
    """
    for video in check_videos(config, overwrite).all:
        if video.error is not None:
            raise ConfigError(f"{video.error}") from video.error
    return plan_report(config, any_length=True)
