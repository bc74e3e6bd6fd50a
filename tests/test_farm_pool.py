"""Who gets which shot: priorities, places, retries, renderers that come and go; without a model."""

from __future__ import annotations

import errno
import io
import json
import logging
import threading
import time
from collections import Counter, deque
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pavdm_dist.commands.origin import OtherMachineError
from pavdm_dist.errors import ConfigError, EngineError, MediaError, ResourcesError, StalledError, TakenError, VideoError
from pavdm_dist.farm.crew import Hand
from pavdm_dist.farm.desk import Ended, end_of
from pavdm_dist.farm.failed import write_failed
from pavdm_dist.farm.logs import ShotLog, of_shot
from pavdm_dist.farm.manifest import checked
from pavdm_dist.farm.outage import Outage
from pavdm_dist.farm.pool import Pool
from pavdm_dist.farm.run import _looked_after
from pavdm_dist.farm.settings import PoolConfig
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.tree import Failure, Tree
from pavdm_dist.farm.waiting import Waiting
from pavdm_dist.io.lockfile import Owner
from pavdm_dist.io.parts import parts_folder
from pavdm_dist.io.state import BegunOtherwiseError
from pavdm_dist.request.outputs import VideoChunk


class FakeRenderer:
    """Stands for one whose gang never comes; shots are taken and ended by the test."""

    def __init__(self, name: str) -> None:
        self.name, self.up_since, self.told = name, time.monotonic(), list[str]()

    is_up = True

    def drain(self) -> None:
        self.told.append("drain")

    def stop(self) -> None:
        self.told.append("stop")

    def cancel(self, id: str) -> None:
        self.told.append(f"cancel {id}")


def _pool(tmp_path: Path, streams: int = 1, renderers: int = 1, **options: Any) -> tuple[Pool, list[Any]]:
    settings = PoolConfig(**{"poll_s": 0.01, "retry_s": 0.0, **options})
    config = SimpleNamespace(farm=settings, streams=streams, num_stages=1, ray_address=None)
    params = SimpleNamespace(num_inference_steps=6, window_chunks=3)
    kinds: Any = SimpleNamespace(
        config=config,
        identity="x",
        kind_of=lambda _: SimpleNamespace(params=params),
        frames=lambda _: 10,
        frames_before=lambda _, chunk: 2 * chunk,
    )
    pool = Pool(kinds, Tree(str(tmp_path)))
    found: list[Any] = [FakeRenderer(f"renderer-{i}") for i in range(renderers)]
    pool._crew.hands = [Hand(renderer) for renderer in found]
    return pool, found


def _shot(id: str, priority: int = 0) -> Shot:
    return Shot(id, "a", priority=priority)


def _chunk(index: int) -> VideoChunk:
    return VideoChunk(0, index, torch.zeros(2, 1, 1, 3, dtype=torch.uint8), torch.zeros(1), False)


def test_the_most_urgent_first_then_in_order_and_retries_in_their_old_place() -> None:
    now = [0.0]
    waiting = Waiting(lambda: now[0])
    for id, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 5)):
        waiting.add(_shot(id, priority))
    first = waiting.take()
    assert first is not None and first.shot.id == "b"
    waiting.put_back(first, 10.0)
    assert (waiting.ready, len(waiting)) == (3, 4)
    second = waiting.take()
    assert second is not None and second.shot.id == "d"
    now[0] = 11.0
    left = [entry.shot.id for entry in iter(waiting.take, None)]
    assert left == ["b", "a", "c"]
    waiting.add(_shot("e"))
    waiting.put_back(first, 10.0)
    assert [shot.id for shot in waiting.drop({"b", "e", "none"})] == ["e", "b"] and not len(waiting)


def test_one_ahead_of_its_places_only_when_all_others_have_theirs(tmp_path: Path) -> None:
    pool, (one, other) = _pool(tmp_path, streams=1, renderers=2)
    pool.submit([_shot("a"), _shot("b"), _shot("c")])
    assert pool.take(one).id == "a"  # type: ignore[union-attr]
    # Two are left; one of them is the other's, so that one more may be had in reserve.
    assert pool.take(one).id == "b"  # type: ignore[union-attr]
    got: list[Shot | None] = []
    greedy = threading.Thread(target=lambda: got.append(pool.take(one)), daemon=True)
    greedy.start()
    greedy.join(0.2)
    assert greedy.is_alive(), "the last one is the idle renderer's"
    assert pool.take(other).id == "c"  # type: ignore[union-attr]
    for renderer, id in ((one, "a"), (one, "b"), (other, "c")):
        pool.ended(renderer, _shot(id), Ended("done"))
    greedy.join(5)
    assert got == [None] and pool.is_over is False
    pool.drain()
    assert one.told == ["drain"]


