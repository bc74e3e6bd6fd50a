"""Bad input of every kind ends in one sentence: no traceback, no hang, nothing half-written.

``pytest -m slow tests/test_fuzz.py -s`` draws more than a thousand cases and runs 30 of them as commands; a share of
them runs always. ``PAVDM_FUZZ_SEED`` draws others. What was drawn is counted in ``fuzz.json`` under pytest's folder of
temporary files.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzzing import ANY, CATEGORIES, as_process
from fuzzing.world import World
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings

SEED = int(os.environ.get("PAVDM_FUZZ_SEED", "0"))
SHARE = 15  # cases of each category that always run
LONGEST_S = 30.0

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.made(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, no cluster, and a working folder that files may land in."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Counts of a run, added to ``fuzz.json`` and printed."""
    found: dict[str, Any] = {}
    yield found
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    before = json.loads(path.read_text()) if path.exists() else {"seed": SEED}
    path.write_text(json.dumps({**before, **found}, indent=2))
    print(f"\nfuzz, seed {SEED}: {json.dumps(found)} ({path})")


def draw(category: str, number: int, world: World, report: dict[str, Any]) -> None:
    """Draws and judges so many cases."""
    chosen, counts = CATEGORIES[category], Counter[str]()

    @seed(SEED)
    @hypothesis_settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(chosen.cases)
    def judge(case: Any) -> None:
        began = time.monotonic()
        said = chosen.judge(chosen.prepare(case, world), case, world)
        assert time.monotonic() - began < LONGEST_S, "this took too long"
        counts["taken" if said == "taken" else "refused"] += 1

    logging.getLogger("pavdm_dist").setLevel(logging.CRITICAL)
    judge()
    report[category] = dict(counts)
    assert counts["refused"] > number / 10, counts


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_share_of_bad_input_is_refused(category: str, world: World, report: dict[str, Any]) -> None:
    draw(category, SHARE, world, report)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("category", CATEGORIES)
def test_bad_input_is_refused(category: str, world: World, report: dict[str, Any]) -> None:
    draw(category, CATEGORIES[category].full, world, report)


def run(number: int, world: World, report: dict[str, Any]) -> None:
    """Draws so many cases of any category and gives each to a process."""
    counts, done = Counter[str](), []

    @seed(SEED)
    @hypothesis_settings(
        max_examples=4 * number, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(ANY)
    def judge(drawn: tuple[str, Any]) -> None:
        # The simplest of each kind come first; the others are what is wanted.
        if len(done) < number and repr(drawn) not in done:
            name, case = drawn
            said = as_process(name, case, world)
            if said != "not for a command line":
                done.append(repr(drawn))
                counts[f"{name}, {'taken' if said == 'taken' else 'refused'}"] += 1

    judge()
    report["processes"] = dict(counts)
    assert sum(counts.values()) == number


def test_commands_refuse_bad_input(world: World, report: dict[str, Any]) -> None:
    run(2, world, report)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_thirty_commands_refuse_bad_input(world: World, report: dict[str, Any]) -> None:
    run(30, world, report)
