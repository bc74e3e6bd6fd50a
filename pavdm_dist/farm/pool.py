"""Who renders which shot, and what becomes of those that fail: the desk that the renderers of a farm ask.

What is in memory here can be lost at any moment: the tree has all that counts.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pavdm_dist.errors import ConfigError, PAVDMError
from pavdm_dist.farm.anew import forget_begun
from pavdm_dist.farm.crew import Crew, Hand
from pavdm_dist.farm.desk import Ended, Listener, Sight
from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.farm.logs import ShotLog
from pavdm_dist.farm.meters import make_meters
from pavdm_dist.farm.outage import Outage
from pavdm_dist.farm.reached import Reached
from pavdm_dist.farm.renderer import Renderer
from pavdm_dist.farm.said import Said
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.tree import CANCEL, Failure, Tree
from pavdm_dist.farm.waiting import Entry, Waiting
from pavdm_dist.io.lock import Watch
from pavdm_dist.request.outputs import VideoChunk

logger = logging.getLogger(__name__)


@dataclass
class _Running:
    """A shot in a renderer's hands; ``begun`` once its files are open."""

    entry: Entry
    hand: Hand
    begun: bool = False


class Pool:
    """Shares shots out to renderers until there are none left, or, where it is endless, until it is told to end.

    :meth:`open`, :meth:`tick` and :meth:`close` are for one thread, ``tick`` about once a second; all else for any.

    Args:
        kinds: settings of all shots.
        tree: of their files.
        listener: hears of shots.
        log: keeps their last lines.
        endless: stay up when there is nothing to do.

    Attributes:
        ends: how many shots ended how; ``otherwise``: another process has completed them, not as is asked for here.
        frames: written so far, those that were lost and made again once more.
        reached: how far all shots are.
        over_budget: more shots failed than may.
        ended_by: why it ends although nobody called :meth:`drain`; empty while that is not so.
    """

    def __init__(
        self,
        kinds: Kinds,
        tree: Tree,
        listener: Listener | None = None,
        log: ShotLog | None = None,
        endless: bool = False,
    ) -> None:
        self._kinds, self._tree, self._options = kinds, tree, kinds.config.farm
        self._listener, self._said, self._endless = listener or Listener(), Said(tree, log or ShotLog()), endless
        self._turn = threading.Condition()
        self._waiting, self._watch, self._watching = Waiting(), Watch(), threading.Lock()
        self._outage = Outage(tree, self._options.retry_s)
        self._running: dict[str, _Running] = {}
        self._furthest: dict[str, int] = {}  # by shot, the last chunk that any renderer gave
        self._crew = Crew(kinds, lambda name: Renderer(name, kinds, tree, self), self._turn)
        self._draining_since: float | None = None
        self._looked = -math.inf
        self._stopped = False
        self._membership: Any = None
        self.ends: Counter[str] = Counter()
        self.frames, self.reached, self.over_budget, self.ended_by = 0, Reached(), False, ""
        self._meters = make_meters()

    # --- what others ask for ---------------------------------------------------------------------------------

    def open(self) -> None:
        """Joins the cluster where there are stages, and reads what is read once; harmless when called twice.

        Raises:
            PAVDMError: no cluster, or weights that cannot be read.
        """
        assert self._kinds.identity
        if self._kinds.config.num_stages and self._membership is None:
            from pavdm_dist.cluster.joining import connect

            self._membership = connect(self._kinds.config.ray_address)

    def submit(self, shots: Iterable[Shot]) -> None:
        """Queues shots; none of them may be here already."""
        with self._turn:
            for shot in shots:
                self._waiting.add(shot)
            self._turn.notify_all()

    def cancel(self, id: str) -> bool:
        """Takes a shot out of the queue, or ends it at its next chunk; whether it was here. Marks nothing."""
        with self._turn:
            dropped = self._waiting.drop({id})
            self.ends["cancelled"] += len(dropped)
            for shot in dropped:
                self._forget(id)
                self.reached.end(id, self._length(shot))
            running = self._running.get(id)
            self._turn.notify_all()
        self._said.forget(id)
        if running is not None:
            running.hand.renderer.cancel(id)
        for shot in dropped:
            self._said.dropped(shot)
            self._listener.ended(shot, Ended("cancelled"))
        return running is not None or bool(dropped)

    def set_prompt(self, id: str, from_chunk: int, text: str) -> bool:
        """Another prompt for a shot that is being rendered; whether it is here.

        Raises:
            ConfigError: as :meth:`Renderer.set_prompt`.
        """
        with self._turn:
            running = self._running.get(id)
        return running is not None and running.hand.renderer.set_prompt(id, from_chunk, text)

    def sight(self, id: str) -> Sight | None:
        """Where a shot is that is being rendered here."""
        with self._turn:
            running = self._running.get(id)
        return None if running is None else running.hand.renderer.sight(id)

    def unwritten(self, id: str) -> Failure | None:
        """See :meth:`~pavdm_dist.farm.said.Said.unwritten`."""
        return self._said.unwritten(id)

    def drain(self) -> None:
        """Lets every shot go on to its next chunk, saves all, and ends; after ``drain_s`` as :meth:`stop`."""
        with self._turn:
            if self._draining_since is not None:
                return
            self._draining_since = time.monotonic()
            self._crew.ending = True
            hands = list(self._crew.hands)
            self._turn.notify_all()
        for hand in hands:
            hand.renderer.drain()

    def stop(self) -> None:
        """Saves all where it is, and ends."""
        self.drain()
        with self._turn:
            already, self._stopped = self._stopped, True
            hands = [] if already else list(self._crew.hands)
        for hand in hands:
            if hand.renderer.is_up:
                hand.renderer.stop()

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        with self._turn:
            if self._draining_since is None and (self._endless or self._waiting or self._running):
                return False
            # A gang that is still coming up has no shot, and ends with this process' part in the cluster.
            return not self._running and all(hand.over or not hand.renderer.is_up for hand in self._crew.hands)

    @property
    def figures(self) -> dict[str, float]:
        """Shots waiting and running; renderers; seconds that these were up, and were idle though shots waited."""
        with self._turn:
            now, hands = time.monotonic(), [hand for hand in self._crew.hands if not hand.over]
            return {
                "waiting": len(self._waiting),
                "running": len(self._running),
                "renderers": len(hands),
                "rendering_s": self._crew.rendering_s + sum(max(0.0, now - hand.renderer.up_since) for hand in hands),
                "idle_s": self._crew.idle_s + sum(hand.idle_s for hand in hands),
            }

    def wait(self, seconds: float) -> None:
        """Until something happens, at most so long."""
        with self._turn:
            self._turn.wait(seconds)

    def tick(self) -> None:
        """Looks after renderers and markers.

        Raises:
            PAVDMError: no renderer comes up, time after time; all shots are left in order.
        """
        draining, lost = self._draining_since, self._crew.lost
        self._crew.reap()
        self._meters.add("pavdm_farm_renderers_lost", self._crew.lost - lost)
        if draining is not None:
            if time.monotonic() - draining > self._options.drain_s:
                self.stop()
            return
        if self._outage.look():
            with self._turn:
                self._turn.notify_all()
        if time.monotonic() - self._looked < self._options.poll_s:
            return  # markers may be in a store, and who counts the cluster's nodes has others to answer
        self._looked = time.monotonic()
        self._said.sweep()
        if self._is_so(lambda: self._tree.drains):
            self.ended_by = "drain: marker found, all is saved"
            logger.info("%s/%s", self._tree.root, self.ended_by)
            return self.drain()
        with self._turn:
            running = [(id, one.hand.renderer) for id, one in self._running.items()]
            shots = self._waiting.ready + len(running)
            keeps = bool(self._endless or self._waiting or running)
        for id, renderer in running:
            if self._is_so(partial(self._tree.is_marked, id, CANCEL)):
                renderer.cancel(id)
        self._crew.scale(shots, keeps)
        figures = self.figures
        for name in ("waiting", "running", "renderers"):
            self._meters.set(f"pavdm_farm_{name}", figures[name])
        self._meters.set("pavdm_farm_idle_share", figures["idle_s"] / max(figures["rendering_s"], 1e-9))

    @staticmethod
    def _is_so(marked: Callable[[], bool]) -> bool:
        """Whether a marker is there; not where it cannot be looked at, which the next look may change."""
        try:
            return marked()
        except Exception as error:  # stores that are away have errors of kinds of their own
            logger.warning("markers cannot be looked at: %s: %s", type(error).__name__, error)
            return False

    def close(self) -> None:
        """Ends all, and gives the cluster back. Safe to call twice."""
        self.stop()
        self._crew.join()
        self._said.sweep()
        if self._membership is not None:
            self._membership.leave()
            self._crew.join()  # what came up in the cluster ends with this process' part in it

    # --- the desk ----------------------------------------------------------------------------------------------

    def take(self, renderer: Renderer) -> Shot | None:
        with self._turn:
            hand = self._crew.hand(renderer)
            if hand is None:
                return None
            try:
                while not (hand.over or hand.retiring or self._draining_since is not None):
                    is_turn = not self._outage.is_on and self._may_take(hand)
                    if is_turn and (entry := self._waiting.take(alone=not hand.load)) is not None:
                        self._running[entry.shot.id] = _Running(entry, hand)
                        hand.load += 1
                        self._said.taken(renderer.name, entry.shot)
                        return entry.shot
                    if not (self._endless or self._waiting or self._running):
                        return None
                    hand.waits = True
                    self._turn.wait(1.0)
                    if (self._outage.is_on or not self._waiting.ready) and hand.idle_since is not None:
                        hand.idle_since = time.monotonic()  # with nothing to take nobody is to blame
                return None
            finally:
                hand.waits = False
                self._turn.notify_all()

    def is_free(self, shot: Shot) -> bool:
        with self._watching:  # not what all threads share: a store may take seconds to answer
            try:
                return self._watch.is_free(self._tree.output(shot.id))
            except ConfigError as error:  # a share that is away may come back
                logger.warning("%s", error, extra={"shot": shot.id})
                return False

    def begun(self, renderer: Renderer, shot: Shot, chunk: int, video: int) -> None:
        before = self._kinds.frames_before(shot, chunk)
        with self._turn:
            self.reached.begin(shot.id, before)
            running = self._running[shot.id]
            running.begun = True
            hand, attempts = running.hand, running.entry.attempts
            hand.begun += 1
            if hand.idle_since is not None:
                hand.idle_s += time.monotonic() - hand.idle_since
                hand.idle_since = None
        self._said.begun(renderer.name, shot, chunk, attempts, video)
        self._listener.begun(shot, chunk)

    def grew(self, renderer: Renderer, shot: Shot, chunk: VideoChunk) -> None:
        frames = int(chunk.frames.shape[0])
        with self._turn:
            self.frames += frames
            self.reached.add(shot.id, frames)
            self._crew.went_on()
            if chunk.index > self._furthest.get(shot.id, -1):
                self._furthest[shot.id], self._running[shot.id].entry.attempts = chunk.index, 0
            self._turn.notify_all()
        params = self._kinds.kind_of(shot).params
        self._meters.add("pavdm_farm_frames", frames)
        self._meters.add("pavdm_farm_chunks")
        self._meters.add("pavdm_farm_rows", params.num_inference_steps / params.window_chunks)
        self._listener.grew(shot, chunk)

    def ended(self, renderer: Renderer, shot: Shot, ended: Ended) -> None:
        if ended.how == "unfit" and self._endless:  # no farm ends that could say so, nor does another one come
            # After an upgrade clients can do nothing. Where settings or devices are others, those of before go on.
            anew = forget_begun(shot, self._tree) if ended.kind == "versions" else None
            ended = anew or replace(ended, how="failed", kind="unfit")
        # Not among what all threads share: a look at a disk may take its time.
        is_storage, is_draining = ended.how == "again" and ended.kind == "storage", self._draining_since is not None
        is_blameless = is_storage and (is_draining or self._outage.begins(ended.error))
        if ended.how == "done":
            self._outage.done()
        ended, attempts = self._settled(shot, ended, is_blameless)
        self._meters.add(f"pavdm_farm_shots_{ended.counted}")
        self._said.ended(renderer.name, shot, ended, attempts)
        self._listener.ended(shot, ended)

    def _settled(self, shot: Shot, ended: Ended, is_blameless: bool) -> tuple[Ended, int]:
        """What becomes of a shot, the queue being as it then is; one that was begun too often has failed. And how often
        it was begun without getting further, this time included. Nothing is counted against a blameless one."""
        options, length = self._options, self._length(shot)
        with self._turn:
            running = self._running.pop(shot.id)
            entry, hand = running.entry, running.hand
            hand.load -= 1
            hand.begun -= running.begun
            if not hand.begun and hand.idle_since is None:
                hand.idle_since = time.monotonic()
            attempts = entry.attempts + 1
            if ended.how == "again" and not is_blameless:
                entry.attempts = attempts
                if entry.attempts > options.retries:
                    ended = replace(ended, how="failed", error=f"{ended.error} ({entry.attempts} attempts)")
            if ended.how == "again":
                self._waiting.put_back(entry, 0 if is_blameless else options.retry_s * 2 ** (entry.attempts - 1))
            elif ended.how in ("aside", "saved"):
                self._waiting.put_back(entry, options.poll_s)
            else:
                self._forget(shot.id)
                self.reached.end(shot.id, length)
            self.ends[ended.counted] += ended.how != "aside"
            most = options.max_failed
            spent = most is not None and self.ends["failed"] > most and not self.over_budget
            self.over_budget = self.over_budget or spent
            self._turn.notify_all()
        if spent:
            failed = self.ends["failed"]
            self.ended_by = f"{failed} shots failed, farm.max_failed={most} allows no more: all is saved"
            logger.error("%s", self.ended_by)
            self.drain()
        return ended, attempts

    def _forget(self, id: str) -> None:
        """Of a shot that is over nothing is kept: there may be millions."""
        self._furthest.pop(id, None)
        self._watch.forget(self._tree.output(id))

    def _length(self, shot: Shot) -> int:
        """New frames of a shot; none where it is asked for what cannot be, which is why it ends."""
        try:
            return self._kinds.frames(shot)
        except PAVDMError:
            return 0

    def _may_take(self, hand: Hand) -> bool:
        """Whether it is a renderer's turn: the least busy first; one more than its places when others have theirs."""
        if any(running.hand is hand and running.entry.attempts for running in self._running.values()):
            return False  # one that may be to blame is rendered alone, until it gets further
        streams = self._kinds.config.streams
        others = [other for other in self._crew.hands if other is not hand and not (other.over or other.retiring)]
        if hand.load < streams:
            return not any(other.waits and other.load < hand.load for other in others)
        return self._waiting.ready > sum(max(0, streams - other.load) for other in others)
