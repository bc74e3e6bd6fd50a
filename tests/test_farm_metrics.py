"""What a farm counts, and the dashboard that draws it."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pavdm_dist.cluster.metrics import Meters
from pavdm_dist.engine import actors, ray_engine
from pavdm_dist.farm.meters import ABOUT

DASHBOARD = Path(__file__).parent.parent / "cluster" / "grafana" / "farm.json"
GAUGES = {"waiting", "running", "renderers", "idle_share"}


def _told() -> set[str]:
    """Names as Prometheus gets them of Ray: counters with a suffix."""
    names = {*ABOUT, *actors._MEASURED, *ray_engine._MEASURED}
    return {
        f"ray_{name}" if name.partition("_")[2].partition("_")[2] in GAUGES else f"ray_{name}_total" for name in names
    }


def test_the_dashboard_asks_for_all_that_is_told_and_nothing_else() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    asked = {name for panel in panels for target in panel["targets"] for name in re.findall(r"ray_\w+", target["expr"])}
    assert asked == _told()
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [(panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy) for panel in panels
             for dx in range(panel["gridPos"]["w"]) for dy in range(panel["gridPos"]["h"])]  # fmt: skip
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24, "panels overlap"
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}


def test_meters_count_in_a_cluster_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.util import metrics

    told: list[tuple[Any, ...]] = []

    class Fake:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            told.append((name, description, tag_keys))

        def inc(self, amount: float, tags: dict[str, str]) -> None:
            told.append(("inc", amount, tags))

        def set(self, value: float, tags: dict[str, str]) -> None:
            told.append(("set", value, tags))

    monkeypatch.setattr(metrics, "Counter", Fake)
    monkeypatch.setattr(metrics, "Gauge", Fake)
    meters = Meters({"frames": "frames written", "queue": "waiting"}, ("stage",))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    meters.add("frames", 3)
    assert not told
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    meters.add("frames", 3, stage="1")
    meters.add("frames", 0)
    meters.add("frames", 2)
    meters.set("queue", 7)
    made = [entry for entry in told if entry[0] in ("frames", "queue")]
    assert made == [("frames", "frames written", ("stage",)), ("queue", "waiting", ("stage",))]
    assert [entry for entry in told if entry not in made] == [
        ("inc", 3, {"stage": "1"}), ("inc", 2, {"stage": ""}), ("set", 7, {"stage": ""}),
    ]  # fmt: skip
    with pytest.raises(KeyError):
        meters.add("other")


def test_who_has_not_imported_ray_does_not_for_a_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    Meters({"frames": "frames written"}).add("frames")
    assert "ray" not in sys.modules, "a farm in one process waits for it"


def test_a_meter_that_cannot_be_told_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray's own meters, which refuse a name that is none and a value that is no number."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    nameless, other = Meters({"": "of nothing"}), Meters({"queue": "waiting"})
    with caplog.at_level(logging.WARNING, "pavdm_dist"):
        for _ in range(3):
            nameless.add("")
            nameless.set("", 1.0)
            other.set("queue", "many")  # type: ignore[arg-type]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and said[0].startswith("the meter  cannot be told: ValueError: ")
    assert said[1].startswith("the meter queue cannot be told: TypeError: ")


def test_a_stage_tells_how_busy_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    told: list[tuple[Any, ...]] = []

    class Told:
        def __init__(self, *_: Any) -> None:
            pass

        def add(self, name: str, amount: float, **labels: str) -> None:
            told.append((name, amount, labels["stage"]))

        def set(self, name: str, value: float, **labels: str) -> None:
            told.append((name, value, labels["stage"]))
            over.set()

    over = threading.Event()
    monkeypatch.setattr(actors, "Meters", Told)
    monkeypatch.setattr(actors, "MEASURE_S", 0.05)
    loop: Any = SimpleNamespace(units=4, busy_s=0.02)
    actors._measure(loop, 1, over)
    (units, count, stage), (share, value, _) = told
    assert (units, count, stage, share) == ("pavdm_stage_units", 4, "1", "pavdm_stage_idle_share")
    assert 0.0 < value < 1.0