def test_a_lost_renderer_costs_an_attempt_unless_the_shot_had_got_further(tmp_path: Path) -> None:
    pool, (one,) = _pool(tmp_path, retries=1)
    pool.submit([_shot("a")])
    lost = Ended("again", "lost", "stage 1 died")
    for further in (0, 1, 2):  # each time it gets a chunk further: as often as it likes
        shot = pool.take(one)
        assert shot is not None
        pool.begun(one, shot, further, 0)
        pool.grew(one, shot, _chunk(further))
        pool.ended(one, shot, lost)
    shot = pool.take(one)
    assert shot is not None
    pool.begun(one, shot, 2, 0)
    pool.grew(one, shot, _chunk(2))  # what it had given before
    pool.ended(one, shot, lost)
    failure = Tree(str(tmp_path)).state("a").failure
    assert failure is not None and failure.kind == "lost" and failure.error == "stage 1 died (2 attempts)"
    assert failure.attempts == 2
    assert pool.take(one) is None and pool.ends["failed"] == 1


_FULL = Ended("again", "storage", "[Errno 28] No space left on device")


def test_a_disk_that_is_full_costs_no_shot_an_attempt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is begun until there is room, which is looked for after waits that grow; a drain ends that."""
    now, is_full = [0.0], [True]

    def try_room(tree: Tree, size: int) -> None:
        if is_full[0]:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tree, "try_room", try_room)
    pool, (one, other) = _pool(tmp_path, renderers=2, retries=1, poll_s=1000)
    pool._looked = time.monotonic()
    pool._outage = Outage(pool._tree, 5.0, lambda: now[0])
    pool.submit([_shot(id) for id in "abcdef"])
    caplog.set_level(logging.INFO, "pavdm_dist.farm.outage")
    a, b = pool.take(one), pool.take(other)
    assert a is not None and b is not None
    pool.begun(other, b, 0, 0)
    pool.grew(other, b, _chunk(0))  # into an encoder: it proves nothing of the disk
    pool.ended(one, a, _FULL)
    assert pool._outage.is_on
    pool.ended(other, b, _FULL)
    asked: list[Shot | None] = []
    waiting = threading.Thread(target=lambda: asked.append(pool.take(one)), daemon=True)
    waiting.start()
    waits = []
    for _ in range(8):
        waits.append(pool._outage._until - now[0])
        now[0] += waits[-1] - 0.1
        assert not pool._outage.look() and pool._outage._until - now[0] == pytest.approx(0.1), "not yet"
        now[0] += 0.1
        pool.tick()
    assert waits == pytest.approx([5, 10, 20, 40, 60, 60, 60, 60]) and asked == []
    said = [record.getMessage() for record in caplog.records if record.name == "pavdm_dist.farm.outage"]
    assert len(said) == 9 and "cannot be written ([Errno 28] No space left on device): nothing is begun" in said[0]
    assert "cannot be written for 15 s" in said[2] and "the next look is in 20 s" in said[2]

    is_full[0], now[0] = False, now[0] + 60
    pool.tick()
    waiting.join(5)
    assert [shot.id for shot in asked if shot is not None] == ["a"], "as if nothing had been"
    assert "can be written again, after" in caplog.text and pool.ends == Counter(again=2)
    assert not pool._running["a"].entry.attempts

    is_full[0] = True
    pool.ended(one, a, _FULL)
    waiting = threading.Thread(target=lambda: asked.append(pool.take(other)), daemon=True)
    waiting.start()
    pool.drain()
    waiting.join(5)
    assert asked[1:] == [None]


def test_a_shot_that_cannot_be_written_though_there_is_room_fails_alone(tmp_path: Path) -> None:
    """It costs an attempt, and holds nobody up; the last one of a farm, too."""
    pool, (one,) = _pool(tmp_path, retries=1)
    pool.submit([_shot("a", priority=9), _shot("b", priority=9), *(_shot(f"c{i}") for i in range(4))])
    while pool._waiting:
        shot = pool.take(one)
        assert shot is not None
        if shot.id not in "ab":
            pool.begun(one, shot, 0, 0)
        pool.ended(one, shot, _FULL if shot.id in "ab" else Ended("done"))
        assert not pool._outage.is_on
    assert pool.ends == Counter(again=2, failed=2, done=4)
    failure = Tree(str(tmp_path)).failure("a")
    assert failure is not None and failure.error == f"{_FULL.error} (2 attempts)" and failure.attempts == 2
    assert not list((tmp_path / "shots").glob(".*")), "what was tried with is gone"


def test_shots_that_need_more_than_there_is_soon_have_no_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state may be gigabytes; where it had no room, all that is left of it is the room."""
    rooms: list[int] = []

    def try_room(tree: Tree, size: int) -> None:
        rooms.append(size >> 20)
        if size > 40 * 2**20:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tree, "try_room", try_room)
    pool, (one,) = _pool(tmp_path, retries=1, retry_s=5.0)
    pool.submit([_shot(id) for id in "abcde"])
    for _ in range(4):
        shot = pool.take(one)
        assert shot is not None
        pool.ended(one, shot, _FULL)
    assert rooms == [8, 16, 32, 64] and pool._outage.is_on and pool.ends == Counter(again=4)
    pool._outage._until = 0.0
    monkeypatch.setattr(Tree, "try_room", lambda *_: None)
    assert pool._outage.look() and pool._outage._room == 64 * 2**20
    shot = pool.take(one)
    assert shot is not None
    pool.ended(one, shot, Ended("done"))
    assert pool._outage._room == 8 * 2**20


