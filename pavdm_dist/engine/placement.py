"""Where the actors of one gang run: one placement group, checked before it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pavdm_dist.cluster.room import Demand, Room, fits
from pavdm_dist.engine.options import EngineOptions

# How long one host that could hold everything may take to have it free, before several are taken.
ONE_HOST_S = 2.0


@dataclass(frozen=True)
class Placement:
    """Where the actors of one gang run.

    Attributes:
        group: the placement group, ready.
        stages: bundle of every stage, in stage order: neighbours share a node wherever they can.
        decoder: bundle of the decode actor.
    """

    group: Any
    stages: list[int]
    decoder: int


def place(options: EngineOptions, given_up: Callable[[], bool] = lambda: False) -> Placement:
    """A place for the stages (and for the decoder, where it has resources of its own).

    On one host where one has room within a moment, else on as few as have room by then. Waits for what is busy, and for
    an autoscaler, up to ``placement_timeout_s``; says once a minute for what.

    Raises:
        ResourcesError: the cluster can never hold it (said at once), or what it needs stays busy.
        EngineError: ``given_up`` turned true.
    """
    from ray.util.placement_group import placement_group_table, remove_placement_group

    bundles = options.bundles()
    demand = Demand(
        f"num_stages={options.num_stages}",
        bundles,
        options.placement_timeout_s,
        "placement_timeout_s",
        "fewer stages, smaller cpus_per_stage or gpus_per_stage",
    )
    room, group = Room(demand, options.ray_address, given_up), None
    # Whether a host is free is Ray's to judge: the totals say only whether it is worth a try.
    if len(room.nodes) > 1 and any(fits(bundles, [node]) for node in room.nodes):
        group = room.group("STRICT_PACK", min(ONE_HOST_S, options.placement_timeout_s / 2))
    group = group or room.group("PACK", options.placement_timeout_s)
    if group is None:
        raise room.refusal()
    try:
        of_bundle = placement_group_table(group)["bundles_to_node_id"]
        stages = stage_order([of_bundle[bundle] for bundle in range(len(bundles))], options.num_stages)
    except BaseException:  # nobody else knows of it yet
        remove_placement_group(group)
        raise
    return Placement(group, stages, len(bundles) - 1 if len(bundles) > len(stages) else stages[-1])


def stage_order(nodes: Sequence[str], num_stages: int) -> list[int]:
    """Bundle of every stage, in stage order: those of a node follow each other, so that most links stay inside one.

    Args:
        nodes: of each bundle: the stages', then the decoder's if it has one. The decoder's node comes last: clean
            chunks are the last stage's.
        num_stages: P.
    """
    met = {node: place for place, node in enumerate(dict.fromkeys(nodes[:num_stages]))}
    decoders = nodes[num_stages:]
    return sorted(range(num_stages), key=lambda bundle: (nodes[bundle] in decoders, met[nodes[bundle]]))


def gpus_of_cluster() -> int:
    """GPUs of the cluster that this process is in, busy or free; 0 where it does not say: only advice depends on it."""
    import ray

    try:
        return int(ray.cluster_resources().get("GPU", 0))
    except ray.exceptions.RayError:
        return 0
