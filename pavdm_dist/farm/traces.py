"""When which stage computed what of which shot: kept in a farm's folder where ``farm.trace=true``, read by its report.

traces/TIME-HOST-PID-RENDERER.json         what the stages of one renderer did (:mod:`pavdm_dist.engine.trace`)
traces/TIME-HOST-PID-RENDERER.shots.json   the shots that it names by number
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TypeAlias

from pavdm_dist.engine.trace import read_trace
from pavdm_dist.errors import TraceError
from pavdm_dist.farm.tree import Tree
from pavdm_dist.io.storage import atomic_write, join, list_names, local_copy, open_read
from pavdm_dist.values.fields import json_value

logger = logging.getLogger(__name__)

_SHOTS = ".shots.json"

# By stage, begin and end of every unit, in seconds since the shot's first.
StageTimes: TypeAlias = list[list[tuple[float, float]]]


def trace_path(tree: Tree, renderer: str) -> str:
    """Where a renderer of this process keeps what its stages did."""
    began = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")  # first, so that names are in the order of time
    return tree.path(f"traces/{began}-{platform.node()}-{os.getpid()}-{renderer}.json")


def keep_shots(trace: str, shots: Mapping[int, str]) -> None:
    """Says which shots a trace has, by their numbers in it.

    Raises:
        TraceError: it cannot be written.
    """
    path = trace.removesuffix(".json") + _SHOTS
    try:
        with atomic_write(path, "w") as file:
            json.dump(shots, file)
    except Exception as error:  # stores that are away have errors of kinds of their own
        raise TraceError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


def shot_times(tree: Tree) -> dict[str, StageTimes]:
    """What stages did for each shot that was traced; of one that was rendered in parts what the last renderer did.

    A trace that cannot be read is told of, and left out.
    """
    found: dict[str, StageTimes] = {}
    folder = tree.path("traces")
    for name in sorted(list_names(folder)):
        if not name.endswith(_SHOTS):
            continue
        try:
            with open_read(join(folder, name)) as file:
                shots = {int(number): str(id) for number, id in json_value(file.read()).items()}
            with local_copy(join(folder, name.removesuffix(_SHOTS) + ".json")) as trace:
                stages = read_trace(trace)
        except Exception as error:  # of a store that is away, or of somebody else's file
            logger.warning("%s/%s: %s", folder, name, error)
            continue
        times: dict[str, StageTimes] = {}
        for rank, spans in enumerate(stages):
            for span in spans:
                if (id := shots.get(span.unit.stream)) is not None:
                    of_shot = times.setdefault(id, [[] for _ in stages])
                    of_shot[rank].append((span.start, span.end))
        for id, of_shot in times.items():
            zero = min(start for spans in of_shot for start, _ in spans)
            found[id] = [[(start - zero, end - zero) for start, end in spans] for spans in of_shot]
    return found
