"""``pavdm farm run --dry-run``: what a manifest would take, from shapes alone; renders nothing and writes nothing.

Of weights it takes the checksum, where a complete or begun shot is to be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.plan import MAX_ROWS, plan_report
from pavdm_dist.config import PlanConfig
from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.begun import check_as_before
from pavdm_dist.farm.kinds import Kind, Kinds
from pavdm_dist.farm.manifest import checked
from pavdm_dist.farm.settings import FarmConfig
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.tree import Tree
from pavdm_dist.method.sampler import num_branches
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.planning.forecast import calls_of
from pavdm_dist.planning.setups import Workload
from pavdm_dist.request.sampling import SamplingParams

# Kinds and lengths that are planned one by one; of more the most frequent ones are.
PLANNED = 8
# Of a plan's report, what says how a shot is rendered and what that takes.
_TOLD = ("chunks", "num_frames", "seconds", "model_calls", "layer_split", "pipeline_utilisation", "useful_stages")
# What a plan says of the time of all its shots together, where there is a cluster.
_TIMES = ("device_hours", "hours")


@dataclass
class _Alike:
    """Shots of one kind and length that are to be rendered.

    Attributes:
        example: one of them.
        rows: steps of the window, of one of them.
        calls: of the model in a guidance branch, of one of them.
        flop: of one of them, in all guidance branches; 0 where nobody asks for times.
        shots: how many.
        left: shots that this is the work of; a half-done one counts with the share of its seconds that is missing.
    """

    example: Shot
    rows: int
    calls: int
    flop: float
    shots: int = 0
    left: float = 0.0


def dry_run(config: FarmConfig, manifest: str | None, out: str) -> dict[str, Any]:
    """Checks a manifest as a run would, and plans the most frequent kinds and lengths of its shots.

    Totals are of all shots that a run would render. Model calls follow from every shot's own window plan. Times and
    cost of what is not planned follow from its FLOP, at the pace of what is.

    Args:
        config: checked; with ``cluster.devices`` the planner says time, memory and cost.
        manifest: None = what the folder keeps.
        out: the folder.

    Raises:
        ConfigError: as :func:`~pavdm_dist.farm.run.run_command`, for bad input.
    """
    tree, kinds = Tree(out), Kinds(config)
    tree.check_writable(traces=config.farm.trace)
    there = tree.scan()
    flop_per_latent = cache(partial(_flop_per_latent, kinds.checkpoint))
    alike: dict[tuple[Any, int], _Alike] = {}
    over = dict.fromkeys(("done", "failed", "skipped", "cancelled"), 0)
    shots, seconds = 0, 0.0

    def check(shot: Shot) -> None:
        kinds.check(shot)
        check_as_before(shot, there.get(shot.id, frozenset()), tree, kinds)

    for shot in _kept(tree, check) if manifest is None else checked(manifest, check):
        shots += 1
        standing = tree.state(shot.id, there.get(shot.id, frozenset())).standing
        if standing in over:
            over[standing] += 1
            continue
        key = kinds.key_of(shot), kinds.frames(shot)
        if key not in alike:
            params = kinds.kind_of(shot).params
            plan = _window_plan(kinds.checkpoint, params, key[1])
            timed = config.cluster.devices is not None
            work = calls_of(params, plan)
            alike[key] = _Alike(
                shot, plan.num_rows, work.calls, work.latents * flop_per_latent(params) if timed else 0.0
            )
        whole = kinds.seconds(shot)
        rendered = tree.seconds_rendered(shot.id) if standing in ("running", "begun") else 0.0
        left = max(0.0, whole - rendered)
        seconds += left
        alike[key].shots += 1
        alike[key].left += left / whole
    if not shots:
        raise ConfigError(f"out={out}: keeps no manifest; name one")
    listed = sorted(alike.items(), key=lambda one: -one[1].shots)[:PLANNED]
    plans = [_planned(config, kinds.kind_of(some.example), key[1], some) for key, some in listed]
    return {
        "shots": shots,
        **over,
        "seconds_of_video": round(seconds, 3),
        "kinds": len(alike),
        **_totals(alike.values(), [some for _, some in listed], plans, config.cluster.price_per_device_hour),
        "plans": plans,
        **({"not_planned": f"{len(alike) - PLANNED} rarer kinds and lengths"} if len(alike) > PLANNED else {}),
    }


def _kept(tree: Tree, check: Callable[[Shot], None]) -> Iterator[Shot]:
    """The shots that a folder's manifests ask for, each checked."""
    for shot in tree.shots(past=False):
        check(shot)
        yield shot


