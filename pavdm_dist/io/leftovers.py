"""What is there before a video is recorded: files in the way, and what an interrupted recording has left."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pavdm_dist.errors import ConfigError
from pavdm_dist.io import storage
from pavdm_dist.io.differences import changes, differing
from pavdm_dist.io.latents import LATENTS_NAMES, LatentsWriter, holds_latents
from pavdm_dist.io.lock import clear_locks
from pavdm_dist.io.metadata import is_complete, sidecar_path
from pavdm_dist.io.parts import LOCK_NAME, LOCK_NAMES, check_output, parts_folder
from pavdm_dist.io.segments import SEGMENT_NAMES, SegmentWriter
from pavdm_dist.io.state import PREVIOUS, STATE, STATE_NAMES, BegunOtherwiseError, RecordingState, read_state
from pavdm_dist.values.fields import json_value
from pavdm_dist.values.merging import settings_of

# The settings of the command that began a recording.
SETTINGS = "settings.yaml"
_OWN = (SEGMENT_NAMES, LATENTS_NAMES, STATE_NAMES, LOCK_NAMES, re.compile(re.escape(SETTINGS)))
# Bytes of a head that no state exceeds: what is longer is damage.
_LONGEST_HEAD = 100_000_000
_OWN_NAMES = re.compile("|".join(names.pattern for names in _OWN))


def latents_path(output: str | Path) -> str:
    """``clip.mp4`` -> ``clip.safetensors``, in the same folder."""
    return str(output)[: -len(".mp4")] + ".safetensors"


def recording_facts(
    identity: Mapping[str, Any], fps: float, height: int, width: int, chunks_per_segment: int, save_latents: bool
) -> dict[str, Any]:
    """All that must be equal for a recording to be gone on with, as JSON gives it back."""
    shape = {"fps": float(fps), "height": height, "width": width, "chunks_per_segment": chunks_per_segment}
    return json.loads(json.dumps({**identity, **shape, "save_latents": save_latents}))


def remove_own(parts: str) -> None:
    """Removes a recording's files from its parts folder; the lock stays, and what is not its own."""
    storage.remove_matching(parts, _OWN_NAMES, keep=[LOCK_NAME])


def check_files(output: str | Path, overwrite: bool, save_latents: bool, resume: bool = False) -> None:
    """Refuses an output where something would be lost.

    Raises:
        ConfigError: naming the file that is in the way.
    """
    check_output(output, overwrite, parts=not resume)
    if not overwrite and storage.exists(sidecar_path(output)):
        raise ConfigError(f"output={output}: its sidecar {sidecar_path(output)} exists; pass --overwrite")
    if not overwrite and save_latents and storage.exists(latents_path(output)):
        raise ConfigError(f"output={output}: its latents {latents_path(output)} exist; pass --overwrite")


def check_foreign(output: str | Path, save_latents: bool) -> None:
    """Refuses an output beside which a file of somebody else's would be replaced.

    Args:
        output: the mp4.
        save_latents: latents will be written beside it.

    Raises:
        ConfigError: naming that file.
        OSError: one cannot be read.
    """
    path, latents = sidecar_path(output), latents_path(output)
    said = "and is none of this program; choose another name, or move that file"
    if storage.exists(path) and not is_complete(output):
        raise ConfigError(f"output={output}: {path} exists, which is the name of its sidecar, {said}")
    if save_latents and storage.exists(latents) and not holds_latents(latents):
        raise ConfigError(f"output={output}: {latents} exists, which is the name of its latents, {said}")


def check_place_is_free(output: str, state: RecordingState) -> None:
    """Refuses to go on to a name that somebody else has taken since; a joined video of ours has it at the very end.

    Raises:
        ConfigError: they have.
        OSError: it cannot be looked for.
    """
    if state.replaces is False and not state.complete and storage.exists(output):
        raise ConfigError(
            f"output={output}: a file of that name has come there since the video was begun; move it, and the video"
            " goes on"
        )


