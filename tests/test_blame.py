"""What is said of a lost actor: who, where, why, and where its log is and how that ends."""

from __future__ import annotations

import logging
import pickle
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import ray
from gangs import Watched, drive, streams_of
from threaded import futures_for_references

from pavdm_dist.engine.blame import control_results, stage_actors
from pavdm_dist.engine.driver import Driver
from pavdm_dist.engine.events import DecoderLost, Event, GangLost, Place
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.restart import Restarts
from pavdm_dist.errors import EngineError

PLACES = [Place("10.0.0.1", 11), Place("10.0.0.2", 22)]


def _loss(place: Place, is_fault: bool = False) -> GangLost:
    return GangLost(f"stage 1 of 2 ({place}) died: out of memory", 1, place, "out of memory", is_fault)


def test_the_error_of_a_spent_budget_says_all_there_is_to_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_SECRET", "9f8e7d6c5b4a39281706")
    log = tmp_path / "worker.err"
    log.write_text("\n".join(f"line {number}" for number in range(30)) + "\nkey 9f8e7d6c5b4a39281706\n")
    restarts, place = Restarts(EngineOptions(2, max_restarts=1)), Place("10.0.0.2", 22, str(log))
    assert restarts.delay(_loss(place)) == 1.0
    with pytest.raises(EngineError) as raised:
        restarts.delay(_loss(place))
    assert str(raised.value) == (
        "stage 1 of 2 (node 10.0.0.2, pid 22) died: out of memory; max_restarts=1 is spent;"
        f" its log: {log} on node 10.0.0.2"
    )
    (note,) = pickle.loads(pickle.dumps(raised.value)).__notes__
    first, *lines = note.splitlines()
    assert first == f"{log}:" and lines == [*(f"    line {number}" for number in range(21, 30)), "    key ***"]


def test_a_fault_that_would_come_again_says_so_too_and_a_log_elsewhere_is_named() -> None:
    with pytest.raises(GangLost, match="out of memory") as raised:
        Restarts(EngineOptions(2)).delay(_loss(Place("10.0.0.2", 22, "/tmp/no/such/worker.err"), is_fault=True))
    assert raised.value.__notes__ == ["/tmp/no/such/worker.err on node 10.0.0.2"]
    with pytest.raises(EngineError, match=r"out of memory; max_restarts=0 is spent$"):
        Restarts(EngineOptions(2, max_restarts=0)).delay(_loss(PLACES[1]))


def test_the_loss_of_a_decoder_has_its_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "decoder.err").write_text("no room in the store")
    place = Place("10.0.0.3", 33, str(tmp_path / "decoder.err"))

    class Losing(Watched):
        def poll(self, timeout: float) -> list[Event]:
            told = super().poll(timeout)
            return [DecoderLost(e.cause, place) if isinstance(e, DecoderLost) else e for e in told]

    gang = Losing(1, late=3, loses_decoder=[9, 10])
    with caplog.at_level(logging.WARNING), pytest.raises(GangLost) as raised:
        drive(Driver(gang, 2, max_restarts=1), streams_of("window"))
    assert raised.value.place == place and "no room in the store" in caplog.text
    assert raised.value.stage == "decoder" and {record.stage for record in caplog.records} == {"decoder"}  # type: ignore[attr-defined]
    with pytest.raises(
        EngineError, match=r"the decode actor died \(2 times in a row\).* its log: .*decoder\.err on node"
    ):
        Restarts(EngineOptions(2, max_restarts=0)).delay(raised.value)


def test_a_control_call_that_fails_names_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    futures_for_references(monkeypatch)

    def said(results: list[Any], timeout: float = 5.0, up: bool = True) -> GangLost:
        refs = [Future[Any]() for _ in results]
        for ref, result in zip(refs, results, strict=True):
            if isinstance(result, BaseException):
                ref.set_exception(result)
            elif result is not None:
                ref.set_result(result)
        with pytest.raises(GangLost) as raised:
            control_results(refs, timeout, stage_actors(2, PLACES if up else ()), "connect")
        return raised.value

    died = said([None, ray.exceptions.ActorDiedError()])
    assert str(died).startswith("stage 1 of 2 (node 10.0.0.2, pid 22) died, it was to connect: ")
    assert (died.rank, died.stage, died.place) == (1, 1, PLACES[1])
    failed = said([ray.exceptions.RayTaskError("connect", "ValueError: no such host", ValueError("no such host")), 0])
    assert str(failed) == "stage 0 of 2 (node 10.0.0.1, pid 11) failed: ValueError: no such host" and failed.rank == 0
    late = said([0, None], timeout=0.05, up=False)
    assert str(late) == "stage 1 of 2 did not connect within 0.05 s: nothing was heard of it" and late.rank == 1
    assert str(said([None, None], 0.05, False)).endswith("nothing was heard of it, nor of stage 1 of 2")