def _window_plan(checkpoint: Checkpoint, params: SamplingParams, frames: int) -> WindowPlan:
    """The window plan of so many new frames."""
    return params.plan(checkpoint.codec_spec.chunks_for_frames(frames, params.latent_chunk_size, params.warm))


def _flop_per_latent(checkpoint: Checkpoint, params: SamplingParams) -> float:
    """What a latent frame costs in a call of a full window, in all guidance branches."""
    costs = Workload(checkpoint, params, params.plan(None)).costs("window", params.widest)
    whole = costs.stage(0, len(costs.blocks)) / (params.widest * params.latent_chunk_size)
    return whole * num_branches(params.guidance_scale)


def _totals(
    alike: Collection[_Alike], listed: Sequence[_Alike], plans: Sequence[dict[str, Any]], price: float
) -> dict[str, Any]:
    """Sums over all shots that are to be rendered; of times and cost where a plan says them.

    Args:
        alike: all.
        listed: those that are planned.
        plans: what is said of each of these.
        price: of a device and hour.
    """
    if not alike:
        return {}
    totals: dict[str, Any] = {"total_model_calls": round(sum(some.calls * some.left for some in alike))}
    timed = [(some, plan) for some, plan in zip(listed, plans, strict=True) if all(name in plan for name in _TIMES)]
    if not timed:
        return totals
    flop = sum(some.flop * some.left for some in alike) - sum(some.flop * some.left for some, _ in timed)
    flop_planned = sum(some.flop * some.shots for some, _ in timed)
    device_hours, hours = (
        sum(plan[name] * some.left / some.shots for some, plan in timed)
        + flop * sum(plan[name] for _, plan in timed) / flop_planned
        for name in _TIMES
    )
    times = {"device_hours": device_hours, "cost": device_hours * price, "hours": hours}
    return totals | {f"total_{name}": round(value, 4) for name, value in times.items()}


def _planned(config: FarmConfig, kind: Kind, frames: int, alike: _Alike) -> dict[str, Any]:
    """What shots of one kind and length take, all together, were each to be rendered from its beginning."""
    cluster = replace(config.cluster, videos=alike.shots) if config.cluster.devices is not None else config.cluster
    settings = {entry.name: getattr(kind.config, entry.name) for entry in dataclasses.fields(kind.config)}
    plan = PlanConfig(**{**settings, "num_frames": frames, "seconds": None, "prompt_schedule": []}, cluster=cluster)
    size = f"{kind.params.width}x{kind.params.height}"
    row: dict[str, Any] = {"shots": alike.shots}
    row |= {"left": round(alike.left, 3)} if alike.left < alike.shots else {}
    row |= {"size": size, "fps": kind.params.fps, "mode": kind.params.mode}
    if alike.rows > MAX_ROWS:
        return {**row, "num_frames": frames, "note": "too long to forecast"}
    report = plan_report(plan)
    row |= {name: report[name] for name in _TOLD}
    if (choice := report.get("cluster", {}).get("choice")) is not None:
        row |= {
            "renderers": choice["replicas"],
            "num_stages": choice["num_stages"],
            "streams": choice["streams"],
            "memory_gib": choice["memory_gib"],
            "hours": float(f"{choice['seconds'] / 3600:.4g}"),
            "device_hours": choice["device_hours"],
            "cost": choice["cost"],
        }
    return row
