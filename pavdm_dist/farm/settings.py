"""The settings of a farm: those of all its videos, and how many renderers make them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pavdm_dist.config import PlanConfig, SampleConfig, validate_sample
from pavdm_dist.errors import ConfigError
from pavdm_dist.values.fields import Within

_Wait = Annotated[float, Within(0, 1_000_000)]
# A server's ``chunks_per_segment``, if nobody says another; its folder is a farm's, too.
SERVED_SEGMENT = 1


@dataclass
class PoolConfig:
    """How shots are shared out, and what becomes of those that fail."""

    renderers: Annotated[int, Within(1, 10_000)] | None = None  # at most so many; null = as many as there is room for
    plan: bool = False  # the planner says num_stages, streams and renderers, for cluster.devices
    min_renderers: Annotated[int, Within(0, 10_000)] = 1  # kept though there is nothing to do for them
    idle_s: _Wait = 30.0  # a renderer above the fewest ends when it had nothing to do for so long
    retries: Annotated[int, Within(0, 1000)] = 3  # of a shot whose renderer was lost, or that stood still
    retry_s: _Wait = 5.0  # wait before the first retry; doubled at each one after it
    max_failed: Annotated[int, Within(0)] | None = None  # more failed shots than this end the farm
    poll_s: Annotated[float, Within(0, 3600, above=True)] = 2.0  # between two looks at manifest, markers and locks
    drain_s: _Wait = 60.0  # how long an ending farm waits for the chunks that are under way
    trace: bool = False  # keep when each stage computed what, for the report; grows with the shots: for measurements


@dataclass
class FarmConfig(PlanConfig):
    """Everything ``pavdm farm`` knows: settings that its shots share, the devices at hand, and the pool."""

    farm: PoolConfig = field(default_factory=PoolConfig)


# What every shot, or the manifest, says.
_OF_SHOTS = (
    "prompt",
    "negative_prompt",
    "prompt_schedule",
    "timed_prompts",
    "prompts",
    "video",
    "image",
    "output",
    "trace",
)
# What says where and how shots are rendered, kept and told of: their videos are the same.
_OF_RUNS = (
    "num_stages", "device", "streams", "layers_per_stage", "balance", "backend", "cpus_per_stage", "gpus_per_stage",
    "decoder", "text_device", "text_cache", "threads_per_decoder", "cpus_per_decoder", "gpus_per_decoder",
    "ray_address", "link_timeout_s", "placement_timeout_s", "start_timeout_s", "max_restarts", "restart_backoff_s",
    "recovery", "node_wait_s", "stall_factor", "stall_limit_s", "progress", "chunks_per_segment", "cluster", "farm",
)  # fmt: skip


def validate_farm(config: FarmConfig) -> None:
    """Refuse settings that contradict one another, or that are a shot's alone.

    Raises:
        ConfigError: with the field, its value and what is legal.
    """
    defaults = FarmConfig()
    for name in _OF_SHOTS:
        value = getattr(config, name)
        if value != getattr(defaults, name):
            raise ConfigError(f"{name}={value}: is a shot's own; write it into the manifest")
    validate_sample(config, needs_prompt=False)
    if config.streams > 1 and not config.num_stages:
        raise ConfigError(f"streams={config.streams}: without stages videos are made one after another; set num_stages")
    if config.cluster.chart is not None:
        raise ConfigError(
            f"cluster.chart={config.cluster.chart}: shots of every kind have a plan of their own; pavdm plan draws one"
        )
    if config.cluster.videos != defaults.cluster.videos:
        raise ConfigError(f"cluster.videos={config.cluster.videos}: the manifest says how many; leave it out")
    if config.farm.plan and config.cluster.devices is None:
        raise ConfigError("farm.plan=true: the planner needs to know of devices; set cluster.devices=N")
    if config.farm.plan and (config.farm.renderers is not None or config.layers_per_stage is not None):
        raise ConfigError("farm.plan=true: farm.renderers and layers_per_stage leave nothing to plan; drop one")
    if config.farm.trace and not config.num_stages:
        raise ConfigError("farm.trace=true: without stages there is nothing to trace; set num_stages")
    most, fewest = config.farm.renderers, config.farm.min_renderers
    if not config.num_stages and (most or 1) > 1:
        raise ConfigError(f"farm.renderers={most}: without stages this process is the only one; set num_stages")
    if most is not None and fewest > most:
        raise ConfigError(f"farm.min_renderers={fewest}: is above farm.renderers={most}")


def sample_settings(config: FarmConfig) -> SampleConfig:
    """The settings of videos alone."""
    return SampleConfig(**{entry.name: getattr(config, entry.name) for entry in dataclasses.fields(SampleConfig)})


def of_videos(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a farm's settings, those that its videos depend on: a shot that is rendered with others is another video."""
    return {name: value for name, value in settings.items() if name not in _OF_SHOTS + _OF_RUNS}
