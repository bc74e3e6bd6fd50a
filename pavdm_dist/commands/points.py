"""Where a video goes on, as the engine says it and as files hold it."""

from __future__ import annotations

from torch import Tensor

from pavdm_dist.io.recording import Recording
from pavdm_dist.io.state import CLEAN, Point
from pavdm_dist.method.resume import ResumePoint
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
    tensors |= {f"{CLEAN}{chunk}": latents for chunk, latents in snapshot.clean.items()}
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

    def of(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): tensor for n, tensor in point.tensors.items() if n.startswith(prefix)}

    latents = {int(n): tensor for n, tensor in point.tensors.items() if not n.startswith((_LEFT, CLEAN))}
    clean = {int(n): tensor for n, tensor in of(CLEAN).items()}
    exact = frozenset(point.facts["exact_rows"])
    snapshot = WindowSnapshot(point.facts["row"], latents, exact, of(_LEFT), clean)
    undecoded = tuple(CleanChunk(index, latents) for index, latents in sorted(recording.pending.items()))
    prompts = tuple((chunk, prompt) for chunk, prompt in point.facts.get("prompts", ()))
    return ResumePoint(snapshot, recording.warm, undecoded, tuple(point.facts.get("resyncs", ())), prompts)
