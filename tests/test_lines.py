"""Lines that processes of a gang log: kept there, and told by the driver with the stage and the video they are of."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from test_decoding import Maker
from test_decoding import _latents as latents_of_length
from threaded import Threads, futures_for_references

from pavdm_dist.engine import actors, lines
from pavdm_dist.engine.actors import DecodeActor
from pavdm_dist.engine.decoding import Decoding
from pavdm_dist.engine.lines import Line, Lines, Listener, Speaker, of_video
from pavdm_dist.method.window import CleanChunk

logger = logging.getLogger("pavdm_dist.engine.stage")


def test_the_newest_are_kept_with_the_video_they_are_of(capsys: pytest.CaptureFixture[str]) -> None:
    kept = Lines.of_process()  # this one stands for an actor's
    logger.info("loaded")
    with of_video(3):
        logger.warning("%d of %d", 1, 2)
        with of_video(4):
            logger.info("within")
        try:
            raise ValueError("no such kernel")
        except ValueError:
            logger.exception("slower")
    logger.debug("not told")
    # Whoever logs never hears of a fault here.
    kept.handle(logging.LogRecord("pavdm_dist.x", logging.WARNING, "", 0, "%d", ("no number",), None))
    first, *others, fault = kept.take()
    assert first == Line(logging.INFO, logger.name, "loaded", None)
    assert [(line.text, line.video) for line in others] == [("1 of 2", 3), ("within", 4)]
    assert fault.video == 3 and fault.text.startswith("slower\nTraceback") and fault.text.endswith("no such kernel")
    said = capsys.readouterr().err
    assert "1 of 2\n" in said and "loaded" not in said, "Ray's file of the process has warnings, as ever"
    for number in range(lines.KEPT + 10):
        logger.info("%d", number)
    assert [line.text for line in kept.take()][:: lines.KEPT - 1] == ["10", str(lines.KEPT + 9)]
    assert kept.take() == []


def test_whoever_answers_is_told_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    futures_for_references(monkeypatch)
    monkeypatch.setattr(lines, "ANSWER_S", 0.01)
    refs = [Future[Any]() for _ in range(3)]
    answers = iter(refs)
    speakers = [
        Speaker("stage 0 of 2", 0, lambda: next(answers)),
        Speaker("stage 1 of 2", 1, lambda: next(answers)),
        Speaker("the decode actor", "decoder", lambda: next(answers), {7: 2}.get),
    ]
    listener = Listener()
    listener.listen(lambda: speakers)
    refs[0].set_result([Line(logging.WARNING, "pavdm_dist.models.x", "slow", 5)])
    refs[1].set_exception(ray.exceptions.ActorDiedError())
    with caplog.at_level(logging.INFO, "pavdm_dist"):
        listener.listen(lambda: speakers)
        listener.listen(lambda: speakers)
        refs[2].set_result([Line(logging.INFO, "pavdm_dist.codecs.x", text, key) for text, key in (("a", 7), ("b", 8))])
        listener.finish([])
    said = [(record.name, record.getMessage(), record.stage, record.video) for record in caplog.records]  # type: ignore[attr-defined]
    assert said == [
        ("pavdm_dist.models.x", "stage 0 of 2: slow", 0, 5),
        ("pavdm_dist.codecs.x", "the decode actor: a", "decoder", 2),
        ("pavdm_dist.codecs.x", "the decode actor: b", "decoder", lines.OVER),
    ]
    listener.listen(lambda: pytest.fail("asked again at once"))


def test_one_that_is_silent_holds_no_others_lines_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    futures_for_references(monkeypatch)
    monkeypatch.setattr(lines, "ASK_S", 0.0)
    frozen, asked = list[Future[Any]](), list[Future[Any]]()

    def ask(of: list[Future[Any]]) -> Future[Any]:
        of.append(Future())
        return of[-1]

    speakers = [Speaker("stage 0 of 2", 0, lambda: ask(frozen)), Speaker("stage 1 of 2", 1, lambda: ask(asked))]
    listener = Listener()
    with caplog.at_level(logging.INFO, "pavdm_dist"):
        for text in ("first", "second"):
            listener.listen(lambda: speakers)
            asked[-1].set_result([Line(logging.INFO, "pavdm_dist.x", text, None)])
        listener.listen(lambda: speakers)
        frozen[-1].set_result([Line(logging.INFO, "pavdm_dist.x", "awake", None)])
        listener.listen(lambda: speakers)
    assert [record.getMessage() for record in caplog.records] == [
        "stage 1 of 2: first",
        "stage 1 of 2: second",
        "stage 0 of 2: awake",
    ]
    assert len(frozen) == 2, "asked again only once it had answered"


def test_lines_of_a_decoder_are_of_the_video_that_it_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    futures_for_references(monkeypatch)
    monkeypatch.setattr(actors, "_node", lambda: "10.0.0.7")
    actor = DecodeActor(Maker(began=lambda: logger.info("a latent")), 1, "cpu")
    threads = Threads(actor)
    decoding = Decoding(threads, 5, 60)
    for stream in (11, 12):
        decoding.open(stream, None)
    decoding.decode(12, CleanChunk(0, latents_of_length(1)))
    decoding.decode(11, CleanChunk(0, latents_of_length(1)))
    for chunk in list(decoding._chunks):
        chunk.frames.result(5)
    speaker = decoding.speaker
    videos = [speaker.video(line.video) for line in speaker.ask().result(5) if line.video is not None]
    assert videos == [12, 11]
    for pool in threads.pools.values():
        pool.shutdown()


def test_a_gang_listens_while_it_is_polled_and_once_more_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_pauses import Time, gang_of

    futures_for_references(monkeypatch)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "kill", lambda _: None)
    gang, told = gang_of(Time(monkeypatch)), list[str]()
    said = iter([[Line(logging.WARNING, "pavdm_dist.x", text, None)] for text in ("first", "last")])
    gang._cast.stages = [Threads(SimpleNamespace(where=lambda: None, said=lambda: next(said)))]
    monkeypatch.setattr(lines, "tell", lambda found, speaker: told.extend(f"{speaker.name}: {x.text}" for x in found))
    while not told:
        gang.poll(0.01)
    gang.close()
    assert told == ["stage 0 of 1: first", "stage 0 of 1: last"]