def test_failures_of_settings_count_apart(tmp_path: Path) -> None:
    pool, (one,) = _pool(tmp_path, max_failed=0)
    pool._endless = True
    pool.submit([_shot("a"), _shot("b")])
    for ended in (Ended("unfit", "", "begun otherwise"), Ended("failed", "otherwise", "made otherwise")):
        shot = pool.take(one)
        assert shot is not None
        pool.ended(one, shot, ended)
    assert pool.ends == Counter(unfit=1, otherwise=1) and not pool.ended_by
    failure = pool.unwritten("a")
    assert failure is not None and failure.kind == "unfit"
    assert not list(tmp_path.glob("shots/*/failed.json"))
    pool.cancel("a")
    assert pool.unwritten("a") is None


def test_a_folder_that_is_away_has_no_room(tmp_path: Path) -> None:
    (tmp_path / "shots").write_text("no folder")
    outage = Outage(Tree(str(tmp_path)), 5.0)
    assert outage.begins("full") and outage.is_on
    (tmp_path / "shots").unlink()
    assert not outage.look(), "too soon"
    outage._until = 0.0
    assert outage.look() and not outage.is_on and not outage.begins("of its own")


def test_frames_count_where_they_are_whoever_wrote_them(tmp_path: Path) -> None:
    """Of ten frames, two a chunk: what was there before, what is made again, and what nobody will make."""
    pool, (one,) = _pool(tmp_path, retries=1)
    pool.submit([_shot(id) for id in "abcde"])
    told = []

    def tell() -> None:
        told.append(pool.reached.frames)

    a = pool.take(one)
    assert a is not None
    pool.begun(one, a, 2, 0)  # its first four frames are of an earlier run
    pool.grew(one, a, _chunk(2))
    tell()
    pool.ended(one, a, Ended("again", "lost", "stage 1 died"))
    a = pool.take(one)
    assert a is not None and a.id == "a"
    pool.begun(one, a, 1, 0)  # its state on disk is older
    tell()
    pool.grew(one, a, _chunk(1))
    pool.ended(one, a, Ended("done"))
    tell()
    for ended in (Ended("done", "elsewhere"), Ended("failed", "input"), Ended("cancelled")):
        shot = pool.take(one)
        assert shot is not None
        pool.ended(one, shot, ended)
        tell()
    pool.cancel("e")
    tell()
    assert told == [6, 2, 10, 20, 30, 40, 50] and pool.frames == 4


