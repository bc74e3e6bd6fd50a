"""From settings to what the rooms below take: the one place where both are named side by side."""

from __future__ import annotations

import logging
from dataclasses import asdict

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.config import SampleConfig
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.io.metadata import cpu_model
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.request import SamplingParams

logger = logging.getLogger(__name__)


def engine_options(config: SampleConfig) -> EngineOptions:
    """How the stages run.

    Raises:
        ConfigError: options that contradict one another.
    """
    return EngineOptions(
        num_stages=config.num_stages,
        layers_per_stage=config.layers_per_stage,
        balance=config.balance,
        compile=config.compile,
        threads_per_stage=config.threads_per_stage,
        cpus_per_stage=config.cpus_per_stage,
        gpus_per_stage=config.gpus_per_stage,
        cpus_per_decoder=config.cpus_per_decoder,
        backend=config.backend,
        link_timeout_s=config.link_timeout_s,
        ray_address=config.ray_address,
        trace_file=config.trace,
    )


def sampling_params(config: SampleConfig, checkpoint: Checkpoint) -> SamplingParams:
    """What is sampled: the settings, and the checkpoint's defaults where they are None.

    Raises:
        ConfigError: an impossible combination, naming the nearest legal values.
    """
    chosen = {name: getattr(config, name) for name in SamplingParams.__dataclass_fields__}
    chosen["displaced"] = Displaced(**asdict(config.displaced))
    params = SamplingParams.resolve(checkpoint, config.allow_untrained_causal, **chosen)
    trained = checkpoint.defaults
    if (params.height, params.width) != (trained.height, trained.width):
        logger.warning(
            "the model was trained at %dx%d (height x width); %dx%d may look wrong",
            trained.height, trained.width, params.height, params.width,
        )  # fmt: skip
    return params


def device_name(options: EngineOptions | None) -> str:
    """Where the sampling computes, for the sidecar: ``options`` of the stages, None = this process."""
    return "cuda" if options is not None and options.device == "cuda" else f"cpu {cpu_model()}"
