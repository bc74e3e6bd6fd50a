"""From settings to what the rooms below take: the one place where both are named side by side."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from typing import Any

import torch

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.pretrained_text import TextOptions
from pavdm_dist.config import SampleConfig
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.models.source import Adapter, Source
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.planning.unit_size import suited_chunks_per_unit
from pavdm_dist.request.sampling import SamplingParams

logger = logging.getLogger(__name__)

# What to expect of weights that were not trained with the window's staircase of noise levels.
_EXPECTATIONS = {
    "mixed-trained": (
        "the model was trained with clean frames beside noisy ones, not with a staircase of levels: it runs without"
        " further training, with some loss of quality"
    ),
    "accepts": (
        "the model was never trained with different noise levels in one window: expect flicker and drift; finetune"
        " it, use more steps (num_inference_steps), so that neighbours differ less, or partitions=N and lookahead=true,"
        " so that a call sees a part of the levels"
    ),
}

# Methods whose windows hold no staircase: clean chunks beside one level, or one level alone.
_SUITED = {
    "replacement": ("mixed-trained",),
    "autoregressive": ("mixed-trained",),
    "replacement-noise": ("mixed-trained", "accepts"),
}
# What a model call sees of a full window.
_SEEN = {"joint": "window_chunks + context_chunks", "cached": "context_chunks + 1"}


def engine_options(config: SampleConfig) -> EngineOptions:
    """How the stages run.

    Raises:
        ConfigError: options that contradict one another.
    """
    return EngineOptions(
        num_stages=config.num_stages,
        layers_per_stage=config.layers_per_stage,
        balance=config.balance,
        compile=None if config.compile == "auto" else config.compile == "true",
        dtype=config.dtype,
        threads_per_stage=config.threads_per_stage,
        cpus_per_stage=config.cpus_per_stage,
        gpus_per_stage=config.gpus_per_stage or float(config.device == "cuda"),
        decoder=decoder_of_stages(config),
        decoder_dtype=config.decoder_dtype,
        threads_per_decoder=config.threads_per_decoder,
        cpus_per_decoder=config.cpus_per_decoder,
        gpus_per_decoder=config.gpus_per_decoder,
        backend=config.backend,
        link_timeout_s=config.link_timeout_s,
        placement_timeout_s=config.placement_timeout_s,
        start_timeout_s=config.start_timeout_s,
        max_restarts=config.max_restarts,
        restart_backoff_s=config.restart_backoff_s,
        node_wait_s=config.node_wait_s,
        stall_factor=config.stall_factor,
        stall_limit_s=config.stall_limit_s,
        ray_address=config.ray_address,
        trace_file=config.trace,
    )


def decoder_of_stages(config: SampleConfig) -> str:
    """Where chunks from stages are decoded."""
    return "cpu" if config.decoder == "auto" else config.decoder


def open_checkpoint(config: SampleConfig) -> Checkpoint:
    """The model and what changes its weights; reads configuration files only.

    Raises:
        CheckpointError: not a model this package runs, or no LoRA.
    """
    lora = [Adapter(Source.of(entry.model, entry.revision, field="lora"), entry.scale) for entry in config.lora]
    return replace(Checkpoint.open(config.model, config.revision, lora), text=TextOptions.of(config))


def open_pipeline(config: SampleConfig) -> PAVDMPipeline:
    """The model, and where it will run; loads no weights yet.

    Raises:
        CheckpointError: not a model that can be sampled.
        ConfigError: a device that is not there, or options that contradict one another.
    """
    if config.num_stages and config.decoder == "auto" and (config.gpus_per_stage or config.device == "cuda"):
        logger.warning(
            "decoder=auto decodes on CPUs beside stages on GPUs, which a large model waits for; decoder=shared uses the"
            " last stage's GPU, decoder=cuda one more (decoder=cpu says that CPUs are meant)"
        )
    # With stages the decoder is among the engine's options.
    decoder = {} if config.num_stages else {"decoder": config.decoder, "decoder_dtype": config.decoder_dtype}
    return PAVDMPipeline(
        open_checkpoint(config),
        config.num_stages,
        config.threads_per_stage,
        engine_options(config) if config.num_stages else None,
        config.dtype,
        config.device,
        decoder_tile=config.decoder_tile,
        preview_decoder=config.preview_decoder,
        recovery=config.recovery,
        **decoder,
    )


def sampling_params(config: SampleConfig, checkpoint: Checkpoint) -> SamplingParams:
    """What is sampled: the settings, and the checkpoint's defaults where they are None.

    Raises:
        ConfigError: an impossible combination, naming the nearest legal values.
    """
    # Levels are the checkpoint's own affair.
    chosen = {name: getattr(config, name) for name in SamplingParams.__dataclass_fields__ if name != "levels"}
    chosen["displaced"] = Displaced(**asdict(config.displaced))
    params = SamplingParams.resolve(checkpoint, config.allow_untrained_causal, **chosen)
    checkpoint.check_size(params.height, params.width)
    if config.chunks_per_unit is None and _on_gpus(config):
        cells = checkpoint.codec_spec.latent_size(params.height, params.width)
        suited = suited_chunks_per_unit(checkpoint.shape, params, cells, max(config.num_stages, 1), config.streams)
        params = replace(params, chunks_per_unit=suited)
    return params


def check_recovery(config: SampleConfig, params: SamplingParams) -> None:
    """Refuses a ``recovery`` that a command's videos have no use for; shots of a farm may differ in ``context``.

    Raises:
        ConfigError: naming it.
    """
    if config.recovery != "keys" and params.context == "joint":
        raise ConfigError(
            f"recovery={config.recovery}: is for context=cached; with context=joint a video goes on from the latents in"
            " flight, leave it out"
        )


def _on_gpus(config: SampleConfig) -> bool:
    """Whether GPUs sample."""
    if config.num_stages:
        return engine_options(config).device == "cuda"
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def say_what_to_expect(params: SamplingParams, checkpoint: Checkpoint) -> None:
    """Warns of what a model was not trained for; to be said once all is checked, beside no refusal."""
    trained = checkpoint.defaults
    if checkpoint.has_own_size and (params.height, params.width) != (trained.height, trained.width):
        logger.warning(
            "the model was trained at %dx%d (height x width); %dx%d may look wrong",
            trained.height, trained.width, params.height, params.width,
        )  # fmt: skip
    latents = params.span * params.latent_chunk_size
    if trained.trained_latents is not None and latents > trained.trained_latents:
        logger.warning(
            "the model was trained with windows of at most %d latents; %d, (%s) x latent_chunk_size, may look wrong",
            trained.trained_latents, latents,
            _SEEN[params.context] if params.calls_per_row == 1 else "chunks that a call sees",
        )  # fmt: skip
    expectation = _EXPECTATIONS.get(checkpoint.level_support)
    if expectation is not None and checkpoint.level_support not in _SUITED.get(params.method, ()):
        logger.warning("%s", expectation)


def plain_cost(params: SamplingParams, plan: WindowPlan, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a video of another method costs as PA-VDM in whole windows, for one guidance branch.

    {} where it is that, and where such a window would not be legal.
    """
    width = checkpoint.defaults.window_chunks if params.method == "autoregressive" else plan.window_chunks
    # With lookahead the context is what the first call looks at; a whole window has the model's own.
    context = checkpoint.defaults.context_chunks if plan.lookahead else plan.context_chunks
    try:
        plain = replace(
            plan, window_chunks=width, context_chunks=context, partitions=1, lookahead=False, block_chunks=1
        )
    except ConfigError:
        return {}
    if plain == plan:
        return {}
    return {"model_calls": plain.num_calls, "latent_evaluations": plain.latent_evaluations}


def say_cost(params: SamplingParams, plan: WindowPlan, checkpoint: Checkpoint) -> None:
    """Says what a video costs that is not made as published."""
    if params.method == "pavdm" and not plan.is_partitioned:
        return
    plain = plain_cost(params, plan, checkpoint)
    beside = "; method=pavdm in whole windows {model_calls} and {latent_evaluations}".format(**plain) if plain else ""
    logger.info(
        "method=%s, partitions=%d, lookahead=%s: %d model calls and %d latent evaluations a video and guidance"
        " branch%s",
        params.method, plan.partitions, str(plan.lookahead).lower(), plan.num_calls, plan.latent_evaluations, beside,
    )  # fmt: skip