def test_markers_that_cannot_be_looked_at_are_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share or a store that is away ends nothing."""
    pool, (one,) = _pool(tmp_path, poll_s=0.0, renderers=1)
    pool._options.renderers = 1
    pool.submit([_shot("a")])
    assert pool.take(one) is not None
    away: list[Exception] = [OSError(5, "Input/output error"), RuntimeError("SlowDown")]
    tree = pool._tree

    class Away(Tree):
        def is_marked(self, id: str, *markers: str) -> bool:
            raise away[0]

        @property
        def drains(self) -> bool:
            raise away[0]

    while away:
        pool._tree = Away(str(tmp_path))
        pool.tick()
        assert one.told == [] and not pool.ended_by
        away.pop(0)
    pool._tree = tree
    tree.mark("a", "cancel")
    pool.tick()
    assert one.told == ["cancel a"]
    (tmp_path / "drain").touch()
    pool.tick()
    assert one.told == ["cancel a", "drain"] and "drain: marker found" in pool.ended_by


def test_a_renderer_that_has_ended_gets_no_shot_in_whatever_thread_it_asks(tmp_path: Path) -> None:
    pool, (one, other) = _pool(tmp_path, renderers=2)
    pool.submit([_shot("a")])
    hand, asked = pool._crew.hands[0], list[Shot | None]()
    hand.over = True
    asked.append(pool.take(one))  # its thread has ended, and it is not buried yet
    pool._crew.reap()
    asked.append(pool.take(one))
    assert asked == [None, None] and pool._crew.hand(one) is None
    assert pool.take(other) == _shot("a")


def test_a_slow_store_holds_up_only_who_asks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _ = _pool(tmp_path)
    seen: list[dict[str, float]] = []

    def is_free(output: str) -> bool:
        assert output == Tree(str(tmp_path)).output("a")
        other = threading.Thread(target=lambda: seen.append(pool.figures), daemon=True)
        other.start()
        other.join(5)
        return True

    monkeypatch.setattr(pool._watch, "is_free", is_free)
    assert pool.is_free(_shot("a")) and len(seen) == 1, "all others waited for the store"


def _entries(found: Any, seen: set[int]) -> int:
    """Of all containers that objects of this package hold, or that these hold."""
    if id(found) in seen:
        return 0
    seen.add(id(found))
    if isinstance(found, dict):
        return len(found) + sum(_entries(one, seen) for pair in found.items() for one in pair)
    if isinstance(found, list | set | frozenset | tuple | deque):
        return len(found) + sum(_entries(one, seen) for one in found)
    if type(found).__module__.startswith("pavdm_dist.") and hasattr(found, "__dict__"):
        return _entries(vars(found), seen)
    return 0


def test_of_shots_that_are_over_nothing_is_kept(tmp_path: Path) -> None:
    """However each ends: in a farm of a hundred thousand all that grows with them grows for days."""
    pool, (one,) = _pool(tmp_path, retries=1)
    ends = ("done", "failed", "again done", "again again", "aside done", "saved cancelled", "dropped")
    whose = {"done": "elsewhere", "failed": "video", "again": "lost"}

    def render(name: str, how: str) -> None:
        shot = _shot(name)
        pool.submit([shot])
        lock = Path(parts_folder(pool._tree.output(name)), "lock.json")
        lock.parent.mkdir(parents=True)
        lock.write_text(json.dumps(asdict(Owner("elsewhere", "another machine", 1, 0, name))))
        for last in how.split():
            assert pool.take(one) == shot
            assert not pool.is_free(shot), "it is watched from now on"
            if last != "aside":
                pool.begun(one, shot, 0, 0)
                pool.grew(one, shot, _chunk(0))
                pool._said._log.emit(logging.LogRecord("x", logging.INFO, "", 0, "so far", None, None))
            if last == "dropped":
                pool.ended(one, shot, Ended("saved"))
                assert pool.cancel(name)
            else:
                pool.ended(one, shot, Ended(last, whose.get(last, "")))  # type: ignore[arg-type]
            while pool._waiting and not pool._waiting.ready:
                time.sleep(0.001)

    held = list[int]()
    for lap in range(3):
        for number in range(5):
            for kind, how in enumerate(ends):
                render(f"shot-{lap}-{number}-{kind}", how)
        held.append(_entries(pool, set()))
        assert not pool._waiting and pool.ends["done"] == 15 * (lap + 1) and pool.ends["cancelled"] == 10 * (lap + 1)
    assert held[0] == held[1] == held[2]


def test_a_failure_says_how_often_a_shot_was_begun(tmp_path: Path) -> None:
    pool, (one,) = _pool(tmp_path, retries=5)
    pool.submit([_shot("a"), _shot("b")])
    for ended in (Ended("again", "lost"), Ended("again", "stalled"), Ended("failed", "video", "not finite")):
        assert pool.take(one) == _shot("a")
        pool.begun(one, _shot("a"), 0, 0)
        pool.ended(one, _shot("a"), ended)
    assert pool.take(one) == _shot("b")
    pool.ended(one, _shot("b"), Ended("failed", "input", "no such clip"))
    assert [Tree(str(tmp_path)).failure(id).attempts for id in "ab"] == [3, 1]


def test_failed_shots_whose_record_is_damaged_are_listed_as_they_were_asked_for(tmp_path: Path) -> None:
    tree = Tree(str(tmp_path))
    shots = [Shot("a", "one", seed=3), Shot("b", "two", tags=("x",)), Shot("c", "three")]
    tree.keep("m.jsonl", shots[:2])
    for shot in shots:
        tree.fail(shot.id, Failure("why", shot={"id": shot.id, "prompt": shot.prompt}))
    for id in "bc":
        Path(tree.folder(id), "failed.json").write_text("{")
    assert write_failed(tree) == 2, "of the last one nothing is known"
    assert list(checked(tree.path("failed.jsonl"))) == [Shot("a", "one"), shots[1]]


def test_whose_fault_it_is() -> None:
    cases: list[tuple[BaseException, tuple[str, str]]] = [
        (ConfigError("x"), ("failed", "input")),
        (MediaError("x"), ("failed", "input")),
        (VideoError("latents are not finite"), ("failed", "video")),
        (KeyError("x"), ("failed", "video")),
        (StalledError("x"), ("again", "stalled")),
        (OSError(28, "No space left"), ("again", "storage")),
        (EngineError("x"), ("again", "lost")),
        (ResourcesError("x"), ("again", "lost")),
        (TakenError("x"), ("aside", "")),
        (BegunOtherwiseError("x", names=["seed"]), ("unfit", "")),
        (OtherMachineError("x", names=["versions.torch"]), ("unfit", "versions")),
        (OtherMachineError("x", names=["versions.torch", "decoder_threads"]), ("unfit", "")),
    ]
    for error, (how, kind) in cases:
        found = end_of(error)
        assert (found.how, found.kind if how != "aside" else "") == (how, kind), error


def test_what_is_kept_of_an_error_holds_no_secrets() -> None:
    """Only errors of this package come without."""
    address = "https://me:word@host/a.mp4?X-Amz-Signature=abc"
    assert end_of(OSError(f"{address} is gone")).error == "https://***@host/a.mp4?X-Amz-Signature=*** is gone"
    assert end_of(KeyError(address)).error.count("***") == 2


def test_renderers_come_as_shots_do_and_idle_ones_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _ = _pool(tmp_path, renderers=0, min_renderers=1)
    pool._options.renderers, pool._options.idle_s = 3, 0.05
    monkeypatch.setattr(pool._crew, "_make", FakeWaiting)
    FakeWaiting.pool = pool
    for shots, wanted in ((0, 1), (2, 2), (9, 3)):
        pool._crew.scale(shots, keeps=True)
        assert len(pool._crew.hands) == wanted
    pool._endless = True
    end = threading.Event()
    for _ in range(100):
        pool._crew.scale(0, keeps=True)
        pool._crew.reap()
        if len(pool._crew.hands) == 1:
            break
        end.wait(0.05)
    assert len(pool._crew.hands) == 1, "the fewest stay"
    pool.drain()


class FakeWaiting(FakeRenderer):
    """One that waits for shots as a real one does."""

    pool: Pool

    def run(self) -> None:
        renderer: Any = self
        while (shot := self.pool.take(renderer)) is not None:
            self.pool.ended(renderer, shot, Ended("done"))


class FakeLost(FakeRenderer):
    def run(self) -> None:
        raise ResourcesError("num_stages=1 needs 1 CPU; other jobs hold the rest")


def test_a_cluster_that_does_not_answer_holds_up_only_who_asks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, (renderer,) = _pool(tmp_path)
    pool.submit([_shot("a")])
    asked, answers = threading.Event(), threading.Event()

    def gangs(_: Any) -> tuple[int, bool]:
        asked.set()
        assert answers.wait(20)
        return 1, False

    monkeypatch.setattr("pavdm_dist.cluster.room.gangs_of_cluster", gangs)
    pool._kinds.engine = SimpleNamespace(bundles=list)
    asking = threading.Thread(target=pool.tick)
    asking.start()
    try:
        assert asked.wait(20)
        taken: list[Any] = []
        others = threading.Thread(target=lambda: taken.append((pool.take(renderer), pool.figures["running"])))
        others.start()
        others.join(timeout=20)
        assert taken == [(_shot("a"), 1)]
    finally:
        answers.set()
        asking.join(timeout=20)


def test_a_pool_whose_renderers_never_come_up_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _ = _pool(tmp_path, renderers=0, retries=1)
    pool._options.renderers = 1
    monkeypatch.setattr(pool._crew, "_make", FakeLost)
    pool.submit([_shot("a")])

    def go_round() -> None:
        for _ in range(50):
            pool.tick()
            pool.wait(0.02)

    with pytest.raises(ResourcesError, match="other jobs hold the rest"):
        go_round()
    assert pool._crew.lost == 2


def test_a_pool_that_ends_beside_other_work_says_so_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ticked, done = threading.Event(), list[str]()

    def tick() -> None:
        ticked.set()
        raise EngineError("no renderer comes up")

    pool: Any = SimpleNamespace(tick=tick)
    monkeypatch.setattr("pavdm_dist.farm.run.TICK_S", 0.01)

    def read() -> None:
        with _looked_after(pool):
            assert ticked.wait(20)
            done.append("a manifest is read")

    with pytest.raises(EngineError, match="no renderer comes up"):
        read()
    assert done and not any(thread.name == "pavdm-farm-tick" for thread in threading.enumerate())


def test_lines_of_a_renderer_are_told_of_all_its_shots() -> None:
    log = ShotLog()
    log.begun("renderer-1", "a")
    log.begun("renderer-2", "b")

    def say(text: str, thread: str, **extra: str | int) -> None:
        record = logging.LogRecord("pavdm_dist.x", logging.WARNING, "", 0, text, (), None)
        record.threadName = thread
        vars(record).update(extra)
        log.handle(record)

    say("stage 1 died", "pavdm-driver of renderer-1")
    say("mine", "MainThread", shot="b")
    say("nobody's", "MainThread")
    assert [line.rpartition(" WARNING ")[2] for line in log.tail("a")] == ["stage 1 died"]
    assert [line.rpartition(" WARNING ")[2] for line in log.tail("b")] == ["mine"]
    for number in range(80):
        say(str(number), "renderer-2")
    assert len(log.tail("b")) == 50 and log.tail("b")[-1].endswith("79")


def test_lines_of_a_stage_have_its_rank_and_the_shot_that_it_knows_by_number() -> None:
    file = io.StringIO()
    log = ShotLog(file)

    def say(text: str, **extra: int | str) -> dict[str, Any]:
        record = logging.LogRecord("pavdm_dist.engine.x", logging.WARNING, "", 0, text, (), None)
        record.threadName = "pavdm-driver of renderer-1"
        vars(record).update(extra)
        log.handle(record)
        found: dict[str, Any] = json.loads(file.getvalue().splitlines()[-1])
        return found

    for number, shot in ((7, "a"), (8, "b")):
        log.begun("renderer-1", shot)
        log.numbered("renderer-1", number, shot)
    log.numbered("renderer-2", 7, "other")
    told = say("no kernel", video=7, stage=1)
    assert (told["shot"], told["stage"], told["renderer"]) == ("a", 1, "renderer-1")
    assert say("warmed", video=8, stage="decoder")["shot"] == "b"
    with of_shot("a"):
        assert say("written")["shot"] == "a" and say("not its", video=8)["shot"] == "b"
    log.ended("renderer-1", "a")
    assert "shot" not in say("late", video=7, stage=0)
    assert [line.rpartition(" WARNING ")[2] for line in log.tail("a")] == ["no kernel", "written"]
    assert [line.rpartition(" WARNING ")[2] for line in log.tail("b")] == ["warmed", "not its"]
    log.close()


class FullDisk(io.StringIO):
    """A file whose disk is full."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_that_cannot_be_written_ends_itself_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package, file = logging.getLogger("pavdm_dist"), FullDisk()
    pool, (one,) = _pool(tmp_path)
    log = pool._said._log = ShotLog(file)
    package.addHandler(log)
    try:
        pool.submit([_shot("a")])
        shot = pool.take(one)
        assert shot is not None
        pool.begun(one, shot, 0, 0)
        # A fault of who logs is none of the shot's.
        log.handle(logging.LogRecord("pavdm_dist.x", logging.WARNING, "", 0, "%d", ("no number",), None))
        pool.ended(one, shot, end_of(VideoError("\udcff is no name")))
        failure = Tree(str(tmp_path)).state("a").failure
        assert failure is not None and failure.error == "\\udcff is no name"
        assert failure.log[-1].endswith(" WARNING shot a: failed: \\udcff is no name")
        assert file.closed, "given up at the first failure"
        package.warning("more", extra={"shot": "b"})
    finally:
        package.removeHandler(log)
        log.close()
    assert "Logging error" in capsys.readouterr().err


