"""Bad input of every kind ends in one sentence: no traceback, no hang, nothing half-written.

``pytest -m slow tests/test_fuzz.py -s`` draws so many cases that a thousand are refused, and runs 30 as commands; a
share of them runs always. ``PAVDM_FUZZ_SEED`` draws others. Seed and counts are printed, and kept in ``fuzz.json``
under pytest's folder of temporary files; ``benchmarks/README.md`` has those of a run.
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
from fuzzing import ANY, CATEGORIES, as_process, check_nothing_partial
from fuzzing.world import World
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings

from pavdm_dist.io.storage import stage

SEED = int(os.environ.get("PAVDM_FUZZ_SEED", "0"))
SHARE = 15  # cases of each category that always run
REFUSED = 1000  # of all categories, in the full run
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
def test_a_thousand_bad_inputs_are_refused(world: World, report: dict[str, Any]) -> None:
    for name, category in CATEGORIES.items():
        draw(name, category.full, world, report)
    counts = Counter[str]()
    for name in CATEGORIES:
        counts.update(report[name])
    report["together"] = dict(counts)
    assert counts["refused"] >= REFUSED, counts


def test_what_a_command_must_not_leave_is_found_wherever_it_lies(tmp_path: Path) -> None:
    """Planted: a final file without its sidecar, latents alone, and staged files, in a batch's folder and in parts."""
    given = [tmp_path / "clip.mp4", tmp_path / "model"]
    for name in ("clip.mp4", "model/vae/x.safetensors", "v.mp4.parts/segment-000000-000001.mp4", "out/whole.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "out" / "whole.json").write_text(json.dumps({"versions": {"pavdm_dist": "1"}}))
    check_nothing_partial(tmp_path, given)
    for name in ("o.mp4", "out/0000-a-s0.mp4", "out/0000-a-s0.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(AssertionError, match=f"{name} is not complete"):
            check_nothing_partial(tmp_path, given)
        (tmp_path / name).unlink()
    for name in ("o.mp4", "out/o.mp4", "v.mp4.parts/state.safetensors"):
        staged = stage(tmp_path / name)
        with pytest.raises(AssertionError, match="was staged and left"):
            check_nothing_partial(tmp_path, given)
        staged.parent.rmdir()
    (tmp_path / "o.mp4").touch()
    (tmp_path / "o.json").write_text("{}")  # and not just any file of that name
    with pytest.raises(AssertionError, match=r"o\.mp4 is not complete"):
        check_nothing_partial(tmp_path, given)


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
