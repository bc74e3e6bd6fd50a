"""``pavdm farm run --dry-run``: what a manifest would take, from shapes alone; reads no weights and writes nothing."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import replace
from typing import Any

from pavdm_dist.commands.plan import MAX_ROWS, plan_report
from pavdm_dist.config import PlanConfig
from pavdm_dist.farm.kinds import Kind, Kinds
from pavdm_dist.farm.manifest import checked
from pavdm_dist.farm.settings import FarmConfig
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.tree import SIDECAR, Tree

# Kinds that are planned one by one; of more the most frequent ones are.
PLANNED = 8
# Of a plan's report, what says how a shot is rendered and what that takes.
_TOLD = ("chunks", "num_frames", "seconds", "model_calls", "layer_split", "pipeline_utilisation", "useful_stages")


def dry_run(config: FarmConfig, manifest: str | None, out: str) -> dict[str, Any]:
    """Checks a manifest as a run would, and plans every kind and length of its shots.

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
    alike: Counter[tuple[Any, int]] = Counter()
    example: dict[tuple[Any, int], Shot] = {}
    shots = done = 0
    seconds = 0.0
    for shot in tree.shots() if manifest is None else checked(manifest, kinds.check):
        shots += 1
        if SIDECAR in there.get(shot.id, frozenset()):
            done += 1
            continue
        seconds += kinds.seconds(shot)
        key = kinds.key_of(shot), kinds.frames(shot)
        alike[key] += 1
        example.setdefault(key, shot)
    plans = [_planned(config, kinds.kind_of(example[key]), key[1], count) for key, count in alike.most_common(PLANNED)]
    totals = {
        name: round(sum(plan[name] * plan["shots"] if name == "model_calls" else plan[name] for plan in plans), 4)
        for name in ("model_calls", "device_hours", "cost", "hours")
        if plans and all(name in plan for plan in plans)
    }
    return {
        "shots": shots,
        "done": done,
        "seconds_of_video": round(seconds, 3),
        "kinds": len(alike),
        **{f"total_{name}": value for name, value in totals.items()},
        "plans": plans,
        **({"not_planned": f"{len(alike) - PLANNED} rarer kinds and lengths"} if len(alike) > PLANNED else {}),
    }


def _planned(config: FarmConfig, kind: Kind, frames: int, shots: int) -> dict[str, Any]:
    """What shots of one kind and length take, all together."""
    cluster = replace(config.cluster, videos=shots) if config.cluster.devices is not None else config.cluster
    settings = {entry.name: getattr(kind.config, entry.name) for entry in dataclasses.fields(kind.config)}
    plan = PlanConfig(**{**settings, "num_frames": frames, "seconds": None, "prompt_schedule": []}, cluster=cluster)
    size = f"{kind.params.width}x{kind.params.height}"
    row: dict[str, Any] = {"shots": shots, "size": size, "fps": kind.params.fps, "mode": kind.params.mode}
    if kind.params.plan(None).steps_per_shift * frames > MAX_ROWS * 100:
        return {**row, "num_frames": frames, "note": "too long to forecast"}
    report = plan_report(plan)
    row |= {name: report[name] for name in _TOLD}
    if (choice := report.get("cluster", {}).get("choice")) is not None:
        row |= {
            "renderers": choice["replicas"],
            "num_stages": choice["num_stages"],
            "streams": choice["streams"],
            "memory_gib": choice["memory_gib"],
            "hours": round(choice["seconds"] / 3600, 4),
            "device_hours": choice["device_hours"],
            "cost": choice["cost"],
        }
    return row
