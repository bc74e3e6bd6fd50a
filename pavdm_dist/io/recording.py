"""One video's files, from the first chunk to the sidecar: what is finished stays, and an interrupted one goes on.

While a video is made, ``<output>.parts/`` holds its closed segments (whole mp4 files of ``chunks_per_segment`` chunks),
their latents, a playlist, the lock of who is writing, and the state: the newest point from which a sampler can go on,
the clean latents that it has given since the last closed segment, the checksum and the counts up to there. A resume
drops the open segment, warms a decoder, decodes those latents again into a fresh segment (equal packets, since every
segment begins with a fresh encoder) and samples on from the point: nothing is lost, doubled or torn. At the end come
mp4, latents and sidecar, in this order (a video is complete exactly when its sidecar exists), then the parts go. Who
dies between two of these leaves parts of which a resume says that only the finish is left.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pavdm_dist.errors import MediaError
from pavdm_dist.io import storage
from pavdm_dist.io.latents import LatentsWriter
from pavdm_dist.io.leftovers import (
    SETTINGS,
    check_files,
    check_foreign,
    check_place_is_free,
    holds,
    latents_path,
    recording_facts,
    remove_own,
    state_to_resume,
)
from pavdm_dist.io.lock import OutputLock
from pavdm_dist.io.metadata import Sidecar, is_complete, sidecar_path
from pavdm_dist.io.parts import check_output, parts_folder
from pavdm_dist.io.saver import StateSaver
from pavdm_dist.io.segments import SegmentWriter
from pavdm_dist.io.state import STATE_NAMES, Ledger, Point, RecordingState, write_state

# The state is replaced when a segment closes, and after so long when there is a newer point.
SAVE_SECONDS = 60.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recorded:
    """A complete video: where it is, its frames (the input's included), the checksum of its new latents."""

    output: str
    num_frames: int
    latents_sha256: str


class Recording:
    """One video's files while it is made. Made by :meth:`open`; :meth:`finish` or :meth:`abort` ends it.

    Attributes:
        output: the mp4.
        point: where the sampler goes on; None = from the beginning.
        next_chunk: the chunk that it gives next.
        warm: latents ``[C, n, h, w]`` to warm a decoder on first; None = only what comes before chunk 0.
        pending: by chunk, latents ``[C, c, h, w]`` to decode after that and to write again, before ``next_chunk``.
        complete: all chunks are there, and only :meth:`finish` is left.
        unsaved: after :meth:`abort`, why the newest state could not be written; empty where it was.
    """

    def __init__(
        self,
        output: str,
        lock: OutputLock,
        segments: SegmentWriter,
        latents: LatentsWriter | None,
        state: RecordingState,
        clock: Callable[[], float],
    ) -> None:
        self.output = output
        self.point, self.next_chunk, self.complete = state.point, state.next_chunk, state.complete
        self.warm, self.pending = state.warm, state.pending
        self.unsaved = ""
        self._lock, self._segments, self._latents, self._clock = lock, segments, latents, clock
        self._facts = state.identity
        self._ledger = Ledger(state, segments.closed_chunks)
        self._saver = StateSaver(segments.parts, self._check_lock)
        self._saved_chunk, self._saved_at = state.next_chunk, clock()
        self._chunk_began = clock()

    @classmethod
    def open(
        cls,
        output: str | Path,
        *,
        fps: float,
        height: int,
        width: int,
        identity: Mapping[str, Any],
        chunks_per_segment: int = 6,
        save_latents: bool = False,
        overwrite: bool = False,
        resume: bool = False,
        settings: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Recording:
        """Locks an output and prepares its parts. Remote outputs work, with locking as good as their store allows.

        Args:
            output: the mp4 to make, local or remote.
            fps, height, width, chunks_per_segment: see :class:`~pavdm_dist.io.segments.SegmentWriter`.
            identity: JSON-compatible facts that must be equal for a resume: settings, prompt, seed, weights, versions.
            save_latents: keep the clean latents beside the video.
            overwrite: start anew whatever is there.
            resume: go on with what an interrupted recording left; from the beginning when there is nothing.
            settings: YAML kept in the parts, for a command that is given nothing but this folder.
            clock: seconds, monotonic (tests give their own).

        Raises:
            ConfigError: as :func:`check_recording`; segments without a readable state; a resume with another identity,
                or of a complete video (whose leftover parts are removed); sizes or rates that H.264 can't hold.
        """
        if overwrite and resume:
            raise ValueError("overwrite starts anew, resume goes on: choose one")
        facts = recording_facts(identity, fps, height, width, chunks_per_segment, save_latents)
        output, parts = str(output), parts_folder(output)

        def writers(state: RecordingState | None) -> tuple[SegmentWriter, LatentsWriter | None]:
            found, end = state is not None, state.next_chunk if state is not None and state.complete else None
            segments = SegmentWriter(
                output, fps, height, width, chunks_per_segment, resume=found, num_chunks=end, overwrite=not found
            )
            return segments, LatentsWriter(parts, chunks_per_segment, found, end) if save_latents else None

        check_output(output, overwrite=True)  # what would be an OSError of the lock
        lock = OutputLock.acquire(output)
        try:
            for path in (output, latents_path(output), sidecar_path(output)):
                storage.remove_staged(path)
            check_foreign(output, save_latents)
            if resume and is_complete(output):
                remove_own(parts)
            state = state_to_resume(output, facts, mend=True) if resume else None
            if state is None:
                check_files(output, overwrite, save_latents, resume)
            segments, latents = writers(state)
            if state is not None and not holds(state, segments, latents):
                logger.warning("%s: files of closed segments are gone or damaged, all is made again", parts)
                state, (segments, latents) = None, writers(None)
            if state is None:
                if overwrite:
                    # The sidecar says "complete"; it must not outlive the video it speaks of.
                    storage.remove(sidecar_path(output))
                storage.remove_matching(parts, STATE_NAMES)
                state = RecordingState(facts, replaces=storage.exists(output))
                write_state(parts, state)
            if settings is not None:
                with storage.atomic_write(storage.join(parts, SETTINGS), "w") as file:
                    file.write(settings)
            return cls(output, lock, segments, latents, state, clock)
        except BaseException:
            lock.release()
            storage.remove_empty(parts)
            raise

    def write_input(self, frames: Iterable[Any]) -> None:
        """Takes the frames that come before chunk 0, uint8 ``[height, width, 3]`` each; again after a resume, too.

        Raises:
            ValueError: wrong frames.
            OSError: as :meth:`write`.
        """
        self._lock.check()
        self._segments.write_input(frames)

    def write(self, index: int, frames: Any, latents: Tensor, point: Point | None = None) -> bool:
        """Takes a chunk.

        Args:
            index: 0-based; must be the next one. Older ones, replayed after a resume, are dropped.
            frames: uint8 ``[t, height, width, 3]``, t >= 1, numpy or CPU tensor.
            latents: clean, ``[C, c, h, w]``; not changed later.
            point: where a sampler can go on after this chunk, where it can; not changed later.

        Returns:
            Whether its frames were new.

        Raises:
            ValueError: a chunk is missing in between, or wrong frames or latents.
            OSError: it, or the state of an earlier chunk, cannot be written, or another process has taken the output
                over.
        """
        self._lock.check()
        due = min(self._ledger.num_chunks, self._segments.next_chunk)
        if index > due:
            raise ValueError(f"chunk {index} arrived, {due} is next")
        closed = self._segments.closed_chunks
        new = self._segments.write_chunk(index, frames)
        if self._latents is not None:
            self._latents.write_chunk(index, latents)
        now = self._clock()
        seconds, self._chunk_began = now - self._chunk_began, now
        self._ledger.take(index, latents, seconds, point, self._segments.closed_chunks)
        waited = self._ledger.next_chunk > self._saved_chunk and now - self._saved_at >= SAVE_SECONDS
        if self._segments.closed_chunks > closed or waited:
            self._save()
        return new

    def grown(self, point: Point) -> None:
        """Takes where a sampler can go on before it has given the first chunk of all.

        Raises:
            OSError: as :meth:`write`.
        """
        self._lock.check()
        self._ledger.grown(point)
        if self._clock() - self._saved_at >= SAVE_SECONDS:
            self._save()

    def finish(self, facts: Mapping[str, Any], comment: Mapping[str, Any] | None = None) -> Recorded:
        """Joins what was written into the output; the video is complete when this returns.

        Args:
            facts: of the :class:`~pavdm_dist.io.metadata.Sidecar`, those that only the caller knows.
            comment: stored as compact JSON in the mp4's comment tag.

        Raises:
            ValueError: no chunk was written, or chunks that a resume wants again were not.
            MediaError: what was written of it earlier was damaged since.
            ConfigError: another file has got the name of the video, of its sidecar, or of the latents.
            OSError: as :meth:`write`.
        """
        self._lock.check()
        made = self._ledger.num_chunks
        if not made or self._segments.next_chunk != made:
            raise ValueError(f"{self.output} cannot be finished: chunk {self._segments.next_chunk} is next")
        self._segments.close()
        if self._latents is not None:
            self._latents.close()
            if self._latents.sha256() != self._ledger.latents_sha256:
                raise MediaError(
                    f"output={self.output}: latents in {self._segments.parts} are no longer what was written there;"
                    " pass --overwrite to start anew"
                )
        check_place_is_free(self.output, self._ledger.state)
        self._ledger.complete()
        self._save()
        self._saver.wait()
        check_foreign(self.output, self._latents is not None)
        # Each step may take so long that the lock is lost before the next.
        num_frames = self._segments.join(metadata=comment)
        self._lock.check()
        if self._latents is not None:
            self._latents.join(latents_path(self.output))
            self._lock.check()
        Sidecar(
            **{name: self._facts[name] for name in ("fps", "height", "width")},
            num_frames=num_frames,
            chunk_seconds=[round(seconds, 4) for seconds in self._ledger.chunk_seconds],
            latents_sha256=self._ledger.latents_sha256,
            **facts,
        ).write(self.output)
        self._lock.check()
        try:
            self._remove()
        except OSError as error:  # the video is complete all the same
            logger.warning("%s cannot be removed: %s", self._segments.parts, error)
        finally:
            self._saver.close()
            self._lock.release()
        return Recorded(self.output, num_frames, self._ledger.latents_sha256)

    def abort(self) -> str | None:
        """Leaves what was taken so far playable, with a state to go on from, and gives the output free.

        Never raises for what cannot be written any more (a full disk); :attr:`unsaved` has it.

        Returns:
            Where it is, as a sentence, and what of it is not saved; None when there is nothing to play.
        """
        try:
            if self._lock.lost:  # what is there is another's
                self._segments.drop_open()
                return None
            return self._leave()
        finally:
            self._saver.close()
            self._lock.release()

    def _leave(self) -> str | None:
        left = self._segments.abort()
        begun = left.playlist is not None or self._ledger.next_chunk or self._ledger.state.point is not None
        # Whatever an earlier save could not, this one may be able to: the disk has room again.
        with suppress(Exception):
            self._saver.wait()
        try:
            if begun:
                self._save()
                self._saver.wait()
            else:
                self._remove()
        except Exception as error:
            self.unsaved = str(error) if begun else ""
        behind = f"; its newest state is not saved ({self.unsaved}), it goes on from one before" if self.unsaved else ""
        if left.playlist is None:
            return f"{self.output} is begun, without a frame so far{behind}" if begun else None
        return f"{left.num_frames} frames of {self.output} are playable in {left.playlist}{behind}"

    def _check_lock(self) -> None:
        """What the lock says now, not what it said a moment ago: a thread may have stood still since."""
        if self._lock.lost:
            raise OSError("another process took it over")

    def _save(self) -> None:
        state = self._ledger.state
        self._saver.save(state)
        self._saved_chunk, self._saved_at = state.next_chunk, self._clock()

    def _remove(self) -> None:
        self._saver.wait()
        self._segments.remove()
        remove_own(self._segments.parts)
        self._lock.release()
        storage.remove_empty(self._segments.parts)
