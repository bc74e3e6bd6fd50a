"""Where a video goes on, as the engine says it and as files hold it."""

from __future__ import annotations

from pavdm_dist.io.recording import Recording
from pavdm_dist.io.state import Point
from pavdm_dist.method.stream import ResumePoint
from pavdm_dist.method.window import CleanChunk, WindowSnapshot

# Before the names of saved keys and values among a point's tensors.
_LEFT = "left."


def saved_point(resume: ResumePoint | None) -> Point | None:
    """A resume point as files hold it."""
    if resume is None:
        return None
    snapshot = resume.snapshot
    tensors = {str(index): latents for index, latents in snapshot.latents.items()}
    tensors |= {f"{_LEFT}{name}": tensor for name, tensor in snapshot.left.items()}
    return Point(
        tensors,
        {
            "row": snapshot.row,
            "exact_rows": sorted(snapshot.exact_rows),
            "resyncs": list(resume.resyncs),
            "prompts": [list(change) for change in resume.prompts],
        },
        resume.warm,
    )


def resume_point(recording: Recording) -> ResumePoint | None:
    """Where a recording says that its video goes on; None = at the beginning."""
    point = recording.point
    if point is None:
        return None
    latents = {int(index): tensor for index, tensor in point.tensors.items() if not index.startswith(_LEFT)}
    left = {n.removeprefix(_LEFT): tensor for n, tensor in point.tensors.items() if n.startswith(_LEFT)}
    snapshot = WindowSnapshot(point.facts["row"], latents, frozenset(point.facts["exact_rows"]), left)
    undecoded = tuple(CleanChunk(index, latents) for index, latents in sorted(recording.pending.items()))
    prompts = tuple((chunk, prompt) for chunk, prompt in point.facts.get("prompts", ()))
    return ResumePoint(snapshot, recording.warm, undecoded, tuple(point.facts.get("resyncs", ())), prompts)
