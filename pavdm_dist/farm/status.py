"""``pavdm farm status`` and ``retry``: what has become of a folder's shots, from its files alone."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pavdm_dist.errors import ConfigError, PAVDMError
from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.farm.settings import FarmConfig, of_videos
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.tree import State, Tree
from pavdm_dist.io.storage import open_read
from pavdm_dist.values.fields import json_value
from pavdm_dist.values.merging import merged, to_dict

logger = logging.getLogger(__name__)

# The rate is that of so many seconds up to now; of a farm that has ended, or has long finished nothing, up to the
# newest shot's end.
RECENT_S = 1800.0
# Shots that a status tells of one by one.
LISTED = 50


@dataclass(frozen=True)
class Standing:
    """A shot and what has become of it; ``seconds`` of its video are playable."""

    shot: Shot
    state: State
    seconds: float
    sidecar: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Spell:
    """A time in which a shot was rendered.

    Attributes:
        begin, end: seconds since 1970; ``end`` is later.
        seconds: of video that came of it.
    """

    begin: float
    end: float
    seconds: float

    def within(self, start: float, end: float) -> float:
        """Of its seconds of video those that came in this time, as if they had come evenly."""
        return self.seconds * max(0.0, min(self.end, end) - max(self.begin, start)) / (self.end - self.begin)


def standings(tree: Tree, with_sidecars: bool = True) -> Iterator[Standing]:
    """All shots of a folder.

    Raises:
        ConfigError: a manifest that it keeps is damaged.
    """
    there = tree.scan()
    for shot in tree.shots():
        state = tree.state(shot.id, there.get(shot.id, frozenset()))
        sidecar = tree.sidecar(shot.id) if state.standing == "done" and with_sidecars else None
        if sidecar is not None:
            seconds = sidecar["num_frames"] / sidecar["fps"]
        else:
            seconds = tree.seconds_rendered(shot.id) if state.standing in ("running", "begun") else 0.0
        yield Standing(shot, state, seconds, sidecar)


def settings_of_run(tree: Tree, overrides: Collection[str] = ()) -> FarmConfig:
    """The settings of a folder's newest run, with changes.

    Raises:
        ConfigError: nothing was run there, or the settings cannot be read.
    """
    path = tree.path("farm.json")
    try:
        with open_read(path) as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"{tree.root}: is no folder of a farm: {path}: {error.strerror or error}") from error
    try:
        content = json_value(text)
    except ValueError as error:
        raise ConfigError(f"{path}: is damaged, not valid JSON: {error}; `pavdm farm run` writes it anew") from error
    try:
        return merged(FarmConfig, content["settings"], path, list(overrides))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: holds no settings") from error


def status_report(out: str, now: float | None = None) -> dict[str, Any]:
    """How many shots are where, how fast it goes and how long it will take, who renders what, what failed and why.

    Args:
        out: the folder.
        now: seconds since 1970; None = the clock's.

    Raises:
        ConfigError: no folder of a farm.
    """
    tree, now = Tree(out), time.time() if now is None else now
    kinds = _kinds(settings_of_run(tree))
    counts: Counter[str] = Counter()
    running: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    left: float | None = 0.0
    playable = 0.0
    finished: list[_Spell] = []
    growing: list[float] = []
    for one in standings(tree):
        standing = one.state.standing
        counts[standing] += 1
        playable += one.seconds
        if one.sidecar is not None:
            spell = _spell(one.sidecar, one.seconds)
            finished += [] if spell is None else [spell]
        elif standing in ("queued", "running", "begun"):
            wanted = _seconds(kinds, one.shot)
            left = None if wanted is None or left is None else left + max(0.0, wanted - one.seconds)
            growing += [one.seconds] if standing == "running" else []
            if standing == "running" and len(running) < LISTED:
                made = f"{one.seconds:.1f}" + ("" if wanted is None else f"/{wanted:.1f}")
                running.append({"id": one.shot.id, "seconds": made, "by": one.state.by})
        elif one.state.failure is not None and len(failures) < LISTED:
            failure = one.state.failure
            failures.append({"id": one.shot.id, "kind": failure.kind, "error": failure.error})
    rate = _rate(finished, growing, now)
    return {
        "shots": sum(counts.values()),
        **{name: counts[name] for name in ("done", "running", "begun", "queued", "failed", "skipped", "cancelled")},
        "seconds_of_video": round(playable, 3),
        "seconds_left": None if left is None else round(left, 3),
        "seconds_of_video_per_minute": None if rate is None else round(rate, 3),
        "minutes_left": None if not rate or left is None else round(left / rate, 1),
        **({"shots_running": running} if running else {}),
        **({"failures": failures} if failures else {}),
    }


def failed_shots(
    out: str, ids: Collection[str], config: FarmConfig | None = None, said: Collection[str] = ()
) -> list[str]:
    """Ids of failed shots that are to be tried again. Changes nothing.

    Args:
        out: the folder.
        ids: which; empty = all.
        config: what they would be rendered with; None = the settings of the folder's newest run.
        said: names of its settings that were asked for now; all others are those of the folder's newest run.

    Raises:
        ConfigError: one that has not failed, or none has; or one has failed in a run with other settings.
    """
    tree = Tree(out)
    now = json_value(json.dumps(of_videos(to_dict(config or settings_of_run(tree)))))
    failed, others = list[str](), dict[str, dict[str, Any]]()
    for one in standings(tree, with_sidecars=False):
        if one.state.standing != "failed":
            continue
        failed.append(one.shot.id)
        then = {} if one.state.failure is None else one.state.failure.settings
        other = {name: then[name] for name in now if name in then and then[name] != now[name] and name not in said}
        if other and (not ids or one.shot.id in ids):
            others[one.shot.id] = other
    for id in ids:
        if id not in failed:
            raise ConfigError(f"id={id}: has not failed in {out}; `pavdm farm status {out}` lists those that have")
    if not failed:
        raise ConfigError(f"{out}: no shot has failed")
    for id, other in others.items():
        more = f", and {len(others) - 1} more have with others, too" if len(others) > 1 else ""
        words = ", ".join(f"{name}={json.dumps(value)} (now {json.dumps(now[name])})" for name, value in other.items())
        name, value = next(iter(other.items()))
        raise ConfigError(
            f"id={id}: failed in a run with {words}{more}; say what is to hold, as `pavdm farm retry {out} {id}"
            f" {name}={json.dumps(value)}`"
        )
    return [id for id in failed if not ids or id in ids]


def _kinds(config: FarmConfig) -> Kinds | None:
    """None where the model cannot be opened: on a machine that only looks on."""
    try:
        return Kinds(config)
    except PAVDMError as error:
        logger.warning("how long shots are to be is not known here: %s", error)
        return None


def _seconds(kinds: Kinds | None, shot: Shot) -> float | None:
    try:
        return None if kinds is None else kinds.seconds(shot)
    except ConfigError:  # settings have changed since it was asked for
        return None


def _spell(sidecar: dict[str, Any], seconds: float) -> _Spell | None:
    """When a complete shot was rendered, without the time that it lay unfinished with nobody at it; None of a video
    that was brought here: it says nothing of how fast it goes."""
    try:
        end = datetime.fromisoformat(str(sidecar.get("created"))).timestamp()
    except (ValueError, OverflowError):
        return None
    took = sum(sidecar.get("chunk_seconds") or ())
    return _Spell(end - took, end, seconds) if end - took < end else None


def _rate(finished: list[_Spell], growing: list[float], now: float) -> float | None:
    """Seconds of video per minute of all renderers together, lately; None where nothing was finished.

    Of every shot counts what of it came in that time, also of those that are under way. So it makes no difference
    whether shots end one by one or in waves, or how long one takes.

    Args:
        finished: of complete shots.
        growing: seconds of video that there are of each shot under way.
        now: seconds since 1970.
    """
    if not finished:
        return None
    newest = max(spell.end for spell in finished)
    now = max(now, newest)  # clocks of several machines differ
    until = now if growing and now - newest <= RECENT_S else newest
    recent = [spell for spell in finished if spell.end > until - RECENT_S]
    # When a shot under way was begun is in no file: it is taken to grow as those did that ended last.
    pace = sum(spell.seconds for spell in recent) / sum(spell.end - spell.begin for spell in recent)
    spells = [*recent, *(_Spell(now - seconds / pace, now, seconds) for seconds in growing if seconds)]
    start = max(until - RECENT_S, min(spell.begin for spell in spells))
    return 60 * sum(spell.within(start, until) for spell in spells) / (until - start)
