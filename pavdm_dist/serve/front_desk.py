"""A server's videos: those that were asked for, how far those under way are, and a farm's pool that renders them.

What lasts is in the farm's folder: a shot is there once its manifest is, and what became of it follows from its files.
This object holds what does not. A server that is started again on the same folder reads it and goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import fields

from pavdm_dist.errors import ConfigError, PAVDMError
from pavdm_dist.farm.desk import Ended, Listener, Sight
from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.farm.logs import ShotLog
from pavdm_dist.farm.pool import Pool
from pavdm_dist.farm.settings import FarmConfig
from pavdm_dist.farm.shot import Shot, is_id
from pavdm_dist.farm.tree import CANCEL, FAILED, SIDECAR, SKIP, State, Tree
from pavdm_dist.io.metadata import versions
from pavdm_dist.io.storage import list_names
from pavdm_dist.request.outputs import VideoChunk
from pavdm_dist.request.running import TooLateError
from pavdm_dist.serve.asked import created_at, manifest_name, manifests_of
from pavdm_dist.serve.bounds import check_bounds
from pavdm_dist.serve.changes import Change, Changes
from pavdm_dist.serve.progress import Followed, Progress
from pavdm_dist.serve.refusals import Refusal, no_such_video
from pavdm_dist.serve.removals import Removals
from pavdm_dist.serve.settings import ServeConfig
from pavdm_dist.values.merging import to_dict

logger = logging.getLogger(__name__)

# Between two looks of the pool after its renderers and markers; and after no renderer came up, time after time.
_TICK_S, _TROUBLE_S = 1.0, 30.0
# Between two attempts at files of deleted videos that somebody is writing.
_SWEEP_S = 10.0
# A client that is to come again is told when the next video may be finished, within these bounds.
_RETRY_LEAST_S, _RETRY_MOST_S = 1, 600
# Files without one of which no video is over.
_ENDS = frozenset((SIDECAR, FAILED, CANCEL, SKIP))


class FrontDesk(Listener):
    """Takes videos, has them rendered, and lets them be watched and ended. Called from any thread.

    Args:
        config: checked (:func:`~pavdm_dist.serve.settings.validate_serve`).
        kinds: settings of its shots.
        tree: its folder.

    Attributes:
        closing: no more videos are taken or begun: the server is told to end, or its pool has ended by itself.
        trouble: why no renderer comes up, or the pool has ended; empty while that is not so.
        counts: see above.
        model: name that clients know the model by.
        split: range of blocks of each stage; none where this process samples alone.
    """

    def __init__(self, config: ServeConfig, kinds: Kinds, tree: Tree) -> None:
        self.config, self.kinds, self.tree = config, kinds, tree
        self.closing, self.trouble = False, ""
        self._followed = Followed()
        self.counts = self._followed.counts
        self.model = config.model.rstrip("/").rpartition("/")[2] if config.model.startswith("/") else config.model
        pipeline = kinds.pipeline()
        self.split = [] if pipeline.engine is None else pipeline.split(kinds.base.params)
        self._log = ShotLog()
        self._pool = Pool(kinds, tree, self, self._log, endless=True)
        self._changes = Changes(tree, self._pool.set_prompt)
        self._turn = threading.RLock()
        self._removals, self._swept = Removals(tree), 0.0
        self._reserved = 0  # videos whose manifests are being written
        self._stamp = 0  # of the newest one
        self._shots: dict[str, Shot] = {}
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="pavdm-desk", daemon=True)

    # --- its life ----------------------------------------------------------------------------------------------

    def open(self) -> int:
        """Reads the folder, queues what is unfinished there and brings the renderers up; how many videos wait.

        Raises:
            PAVDMError: no cluster, weights that cannot be read, or a damaged manifest.
            OSError: the folder cannot be written.
        """
        there, unfinished = self.tree.scan(), list[Shot]()
        known = {shot.id: shot for shot in self.tree.shots(past=False)}
        self._removals.finish(there, known)
        for shot in known.values():
            if CANCEL in there.get(shot.id, ()):
                continue
            self._shots[shot.id] = shot
            if self.tree.state(shot.id, there.get(shot.id, frozenset())).standing in ("queued", "begun", "running"):
                unfinished.append(shot)
        self._pool.open()
        shared = {entry.name: getattr(self.config, entry.name) for entry in fields(FarmConfig)}
        settings = to_dict(FarmConfig(**shared))
        self.tree.write_settings({"settings": settings, "manifest": None, "versions": versions()})
        with suppress(PAVDMError):  # what checks need is loaded now, and not while the first client waits
            self.kinds.check(Shot("warm-up", "a"))
        logging.getLogger("pavdm_dist").addHandler(self._log)
        self._pool.submit(unfinished)
        self._ticker.start()
        return len(unfinished)

    def close(self) -> None:
        """Finishes the chunks that are under way, saves every video and ends the renderers. Safe to call twice."""
        self.closing = True
        if self._ticker.is_alive():
            self._pool.drain()
            self._ticker.join()
        self._pool.close()
        logging.getLogger("pavdm_dist").removeHandler(self._log)

    def _tick(self) -> None:
        while not self._pool.is_over:
            wait = self._look_after()
            end = time.monotonic() + wait
            while not self._pool.is_over and (left := end - time.monotonic()) > 0:
                self._pool.wait(min(left, _TICK_S))
                if self.closing:
                    break

        # Nobody renders any more: what waits goes on when a server, or a farm, is started on the folder.
        self.trouble, self.closing = self._pool.ended_by, True

    def _look_after(self) -> float:
        """One look of the pool; seconds until the next."""
        if time.monotonic() - self._swept > _SWEEP_S:
            self._forget(self._removals.sweep())
            self._swept = time.monotonic()
        wait, trouble = _TICK_S, ""
        try:
            self._pool.tick()
        except PAVDMError as error:  # a cluster that is away may come back
            wait, trouble = _TROUBLE_S, " ".join(str(error).split())
            logger.error("%s; tried again in %.0f s", trouble, wait)
        except Exception as error:  # whatever it is, what waits must not be forgotten
            wait, trouble = _TROUBLE_S, f"a fault of the server ({type(error).__name__}); its log says more"
            logger.exception("a fault of this program; tried again in %.0f s", wait)
        self.trouble = self._pool.ended_by or trouble
        self.closing = self.closing or bool(self._pool.ended_by)
        return wait

    # --- what clients ask for ----------------------------------------------------------------------------------

    def check(self, shot: Shot) -> None:
        """Refuses what cannot be rendered.

        Raises:
            ConfigError: naming the field, its value and what is legal.
        """
        check_bounds(shot, self.kinds, self.config.http)
        self.kinds.check(shot)

    def check_room(self) -> None:
        """Refuses a video more where too many wait.

        Raises:
            Refusal: 429, with the time after which one may be finished; or 503 while the server ends.
        """
        if self.closing:
            why = f": {self.trouble}" if self.trouble else ""
            raise Refusal(503, f"the server is ending{why}", "closing", {"Retry-After": "30"})
        unfinished, most = self.unfinished, self.config.http.max_queue
        if unfinished >= most:
            self.counts.refused += 1
            seconds = str(self.retry_after())
            message = (
                f"{unfinished} videos are unfinished, as many as may be (http.max_queue); try again in {seconds} s"
            )
            raise Refusal(429, message, "queue_full", {"Retry-After": seconds})

    def retry_after(self) -> int:
        """Seconds after which the next video may be finished, by those that are under way."""
        left = [_RETRY_MOST_S]
        for id, progress in self._followed.under_way().items():
            if progress.seconds and (shot := self._shots.get(id)) is not None:
                pace = sum(progress.seconds) / len(progress.seconds)
                left.append(round(pace * max(1, self.num_chunks(shot) - progress.chunks)))
        return max(_RETRY_LEAST_S, min(left))

    def submit(self, shot: Shot) -> None:
        """Keeps a video and queues it; once this returns, no restart loses it.

        Args:
            shot: checked.

        Raises:
            Refusal: as :meth:`check_room`.
            OSError: the folder cannot be written.
        """
        with self._turn:
            self.check_room()
            self._reserved += 1
            self._stamp = max(time.time_ns(), self._stamp + 1)
            name = manifest_name(self._stamp, shot.id)
        try:
            self.tree.keep(name, [shot])
            with self._turn:
                self._shots[shot.id] = shot
            self._followed.asked(shot.id)
            self._pool.submit([shot])
        finally:
            with self._turn:
                self._reserved -= 1

    def shot(self, id: str) -> Shot:
        """What was asked for, of this server or of another one on its folder.

        Raises:
            Refusal: 404: it never was, or was deleted.
        """
        shot = self._shots.get(id) or self._elsewhere(id)
        if shot is None or self.tree.is_marked(id, CANCEL):
            raise no_such_video(id)
        return shot

    def _elsewhere(self, id: str) -> Shot | None:
        """A video that another server was asked for since this one was started; it is in lists from then on."""
        if not is_id(id) or created_at(self.tree, id) is None:
            return None
        asked = (shot for name in manifests_of(self.tree, id) for shot in self.tree.shots_of(name))
        found = next((shot for shot in asked if shot.id == id), None)
        if found is None or self.tree.is_marked(id, CANCEL):
            return None
        with self._turn:
            return self._shots.setdefault(id, found)

    def shots(self) -> list[Shot]:
        """All that there are, the oldest first; of deleted ones those whose files are there still."""
        with self._turn:
            return list(self._shots.values())

    def progress(self, id: str) -> Progress | None:
        """How far a video is that is being rendered here."""
        return self._followed.get(id)

    def sight(self, id: str) -> Sight | None:
        """Where a video is that is being rendered here, and what the stages did last."""
        return self._pool.sight(id)

    def num_chunks(self, shot: Shot) -> int:
        """Chunks of the whole video."""
        params = self.kinds.kind_of(shot).params
        spec = self.kinds.checkpoint.codec_spec
        return spec.chunks_for_frames(self.kinds.frames(shot), params.latent_chunk_size, params.warm)

    def cancel(self, id: str) -> None:
        """Ends a video where it is, and removes what there is of it, at the latest when nobody writes it any more.

        Raises:
            Refusal: 404.
        """
        self.shot(id)
        self._removals.mark(id)
        self.counts.cancelled += 1
        if not self._pool.cancel(id):
            self._clear(id)

    def set_prompt(self, id: str, text: str, from_chunk: int = 0) -> None:
        """Another prompt from a chunk on, or where that is born already from the next one that is.

        Raises:
            Refusal: 404; 409: it is not being rendered here, or no chunk of it is left to be born.
            ConfigError: it has no such chunk, or the model cannot take the text.
            OSError: it cannot be kept.
        """
        self.shot(id)
        try:
            # One whose files are complete is over for clients, though its renderer may hold it for a moment more.
            is_here = not self.is_over(id) and self._pool.set_prompt(id, from_chunk, text)
        except ConfigError as error:
            is_here = not self.is_over(id)  # which it may be by now
            if is_here and isinstance(error, TooLateError):
                raise Refusal(
                    409, f"all chunks of video {id} are born: none is left to follow another prompt", "all_born"
                ) from error
            if is_here:
                raise
        if not is_here:
            raise Refusal(
                409, f"video {id} is not being rendered; its prompt can be changed while it is", "not_running"
            )
        self._changes.take(id, from_chunk, text)
        self.counts.prompts += 1

    def pending_prompts(self, id: str, came: Sequence[Change]) -> list[Change]:
        """See :meth:`pavdm_dist.serve.changes.Changes.pending`."""
        return self._changes.pending(id, came)

    def state(self, id: str, names: frozenset[str] | None = None) -> State:
        """What a video's files say, or will once what it failed by can be written. ``names`` as in ``Tree.state``."""
        state = self.tree.state(id, names)
        failure = self._pool.unwritten(id) if state.standing in ("queued", "begun") else None
        return state if failure is None else State("failed", failure=failure)

    def is_over(self, id: str) -> bool:
        """Whether nothing more will come of a video, or of this server; asked often, so of few files."""
        if self.closing:
            return True
        names = frozenset(list_names(self.tree.folder(id)))
        if names.isdisjoint(_ENDS) and self._pool.unwritten(id) is None:
            return False
        return self.state(id, names).standing in ("done", "failed", "cancelled", "skipped")

    @property
    def unfinished(self) -> int:
        """Videos that wait or are being rendered, those included that are just being taken."""
        figures = self._pool.figures
        return int(figures["waiting"] + figures["running"]) + self._reserved

    @property
    def figures(self) -> dict[str, float]:
        """See :attr:`pavdm_dist.farm.pool.Pool.figures`."""
        return self._pool.figures

    # --- what the pool tells -----------------------------------------------------------------------------------

    def begun(self, shot: Shot, chunk: int) -> None:
        self._changes.begun(shot.id)
        self._followed.begun(shot.id, chunk)

    def grew(self, shot: Shot, chunk: VideoChunk) -> None:
        self._followed.grew(shot.id, chunk)
        if chunk.resume is not None:
            self._changes.grew(shot.id, chunk.resume.prompts)

    def ended(self, shot: Shot, ended: Ended) -> None:
        self._followed.ended(shot.id, ended)
        self._changes.ended(shot.id, ended.how == "done")
        if self._removals.is_deleted(shot.id):  # it may have been complete in that moment
            self._clear(shot.id)

    def _clear(self, id: str) -> None:
        if self._removals.clear(id):
            self._forget([id])

    def _forget(self, ids: Iterable[str]) -> None:
        with self._turn:
            for id in ids:
                self._shots.pop(id, None)
