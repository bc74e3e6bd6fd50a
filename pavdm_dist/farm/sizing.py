"""How many renderers, of how many stages, with how many videos in flight: as the planner says, where it is asked."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace

from pavdm_dist.commands.resolve import decoder_of_stages
from pavdm_dist.config import frames_wanted
from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.farm.manifest import read_shots
from pavdm_dist.farm.settings import FarmConfig, validate_farm
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.tree import CANCEL, FAILED, SIDECAR, SKIP, Tree
from pavdm_dist.models.devices import DTYPES
from pavdm_dist.planning.planner import choose
from pavdm_dist.planning.setups import WORTH

logger = logging.getLogger(__name__)


def count_left(manifest: str | None, tree: Tree, only: Collection[str] | None = None) -> int:
    """How many shots a run would render; checks nothing.

    Args:
        manifest, tree, only: as of :class:`~pavdm_dist.farm.intake.Intake`.

    Raises:
        ConfigError: the manifest, or one that the tree keeps, cannot be read.
    """
    if only is not None:
        return len(only)
    there, over = tree.scan(), {SIDECAR, FAILED, SKIP, CANCEL}
    asked = tree.shots(past=False) if manifest is None else (shot for _, shot in read_shots(manifest))
    return sum(isinstance(shot, Shot) and over.isdisjoint(there.get(shot.id, ())) for shot in asked)


def sized(config: FarmConfig, shots: int) -> FarmConfig:
    """Settings with ``num_stages``, ``streams`` and ``farm.renderers`` of the planner's choice for ``cluster.devices``.

    The mode stays what it is: another would make other videos.

    Args:
        config: checked, with ``farm.plan``.
        shots: how many there are to render, of the length that the settings say.

    Raises:
        ConfigError: nothing fits into the devices' memory.
    """
    kinds = Kinds(config)
    params, spec = kinds.base.params, kinds.checkpoint.codec_spec
    frames = frames_wanted(kinds.base.config, params.fps)
    plan = params.plan(spec.chunks_for_frames(frames, params.latent_chunk_size, params.warm))
    cluster = replace(config.cluster, videos=max(1, shots), chart=None)
    dtype = kinds.checkpoint.dtype if config.dtype == "auto" else DTYPES[config.dtype]
    _, setups, _ = choose(
        kinds.checkpoint, params, plan, cluster, dtype, decoder_of_stages(config), DTYPES[config.decoder_dtype],
        config.preview_decoder,
    )  # fmt: skip
    mine = [setup for setup in setups if setup.mode == params.mode]
    best = mine[0]
    for setup in mine[1:]:
        if setup.seconds * WORTH < best.seconds:
            best = setup
    logger.info(
        "%d shots on %d devices: %d renderer(s) of %d stage(s), %d video(s) in flight each, about %.2f hours",
        shots, cluster.devices or 1, best.replicas, best.num_stages, best.streams, best.seconds / 3600,
    )  # fmt: skip
    fewest = min(config.farm.min_renderers, best.replicas)
    pool = replace(config.farm, plan=False, renderers=best.replicas, min_renderers=fewest)
    chosen = replace(config, num_stages=best.num_stages, streams=best.streams, farm=pool)
    validate_farm(chosen)
    return chosen