def test_what_is_said_of_a_shot_may_fail_but_its_record_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, (one,) = _pool(tmp_path)
    pool.submit([_shot("a")])
    shot = pool.take(one)
    assert shot is not None

    def fail(*_: object) -> None:
        raise OSError("the terminal is gone")

    monkeypatch.setattr(pool._said, "_tell", fail)
    with pytest.raises(OSError, match="the terminal is gone"):
        pool.ended(one, shot, Ended("failed", "input", "why"))
    failure = Tree(str(tmp_path)).state("a").failure
    assert failure is not None and failure.error == "why"


def test_a_failure_that_cannot_be_written_is_kept_and_written_later(tmp_path: Path) -> None:
    pool, (one,) = _pool(tmp_path, poll_s=0.0)
    pool._options.renderers = 1
    tree, way = pool._tree, tmp_path / "shots"
    pool.submit([_shot("a"), _shot("b"), _shot("c")])
    way.touch()  # nothing can be written into a file
    for id in ("a", "b"):
        shot = pool.take(one)
        assert shot is not None
        pool.ended(one, shot, Ended("failed", "storage", "No space left on device"))
        failure = pool.unwritten(id)
        assert failure is not None and failure.error == "No space left on device"
    pool.tick()
    assert pool.unwritten("a") is not None and pool.ends["failed"] == 2
    way.unlink()
    tree.mark("b", "cancel")  # which wants no record any more
    pool.tick()
    assert pool.unwritten("a") is None and pool.unwritten("b") is None
    state = tree.state("a")
    assert state.failure is not None and state.failure.error == "No space left on device"
    assert tree.state("b").standing == "cancelled"


