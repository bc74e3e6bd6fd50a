"""``pavdm farm run``: a manifest in, a folder of videos out."""

from __future__ import annotations

import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from pavdm_dist.commands.signals import Stopped
from pavdm_dist.errors import FailedVideosError, MediaError, PAVDMError
from pavdm_dist.farm.failed import list_failed
from pavdm_dist.farm.intake import Found, Intake
from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.farm.logs import ShotLog
from pavdm_dist.farm.pool import Pool
from pavdm_dist.farm.progress import FarmProgress
from pavdm_dist.farm.settings import FarmConfig
from pavdm_dist.farm.sizing import count_left, sized
from pavdm_dist.farm.tree import Tree
from pavdm_dist.io.metadata import versions
from pavdm_dist.io.remote import is_remote
from pavdm_dist.io.state import BegunOtherwiseError
from pavdm_dist.redaction import hide_secrets
from pavdm_dist.values.merging import to_dict

logger = logging.getLogger(__name__)

# Between two looks at everything while nothing happens.
TICK_S = 0.5
_LONGEST_WAIT_S = 300.0


def run_command(
    config: FarmConfig,
    manifest: str | None,
    out: str,
    progress: Callable[[float], FarmProgress],
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """Renders what a manifest asks for and is not there yet. The same command again, or beside, goes on with the rest.

    Args:
        config: checked (:func:`~pavdm_dist.farm.settings.validate_farm`).
        manifest: of the shots; None = all that the folder's earlier runs were given.
        out: the folder (:mod:`~pavdm_dist.farm.tree`), local or remote.
        progress: makes what tells how far it is, of frames per second.
        only: ids of failed shots of the folder, which are tried again; None = all that have not failed.

    Returns:
        How many shots are done, were done before, were cancelled, and are left; frames, seconds, frames per second, and
        the share of renderers' time that was lost between shots.

    Raises:
        FailedVideosError: some shots failed, now or in an earlier run; the others are complete, or left.
        ConfigError: bad input, before anything is written or taken from a cluster.
        MediaError: the folder cannot be written, before anything is taken from a cluster.
        BegunOtherwiseError: all that is left was begun by other versions, on other devices or with other settings.
        EngineError: no renderer comes up; what is finished stays.
        Stopped: a signal, or the marker ``drain``, which is SIGTERM to all farms of a folder, came before all was over;
            what is unfinished is saved.
    """
    tree, told = Tree(out), None
    tree.check_writable(traces=config.farm.trace)
    farm: _Farm | None = None
    try:
        if config.farm.plan:
            config = sized(config, count_left(manifest, tree, only))
        kinds = Kinds(config)
        kinds.check_engine()
        intake = Intake(manifest, tree, kinds, only)
        try:
            found = intake.first()
            named = None if manifest is None else hide_secrets(manifest)
            tree.write_settings({"settings": to_dict(config), "manifest": named, "versions": versions()})
        except OSError as error:  # a full disk, a share that went away
            if error.errno is None:  # what libraries say of other things
                raise
            place = str(error.filename or out)
            what = f"out={out}: {place}" if place.startswith(str(out)) else place
            raise MediaError(f"{what}: {error.strerror or error}") from error
        say = "%d shots: %d to render, %d complete, %d failed before"
        logger.info(say, len(found.left) + found.done + found.failed, len(found.left), found.done, found.failed)
        with _logged(tree) as log:
            bar = progress(kinds.base.params.fps)
            farm = _Farm(Pool(kinds, tree, log=log), kinds, intake, bar, config.farm.poll_s)
            try:
                told = _rendered(farm, found)
            except PAVDMError as error:  # which says what status follows, and not of the failures that it comes upon
                if farm.failed:
                    failures = f"{farm.failed} of {farm.asked} shots failed (`pavdm farm status {out}` says why)"
                    error.args = (f"{error}; {failures}", *error.args[1:])
                raise
            finally:
                list_failed(tree)
    except Stopped as stop:  # before anything was begun, or when all was over
        told = told or stop
    if farm is None:
        assert told is not None
        raise Stopped(told.number, "nothing was begun, the same command begins") from told
    report = farm.report()
    left, unfit, otherwise = report["left"], farm.pool.ends["unfit"], farm.pool.ends["otherwise"]
    drained = bool(farm.pool.ended_by) and not farm.pool.over_budget
    if left and (told is not None or drained):
        so_far = f" and {farm.failed} failed" if farm.failed else ""
        number = signal.SIGTERM if told is None else told.number
        raise Stopped(number, f"{left} shots are left{so_far}, the same command goes on") from told
    others = f"{unfit} begun by other versions, on other devices or with other settings (the log names them)"
    if farm.failed or otherwise:
        said = f"{farm.failed} of {farm.asked} shots failed, {left or 'none'} are left{f', {others}' if unfit else ''}"
        if otherwise:
            said += f", {otherwise} completed by another process, not as they are asked for here (the log names them)"
        why = f": `pavdm farm status {out}` says why, `pavdm farm retry {out}` tries again" if farm.failed else ""
        raise FailedVideosError(f"{said}{why}", farm.failed + otherwise)
    if unfit:
        raise BegunOtherwiseError(
            f"out={out}: {left} of {farm.asked} shots are left, {others}; they go on where these are"
        )
    return report


def _rendered(farm: _Farm, found: Found) -> Stopped | None:
    """Renders shots, and what comes to them; the signal that ended it earlier, if one did."""
    try:
        farm.take_in(found)
        found.left.clear()  # the queue has them, and forgets each that is over
        return _until_over(farm, farm.pool)
    except Stopped as stop:  # before anything was begun
        return stop
    finally:
        farm.pool.close()
        farm.bar.close()


def _until_over(farm: _Farm, pool: Pool) -> Stopped | None:
    """Goes round until nothing is left; the signal that ended it earlier, if one did."""
    told: Stopped | None = None
    while True:
        try:
            while True:
                is_over = pool.is_over  # before the look: what comes meanwhile is not to be missed
                is_more = told is None and farm.look()
                farm.show()  # behind the last thing that happened
                if is_over and not is_more:
                    return told
                pool.tick()
                pool.wait(TICK_S)
        except Stopped as stop:
            if told is None:
                told = stop
                logger.info("ending: every shot goes on to its next chunk and is saved; a second signal does not wait")
                pool.drain()
            else:
                pool.stop()


class _Farm:
    """What one command counts."""

    def __init__(self, pool: Pool, kinds: Kinds, intake: Intake, bar: FarmProgress, poll_s: float) -> None:
        self.pool, self.bar = pool, bar
        self._kinds, self._intake, self._poll_s = kinds, intake, poll_s
        self._wait_s = poll_s  # longer after looks that failed
        self._fault = ""  # of the last one
        self._started = self._looked = self._tried = time.monotonic()
        self.asked = self.done_before = self.failed_before = self._given = 0

    @property
    def failed(self) -> int:
        return self.failed_before + self.pool.ends["failed"]

    def take_in(self, found: Found) -> None:
        """What there is to do at the start; what is wrong with it ends the farm."""
        self._count(found)
        self._kinds.prepare_texts(found.left)
        self._queue(found)

    def look(self) -> bool:
        """Takes new lines in, every so often, and whenever all is done; whether there were some.

        What is wrong with them, or away in this moment, ends none of the shots under way: all of it is tried again when
        the manifest has changed, and after a while if it has not. Where nothing is under way there is nothing to go on
        with, and it ends the farm, as at the start.
        """
        now, is_last = time.monotonic(), self.pool.is_over
        if self.pool.ended_by or (now - self._looked < self._poll_s and not is_last):
            return False
        self._looked = now
        if now - self._tried < self._wait_s and not is_last and not (self._fault and self._intake.has_changed):
            return False
        self._tried = now
        found: Found | None = None
        with _looked_after(self.pool):  # to read a long manifest, or to load a large text encoder, takes minutes
            try:
                found = self._intake.more()
                if found is not None:
                    logger.info("the manifest has %d new shots", len(found.left))
                    self._count(found)
                    self._kinds.prepare_texts(found.left)
            except Exception as error:  # stores that are away have errors of kinds of their own
                if found is not None:
                    self._count(found, -1)
                self._intake.put_back()
                said = f"new shots cannot be taken in: {type(error).__name__}: {error}"
                if self.pool.is_over:
                    raise error if isinstance(error, PAVDMError) else MediaError(said) from error
                # A manifest of thousands is read anew each time, and a large text encoder started.
                self._looked = self._tried = time.monotonic()
                self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
                if said != self._fault:
                    logger.warning("%s; they are tried again, the next time in %.0f s", said, self._wait_s)
                self._fault = said
                return False
        self._wait_s, self._fault = self._poll_s, ""
        if found is None:
            return False
        self._queue(found)
        return bool(found.left)

    def _count(self, found: Found, times: int = 1) -> None:
        self._given += times * len(found.left)
        self.asked += times * (len(found.left) + found.done + found.failed)
        self.done_before += times * found.done
        self.failed_before += times * found.failed
        self.bar.before += times * found.frames_done
        self.bar.total += times * (found.frames_done + found.frames_left)

    def _queue(self, found: Found) -> None:
        if found.left:
            self.pool.open()
        self._intake.forget_failures(found.left)  # the last moment at which anything could have been wrong
        self.pool.submit(found.left)

    def show(self) -> None:
        figures, ends = self.pool.figures, self.pool.ends
        words = [f"{self.done_before + ends['done']}/{self.asked} shots", f"{figures['running']:.0f} running"]
        words += [f"{self.failed} failed"] if self.failed else []
        words += [f"{ends['cancelled']} cancelled"] if ends["cancelled"] else []
        words += [f"{ends['unfit']} begun otherwise"] if ends["unfit"] else []
        words += [f"{ends['otherwise']} made otherwise elsewhere"] if ends["otherwise"] else []
        self.bar.show(self.pool.frames, self.pool.reached.frames, ", ".join(words))

    def report(self) -> dict[str, Any]:
        seconds = time.monotonic() - self._started
        figures, ends = self.pool.figures, self.pool.ends
        return {
            "shots": self.asked,
            "done": ends["done"],
            "done_before": self.done_before,
            "failed": self.failed,
            "otherwise": ends["otherwise"],
            "cancelled": ends["cancelled"],
            "left": self._given - sum(ends[how] for how in ("done", "failed", "otherwise", "cancelled")),
            "frames": self.pool.frames,
            "seconds": round(seconds, 3),
            "frames_per_second": round(self.pool.frames / seconds, 3) if seconds else 0.0,
            "idle_share": round(figures["idle_s"] / figures["rendering_s"], 4) if figures["rendering_s"] else 0.0,
        }


@contextmanager
def _looked_after(pool: Pool) -> Iterator[None]:
    """Looks after renderers and markers beside what may take this thread long.

    Raises:
        PAVDMError: as :meth:`~pavdm_dist.farm.pool.Pool.tick`, behind it.
    """
    over, faults = threading.Event(), list[Exception]()

    def tick() -> None:
        try:
            while not over.wait(TICK_S):
                pool.tick()
        except Exception as error:
            faults.append(error)

    thread = threading.Thread(target=tick, name="pavdm-farm-tick", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:  # nothing is tried again: what is under way need not wait for a look at markers to end
        pool.drain()
        raise
    finally:
        over.set()
        thread.join()  # the pool is for one thread at a time
    if faults:
        raise faults[0]


@contextmanager
def _logged(tree: Tree) -> Iterator[ShotLog]:
    """Log lines of shots, in memory; and all as JSON beside the shots, where these are on a local disk."""
    package, file = logging.getLogger("pavdm_dist"), None
    if not is_remote(tree.root):
        folder = tree.path("logs")
        try:
            os.makedirs(folder, exist_ok=True)
            path = f"{folder}/{platform.node()}-{os.getpid()}.jsonl"
            # A name of a file may hold what UTF-8 cannot; its escape is one of JSON's, too.
            file = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        except OSError as error:
            logger.warning("no log is written beside the shots: %s", error)
    log = ShotLog(file)
    package.addHandler(log)
    try:
        yield log
    finally:
        package.removeHandler(log)
        log.close()
