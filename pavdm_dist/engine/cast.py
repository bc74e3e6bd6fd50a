"""The actors of one generation: placed, loaded, rehearsed and linked together, and given back together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pavdm_dist.cluster.environment import handed_on
from pavdm_dist.codecs.catalog import FrameMaker
from pavdm_dist.engine.blame import DECODER, Actor, control_results, stage_actors
from pavdm_dist.engine.decoding import Decoding
from pavdm_dist.engine.events import Place
from pavdm_dist.engine.lines import Speaker
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.placement import Placement, place
from pavdm_dist.method.stream import Stream
from pavdm_dist.models.source import Source

logger = logging.getLogger(__name__)


class Cast:
    """P stage actors and a decode actor; nobody is there before :meth:`bring_up`.

    Args:
        source: the backbone, which every node opens for itself.
        blocks: block range of each stage.
        options: resources and limits.
        codec: of the decode actor; None makes none.

    Attributes:
        stages: their actors, in stage order.
        places: where these are.
        loops: what each of them computes units in, to be waited for: an end that was not asked for is a loss.
        decoding: the decode actor; None = there is none.
        keep, frames_per_latent: of a decoder (:class:`~pavdm_dist.engine.gang.Gang`).
        placement: what Ray holds for them; None = nothing.
        kernels: of attention, by shape, as all stages use them.
        relative_error: of compiled blocks against plain ones, as the rehearsal found it; None where none are compiled.
    """

    def __init__(
        self,
        source: Source | str,
        blocks: Sequence[tuple[int, int]],
        options: EngineOptions,
        codec: FrameMaker | Source | str | None,
    ) -> None:
        self.stages: list[Any] = []
        self.places: list[Place] = []
        self.loops: list[Any] = []
        self.decoding: Decoding | None = None
        self.keep, self.frames_per_latent = 0, 1
        self.placement: Placement | None = None
        self.kernels: dict[str, str] = {}
        self.relative_error: float | None = None
        self._source, self._blocks, self._options, self._codec = source, list(blocks), options, codec
        self._environment = handed_on()

    def bring_up(
        self, generation: int, given_up: Callable[[], bool], rehearsal: Stream | None, kernels: Mapping[str, str]
    ) -> None:
        """All of them, up to where units can come. After an error :meth:`disband` gives back what is there.

        Args:
            generation: stamped on every message; higher than that of any cast before.
            given_up: asked while actors come up; true ends that.
            rehearsal: what stages run before they are linked (:mod:`pavdm_dist.engine.rehearsal`); None = nothing.
            kernels: that an earlier cast chose, so that bits stay what they were.

        Raises:
            EngineError: not enough resources, or an actor did not come up within ``start_timeout_s``.
        """
        from pavdm_dist.engine.actors import CONCURRENT_CALLS, StageActor

        options, world = self._options, len(self._blocks)
        self.kernels = dict(kernels)
        self.placement = placement = place(options, given_up)
        settings = (options.device, options.threads_per_stage, options.compiled, options.dtype, self._environment)
        for rank, (bundle, blocks) in enumerate(zip(placement.stages, self._blocks, strict=True)):
            resources = (placement.group, bundle, options.cpus_per_stage, options.stage_gpus(rank))
            make = _actor(StageActor, *resources, max_concurrency=CONCURRENT_CALLS)
            self.stages.append(make.remote(self._source, blocks, *settings))
        if self._codec is not None:
            self.decoding = self._new_decoder(placement)
        limit = options.start_timeout_s
        self.places = control_results(
            [stage.where.remote() for stage in self.stages], limit, self.actors, "come up", given_up
        )
        if rehearsal is not None:
            self._rehearse(rehearsal, given_up)
        host, port = self.places[0].node, 0
        if world > 1:
            opened = [self.stages[0].open_store.remote(host)]
            (port,) = control_results(opened, limit, self.actors[:1], "open its store", given_up)
        link = (options.transport, options.link_timeout_s)
        connects = [
            stage.connect.remote(rank, world, host, port, generation, *link) for rank, stage in enumerate(self.stages)
        ]
        control_results(connects, limit, self.actors, "connect to its neighbours", given_up)
        if self.decoding is not None:  # a broken codec is said before anything is sampled
            decoder = [Actor(DECODER)]
            (found,) = control_results([self.decoding.facts], limit, decoder, "come up", given_up)
            self.keep, self.frames_per_latent, _ = found
        self.loops = [stage.run.remote(options.trace) for stage in self.stages]
        logger.info("stages up: %d, blocks %s", world, self._blocks)

    @property
    def actors(self) -> list[Actor]:
        """The stages, for people."""
        return stage_actors(len(self.stages), self.places)

    def speakers(self) -> list[Speaker]:
        """Whose lines are told."""
        stages = [
            Speaker(f"stage {rank} of {len(self.stages)}", rank, stage.said.remote)
            for rank, stage in enumerate(self.stages)
        ]
        return stages if self.decoding is None else [*stages, self.decoding.speaker]

    def renew_decoder(self) -> Decoding:
        """Another decode actor in the place of the one there was."""
        import ray

        assert self.decoding is not None and self.placement is not None
        ray.kill(self.decoding.actor)
        self.decoding = self._new_decoder(self.placement)
        return self.decoding

    def disband(self) -> None:
        """Ends all actors and gives their resources back, as far as the cluster is there; safe to call twice."""
        import ray

        for actor in (*self.stages, *([self.decoding.actor] if self.decoding else [])):
            with suppress(ray.exceptions.RayError, OSError):
                ray.kill(actor)
        self.stages, self.loops, self.decoding = [], [], None
        if self.placement is not None:
            from ray.util.placement_group import remove_placement_group

            with suppress(ray.exceptions.RayError, OSError):
                remove_placement_group(self.placement.group)
            self.placement = None

    def _new_decoder(self, placement: Placement) -> Decoding:
        from pavdm_dist.engine.actors import DecodeActor

        options = self._options
        resources = (placement.group, placement.decoder, options.cpus_per_decoder, options.decoder_gpus)
        make = _actor(DecodeActor, *resources, concurrency_groups={"control": 1})
        settings = (options.decoder_threads, options.decoder_device, options.decoder_dtype, self._environment)
        actor = make.remote(self._codec, *settings, options.trace)
        return Decoding(actor, options.link_timeout_s, options.start_timeout_s, options.trace)

    def _rehearse(self, rehearsal: Stream, given_up: Callable[[], bool]) -> None:
        """All stages at once, before any of them is linked; what each chose by measuring, all use."""
        import ray

        shared, limit = ray.put(rehearsal), self._options.start_timeout_s
        self._use_kernels(given_up)
        calls = [stage.rehearse.remote(shared) for stage in self.stages]
        for found in control_results(calls, limit, self.actors, "rehearse", given_up):
            self.kernels = {**found.kernels, **self.kernels}  # of two the earlier stage's
            if found.relative_error is not None:
                self.relative_error = max(found.relative_error, self.relative_error or 0.0)
        self._use_kernels(given_up)
        logger.info("rehearsed, relative error of compiled blocks %s, kernels %s", self.relative_error, self.kernels)

    def _use_kernels(self, given_up: Callable[[], bool]) -> None:
        if self.kernels:
            told = [stage.use_kernels.remote(self.kernels) for stage in self.stages]
            control_results(told, self._options.start_timeout_s, self.actors, "take kernels over", given_up)


def _actor(cls: type, group: Any, bundle: int, cpus: float, gpus: float, **more: Any) -> Any:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    resources = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "scheduling_strategy": strategy}
    return ray.remote(**resources, **more)(cls)
