"""What the page is told of the stages of a video that is being rendered; without a model, a cluster or a browser."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pavdm_dist.engine.events import AtWork
from pavdm_dist.engine.order import WHOLE, Unit
from pavdm_dist.farm.desk import Sight

records = pytest.importorskip("pavdm_dist.serve.records", reason="needs pavdm-dist[serve]")
DESK: Any = SimpleNamespace(split=[(0, 3), (3, 5), (5, 6)])


def _unit(stream: int, row: int, branch: int = 0, chunk: int = WHOLE) -> Unit:
    return Unit(0, stream, row, branch, True, True, (), False, False, chunk)


def test_each_stage_says_which_unit_it_finished_last_and_of_which_video() -> None:
    sight = Sight(AtWork("", 4, (2, 3), (_unit(7, 9, 1), _unit(8, 5, chunk=2), None)), {7: "mine", 8: "other"})
    first, second, third = records._stages(DESK, "mine", sight)
    assert first == {"stage": 0, "blocks": [0, 3], "at_work": True, "video": "mine", "row": 9, "branch": 1}
    assert second == {
        "stage": 1, "blocks": [3, 5], "at_work": False, "video": "other", "row": 5, "branch": 0, "chunk": 2,
    }  # fmt: skip
    assert third == {"stage": 2, "blocks": [5, 6], "at_work": False, "video": None}
    # A unit of a video that has ended meanwhile is nobody's.
    (gone, *_) = records._stages(DESK, "mine", Sight(AtWork("", 4, (), (_unit(1, 9),)), {7: "mine"}))
    assert gone == {"stage": 0, "blocks": [0, 3], "at_work": False, "video": None}
    assert [stage["video"] for stage in records._stages(DESK, "mine", None)] == [None] * 3


def test_the_row_is_the_newest_that_anybody_tells() -> None:
    progress = records.Progress(1, row=4)
    units = (_unit(7, 9), _unit(8, 99), None)
    assert records._row("mine", None, None, 20) == 0
    assert records._row("mine", progress, None, 20) == 4
    assert records._row("mine", progress, Sight(AtWork("", 6), {7: "mine"}), 20) == 6
    assert records._row("mine", progress, Sight(AtWork("", 6, (), units), {7: "mine", 8: "other"}), 20) == 9
    assert records._row("mine", progress, Sight(AtWork("", 30), {7: "mine"}), 20) == 20