def test_a_failure_that_could_not_be_written_is_when_the_pool_is_closed(tmp_path: Path) -> None:
    pool, (one,) = _pool(tmp_path)
    pool.submit([_shot("a")])
    shot = pool.take(one)
    assert shot is not None
    (tmp_path / "shots").touch()
    pool.ended(one, shot, Ended("failed", "storage", "No space left on device"))
    (tmp_path / "shots").unlink()
    pool.close()
    assert pool._tree.state("a").standing == "failed"


def test_a_shot_with_which_a_renderer_was_lost_is_rendered_alone(tmp_path: Path) -> None:
    """Its neighbours may have been to blame, or it: next time that is known."""
    pool, (one, other) = _pool(tmp_path, streams=2, renderers=2)
    pool.submit([_shot("a"), _shot("b"), _shot("c"), _shot("d")])
    held = [pool.take(one), pool.take(one)]
    assert [shot.id for shot in held if shot is not None] == ["a", "b"]
    for shot in held:
        assert shot is not None
        pool.begun(one, shot, 0, 0)
        pool.ended(one, shot, Ended("again", "lost", "stage 1 died"))
    first = pool.take(one)
    assert first is not None and first.id == "a"
    # The other suspect is not put beside it, nor is anything else.
    hand = pool._crew.hand(one)
    assert hand is not None and not pool._may_take(hand)
    pool.begun(one, first, 0, 0)
    pool.grew(one, first, _chunk(0))
    assert pool._may_take(hand)
    beside = pool.take(one)
    assert beside is not None and beside.id == "c", "b waits for a renderer of its own"
    assert pool.take(other).id == "b"  # type: ignore[union-attr]
