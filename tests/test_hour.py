"""An hour of video, killed twice: nothing is missing, nothing grows (``benchmarks/hour.py`` does it)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
# Private memory from the first eighth behind the warm-up to the last one. Frames that stayed would be 22 MB an hour.
GROWTH_MB = 4.0


def hour(*arguments: str, timeout: float) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / "hour.py"), "--json", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found: dict[str, Any], frames: int) -> None:
    assert found["frames_on_disk"] == found["frames"] == frames
    assert found["without_gap"] and found["equal_latents"] and found["equal_packets"]
    assert found["chunk_seconds"] == found["chunks"]
    first, *others = found["lives"]
    assert first["went_on_at"] == 0 and len(others) == 2
    for number, life in enumerate(others, 1):
        # No more is made again than the open segment.
        assert 0 <= found["chunks"] * number // 3 + 1 - life["went_on_at"] <= 6
    for life in found["lives"]:
        for name, eighths in life["memory_mb"].items():
            assert eighths[-1] - eighths[0] < GROWTH_MB, (name, eighths)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_hour_killed_twice_is_the_undisturbed_one_at_constant_memory() -> None:
    found = hour(timeout=1400)
    check(found, 86_400)
    assert all(life["memory_mb"].keys() == {"driver"} for life in found["lives"])
    files = found["files_at_last_kill"]
    # Times of chunks are the one part of the state that grows.
    assert files["state.safetensors"] < 16_000 + 4 * found["chunks"]


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_stages_and_decoder_keep_their_memory() -> None:
    found = hour("--minutes", "8", "--stages", "2", timeout=650)
    check(found, 11_520)
    assert any(len(life["memory_mb"]) == 4 for life in found["lives"]), "driver, two stages, decoder"


@pytest.mark.slow
def test_a_minute_killed_twice() -> None:
    check(hour("--quick", timeout=200), 1440)
