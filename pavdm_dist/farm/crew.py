"""The renderers of a pool, each in a thread: how many there are, and what follows when one is lost."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pavdm_dist.errors import EngineError, PAVDMError, ResourcesError
from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.farm.renderer import Renderer

logger = logging.getLogger(__name__)

# Between two attempts to bring a renderer up, at most; how long ending threads are waited for, and those that have no
# shot, since they still come up.
LONGEST_WAIT_S, CLOSING_S, COMING_UP_S = 60.0, 10.0, 1.0


@dataclass(eq=False)
class Hand:
    """A renderer with its thread.

    Attributes:
        load: shots that it has taken.
        begun: of these, those whose files are open.
        waits: it waits for a shot.
        idle_since: when it had none begun any more; None while it has some.
        idle_s: how long it had none although there were some to take.
        retiring: it gets none any more.
        over, error: its thread has ended, perhaps by an error.
    """

    renderer: Renderer
    load: int = 0
    begun: int = 0
    waits: bool = False
    idle_since: float | None = None
    idle_s: float = 0.0
    retiring: bool = False
    over: bool = False
    error: PAVDMError | None = None
    thread: threading.Thread | None = None


class _Thread(threading.Thread):
    """Of a renderer. What it waits for may take minutes, and must not keep a process that is told to end."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        super().__init__(target=work, name=name, daemon=True)


def is_at_work() -> bool:
    """Whether a renderer's thread has not ended in this process.

    An interpreter must not end then: it takes its threads down in the middle of what they compute, which ends the
    process by SIGABRT whatever its status was to be.
    """
    return any(isinstance(thread, _Thread) for thread in threading.enumerate())


class Crew:
    """Not guarded by itself: ``turn`` is held by whoever calls, but for :meth:`reap` and :meth:`scale`.

    Args:
        kinds: settings of the farm.
        make: a renderer of that name.
        turn: guards what the pool's threads share.

    Attributes:
        hands: all whose threads have not ended, and those that :meth:`reap` has not seen since.
        ending: the pool is being closed.
        lost: renderers that ended by an error.
        idle_s, rendering_s: of renderers that are no more.
    """

    def __init__(self, kinds: Kinds, make: Callable[[str], Renderer], turn: threading.Condition) -> None:
        self._kinds, self._options, self._make, self._turn = kinds, kinds.config.farm, make, turn
        self.hands: list[Hand] = []
        self.ending = False
        self.lost = 0
        self.idle_s = self.rendering_s = 0.0
        self._numbers, self._in_a_row, self._next_start = 0, 0, 0.0
        self._room: int | None = None  # how many there was room for, when another one found none

    def hand(self, renderer: Renderer) -> Hand | None:
        """With its thread; None once :meth:`reap` has buried it, while another thread of it may still ask for shots."""
        return next((hand for hand in self.hands if hand.renderer is renderer), None)

    def went_on(self) -> None:
        """A chunk was written: what is lost from now on is another story."""
        self._in_a_row = 0

    def reap(self) -> None:
        """Buries renderers that have ended; how soon another takes their place depends on what ended them.

        Raises:
            PAVDMError: of the last one, where none came far, time after time.
        """
        with self._turn:
            ended = [hand for hand in self.hands if hand.over]
            self.hands = [hand for hand in self.hands if not hand.over]
            alive, now = len(self.hands), time.monotonic()
            for hand in ended:
                self.idle_s += hand.idle_s
                self.rendering_s += max(0.0, now - hand.renderer.up_since)
        for hand in ended:
            if hand.error is not None and not self.ending:
                self._follow(hand, hand.error, alive)

    def _follow(self, hand: Hand, error: PAVDMError, alive: int) -> None:
        name = hand.renderer.name
        self.lost += 1
        if isinstance(error, ResourcesError) and alive:
            self._room, self._next_start = alive, time.monotonic() + LONGEST_WAIT_S
            logger.warning("%s: %s; going on with %d", name, error, alive, extra={"renderer": name})
            return
        self._in_a_row += 1
        if self._in_a_row > self._options.retries and not alive:
            raise error
        wait = min(self._options.retry_s * 2 ** (self._in_a_row - 1), LONGEST_WAIT_S)
        self._next_start = time.monotonic() + wait
        logger.warning("%s ended: %s; another may follow in %.0f s", name, error, wait, extra={"renderer": name})

    def scale(self, shots: int, keeps: bool) -> None:
        """Brings renderers up, or lets some end.

        Args:
            shots: that could be rendered now, or are.
            keeps: the fewest stay up although there is nothing to do.
        """
        # Only this thread changes what is read here, but for flags; and a cluster may take long to answer, which must
        # hold up nobody who asks for a shot or gives one back.
        if time.monotonic() >= self._next_start:
            self._room = None
        most = self._most([hand for hand in self.hands if not hand.retiring])
        with self._turn:
            now = time.monotonic()
            alive = [hand for hand in self.hands if not hand.retiring]
            wanted = min(most, math.ceil(shots / self._kinds.config.streams))
            fewest = max(wanted, min(self._options.min_renderers, most) if keeps else 0)
            missing = fewest - len(alive) if now >= self._next_start else 0
            for hand in alive[fewest:] if fewest < len(alive) else ():
                idle = hand.waits and not hand.load and hand.idle_since is not None
                if idle and now - (hand.idle_since or now) > self._options.idle_s:
                    hand.retiring = True
                    logger.info("%s: nothing to do, ends", hand.renderer.name)
            self._turn.notify_all()
        for _ in range(missing):
            self._start()

    def _most(self, alive: list[Hand]) -> int:
        """Renderers that may be up now."""
        if not self._kinds.config.num_stages:
            return 1
        if self._room is not None:
            return self._room
        if self._options.renderers is not None:
            return self._options.renderers
        from pavdm_dist.cluster.room import gangs_of_cluster

        holds, grows = gangs_of_cluster(self._kinds.engine.bundles())
        # Whoever waits for a place makes an autoscaler bring one.
        return max(1, holds, len(alive) + 1 if grows and all(hand.renderer.is_up for hand in alive) else 0)

    def _start(self) -> None:
        self._numbers += 1
        hand = Hand(self._make(f"renderer-{self._numbers}"))
        hand.thread = _Thread(partial(self._work, hand), hand.renderer.name)
        with self._turn:
            self.hands.append(hand)
        logger.info("%s: coming up", hand.renderer.name, extra={"renderer": hand.renderer.name})
        hand.thread.start()

    def _work(self, hand: Hand) -> None:
        try:
            hand.renderer.run()
        except PAVDMError as error:
            hand.error = error
        except Exception as error:
            if self.ending:  # the cluster it was coming up in is being left
                return
            logger.exception("%s: a fault of this program", hand.renderer.name)
            hand.error = EngineError(f"{hand.renderer.name} failed: {type(error).__name__}: {error}")
        finally:
            with self._turn:
                hand.over = True
                self._turn.notify_all()

    def join(self) -> None:
        """Waits for renderers that have been told to end, and a moment for those that come up: these have no shot."""
        now = time.monotonic()
        for hand in self.hands:
            if hand.thread is not None:
                end = now + (CLOSING_S if hand.renderer.is_up else COMING_UP_S)
                hand.thread.join(max(0.0, end - time.monotonic()))