def state_to_resume(output: str, identity: Mapping[str, Any], mend: bool = False) -> RecordingState | None:
    """The state of an interrupted recording of the same video; None when there is nothing to go on with.

    Args:
        output: the mp4.
        identity: what must be equal.
        mend: as of :func:`~pavdm_dist.io.state.read_state`.

    Raises:
        BegunOtherwiseError: the video was begun otherwise, or by another version.
        ConfigError: it is complete, there is no whole state, or its name was taken meanwhile.
    """
    parts = parts_folder(output)
    if is_complete(output):
        raise ConfigError(f"output={output} is complete: its sidecar {sidecar_path(output)} exists; pass --overwrite")
    try:
        state = read_state(parts, mend)
    except BegunOtherwiseError as error:
        raise BegunOtherwiseError(f"output={output}: {error.begun}", error.advice, error.names) from error
    if state is None:
        if any(SEGMENT_NAMES.fullmatch(name) for name in storage.list_names(parts)):
            raise ConfigError(f"output={output}: {parts} holds no state to go on from; pass --overwrite to start anew")
        return None
    changed = changes(state.identity, identity)
    if changed:
        raise BegunOtherwiseError(
            f"output={output}: {parts} was begun with {changed}",
            "; give the same to go on, or --overwrite; this video alone is begun anew once that folder is removed",
            differing(state.identity, identity),
        )
    check_place_is_free(output, state)
    return state


def settings_begun_with(output: str) -> Mapping[Any, Any]:
    """The settings of the command that began an unfinished video, never none.

    Args:
        output: the mp4.

    Raises:
        ConfigError: there are none, or they cannot be read.
    """
    path = storage.join(parts_folder(output), SETTINGS)
    try:
        if not storage.exists(path):
            raise ConfigError(f"has no {SETTINGS}")
        with storage.open_read(path) as file:
            values = settings_of(file.read(), SETTINGS)
    except OSError as error:
        raise ConfigError(f"{SETTINGS}: not readable ({error.strerror or error})") from error
    if not values:
        raise ConfigError(f"{SETTINGS}: is empty")
    return values


def identity_begun_with(output: str) -> Mapping[str, Any] | None:
    """The facts that an unfinished video was begun with, from the head of its newest state: tensors, which may be
    gigabytes, stay where they are. Changes nothing, and waits for nobody.

    Args:
        output: the mp4.

    Returns:
        What :func:`recording_facts` made of them; None where no state has a head that can be read.
    """
    for name in (STATE, PREVIOUS):
        try:
            with storage.open_read(storage.join(parts_folder(output), name)) as file:
                size = int.from_bytes(file.read(8), "little")
                head = json_value(file.read(min(size, _LONGEST_HEAD)))
            found = json_value(head["__metadata__"]["state"])["identity"]
        except (OSError, ValueError, KeyError, TypeError):  # torn, not ours, or gone
            continue
        return found if isinstance(found, dict) else None
    return None


def holds(state: RecordingState, segments: SegmentWriter, latents: LatentsWriter | None) -> bool:
    """Whether all that the state counts on is still there."""
    closed = segments.closed_chunks if latents is None else min(segments.closed_chunks, latents.closed_chunks)
    return closed >= state.first_to_decode


def check_recording(
    output: str | Path, overwrite: bool = False, save_latents: bool = False, facts: Mapping[str, Any] | None = None
) -> None:
    """Refuses an output that is being written, that would be lost or that can't be written, before any work is done.

    Waits as :func:`~pavdm_dist.io.lock.clear_locks` does.

    Args:
        output: the mp4.
        overwrite: what is there may be replaced.
        save_latents: latents will be written beside it.
        facts: of :func:`recording_facts`: an interrupted recording of these is no obstacle.

    Raises:
        ConfigError: naming the process that is writing, the file that is in the way, or what was different when an
            interrupted recording was begun.
    """
    check_output(output, overwrite=True)  # what would be an OSError of the lock
    clear_locks([output])
    check_foreign(output, save_latents)
    if overwrite or facts is None or state_to_resume(str(output), facts) is None:
        check_files(output, overwrite, save_latents, resume=facts is not None)


def remove_parts(output: str | Path) -> None:
    """Removes what a complete video's recording has left of its own, where nobody writes it.

    Raises:
        ConfigError: somebody does.
    """
    parts = parts_folder(output)
    if storage.list_names(parts):
        clear_locks([output])
        remove_own(parts)
        storage.remove_empty(parts)
