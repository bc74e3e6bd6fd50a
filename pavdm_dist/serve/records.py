"""Videos as clients see them: OpenAI's ``video`` object, and how far one is.

A folder may hold videos of farms, made with other settings than this server's: of a complete one its sidecar says what
it is, and not what would become of it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pavdm_dist.engine.order import WHOLE
from pavdm_dist.errors import PAVDMError
from pavdm_dist.farm.desk import Sight
from pavdm_dist.farm.prompts import prompt_of
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.tree import CANCEL, Failure, State
from pavdm_dist.serve.front_desk import FrontDesk
from pavdm_dist.serve.progress import Progress
from pavdm_dist.serve.refusals import no_such_video

# What a client knows of states, by the farm's.
_STATUS = {
    "queued": "queued",
    "begun": "queued",
    "skipped": "queued",
    "running": "in_progress",
    "done": "completed",
    "failed": "failed",
}


def record(desk: FrontDesk, shot: Shot, created_at: int, names: frozenset[str] | None = None) -> dict[str, Any] | None:
    """A video object; None of a deleted one.

    Args:
        desk: where it was asked for.
        shot: what was.
        created_at: when it was asked for, or became known here: seconds since 1970.
        names: of its files, where they are known.
    """
    if CANCEL in names if names is not None else desk.tree.is_marked(shot.id, CANCEL):
        return None
    state = desk.state(shot.id, names)
    if state.standing == "cancelled":
        return None
    sidecar = desk.tree.sidecar(shot.id) if state.standing == "done" else None
    seconds, size = _wanted(desk, shot) if sidecar is None else _made(sidecar)
    completed_at = None if sidecar is None else _timestamp(sidecar.get("created"))
    return {
        "id": shot.id,
        "object": "video",
        "model": desk.model,
        "status": _STATUS[state.standing],
        "progress": _percent(desk, shot, state, seconds),
        # Of a farm's shot it is not known, and this server may have begun later.
        "created_at": created_at if completed_at is None else min(created_at, completed_at),
        "completed_at": completed_at,
        "expires_at": None,
        "prompt": prompt_of(shot, sidecar),
        "remixed_from_video_id": None,
        "seconds": f"{seconds:g}" if seconds else "",
        "size": size,
        "error": None if state.failure is None else _error(desk, shot.id, state.failure),
    }


def _wanted(desk: FrontDesk, shot: Shot) -> tuple[float, str]:
    """Seconds and size of a video as it is asked for; 0 seconds where it was asked for of another model, in an earlier
    life of this folder."""
    try:
        seconds, params = desk.kinds.seconds(shot), desk.kinds.kind_of(shot).params
    except PAVDMError:
        return 0.0, shot.size or ""
    return seconds, f"{params.width}x{params.height}"


def _made(sidecar: Mapping[str, Any]) -> tuple[float, str]:
    """Seconds and size of a complete video."""
    return sidecar["num_frames"] / sidecar["fps"], f"{sidecar['width']}x{sidecar['height']}"


def _error(desk: FrontDesk, id: str, failure: Failure) -> dict[str, str]:
    return {"code": failure.kind, "message": desk.tree.without_places(id, failure.error)}


def one(desk: FrontDesk, id: str, created_at: int) -> dict[str, Any]:
    """The video object of an id.

    Raises:
        Refusal: 404.
    """
    found = record(desk, desk.shot(id), created_at)
    if found is None:
        raise no_such_video(id)
    return found


def timeline(desk: FrontDesk, id: str) -> dict[str, Any]:
    """How far a video is: chunks that are done, those in the window with their noise levels, all; and who does what.

    In one process the next row of the plan is known, and with it the noise levels now. With stages it is that behind
    the newest unit of the video that any stage has finished; ``stages`` says which unit that is of each.

    Raises:
        Refusal: 404.
        ConfigError: it was asked for of another model.
    """
    shot = desk.shot(id)
    params, state, progress = desk.kinds.kind_of(shot).params, desk.state(id), desk.progress(id)
    sidecar = desk.tree.sidecar(id) if state.standing == "done" else None
    total = len((sidecar or {}).get("chunk_seconds") or ()) or desk.num_chunks(shot)
    plan, levels = params.plan(total), params.schedule.levels
    sight = None if progress is None else desk.sight(id)
    row = _row(id, progress, sight, plan.num_rows)
    window: list[dict[str, Any]] = []
    born = total
    if progress is not None and not plan.is_over(row):
        at = plan.row(row)
        born = at.chunks[-1] + 1
        window = [
            {"chunk": chunk, "level": round(levels[left], 4)}
            for chunk, left in zip(at.chunks, at.steps_left, strict=True)
            if progress.chunks <= chunk < total
        ]
    done = total if state.standing == "done" else 0 if progress is None else progress.chunks
    return {
        "id": id,
        "chunks": total,
        "done": done,
        "window": window,
        "row": row,
        "rows": plan.num_rows,
        "prompts": [[0, prompt_of(shot, sidecar)], *_changes(desk, id, sidecar, progress, range(born, total))],
        "seconds_per_chunk": None if progress is None or not progress.seconds else round(progress.seconds[-1], 3),
        "engine": "stages" if desk.split else "one process",
        "awaited": "" if sight is None else sight.at.awaited,
        "decoding": [] if sight is None else list(sight.at.decoding),
        "stages": _stages(desk, id, sight),
    }


def _row(id: str, progress: Progress | None, sight: Sight | None, rows: int) -> int:
    """The row that comes next, as far as is known; behind the last one of a video that is sampled to its end."""
    if progress is None:
        return 0
    if sight is None:
        return progress.row
    own = [unit.row for unit in sight.at.stages if unit is not None and sight.shots.get(unit.stream) == id]
    return min(rows, max(progress.row, sight.at.row, *own))


def _stages(desk: FrontDesk, id: str, sight: Sight | None) -> list[dict[str, Any]]:
    """By stage: its blocks, and the unit that it has finished last, of this video or of another one."""
    units = {} if sight is None else dict(enumerate(sight.at.stages))
    found = []
    for rank, blocks in enumerate(desk.split):
        unit = units.get(rank)
        video = None if unit is None or sight is None else sight.shots.get(unit.stream)
        done = {} if unit is None or video is None else {"row": unit.row, "branch": unit.branch}
        if unit is not None and done and unit.chunk != WHOLE:
            done["chunk"] = unit.chunk
        found.append({"stage": rank, "blocks": list(blocks), "at_work": video == id, "video": video, **done})
    return found


def _changes(
    desk: FrontDesk, id: str, sidecar: Mapping[str, Any] | None, progress: Progress | None, unborn: range
) -> list[list[Any]]:
    """``[first chunk, text]`` of prompts that were changed on the way, or are from a chunk on that is not born yet."""
    if sidecar is not None:
        extra = sidecar.get("extra") or {}
        return [list(change) for change in extra.get("prompt_changes", ())]
    if progress is None:
        return []
    pending = desk.pending_prompts(id, progress.prompts) if unborn else []
    coming = [(max(unborn.start, from_chunk), text) for from_chunk, text in pending]
    return [list(change) for change in (*progress.prompts, *coming)]


def _percent(desk: FrontDesk, shot: Shot, state: State, seconds: float) -> int:
    if state.standing == "done":
        return 100
    if state.standing in ("queued", "skipped") or not seconds:
        return 0
    return min(99, int(100 * desk.tree.seconds_rendered(shot.id) / seconds))


def _timestamp(text: object) -> int | None:
    try:
        return int(datetime.fromisoformat(str(text)).timestamp())
    except ValueError:
        return None
