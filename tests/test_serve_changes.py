"""Changed prompts outlive the server that took them, however it ends."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx2 as httpx
import pytest
from helpers import tiny_checkpoint
from test_serve_process import process

from pavdm_dist.farm.tree import Tree
from pavdm_dist.serve.changes import PROMPTS, Changes


class Told:
    """Stands for a pool: whatever it is told."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, int, str]] = []

    def __call__(self, *change: str | int) -> bool:
        self.changes.append(change)  # type: ignore[arg-type]
        return True

    def wait(self, count: int) -> list[tuple[str, int, str]]:
        end = time.monotonic() + 10
        while len(self.changes) < count and time.monotonic() < end:
            time.sleep(0.01)
        return self.changes


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(str(tmp_path))


def test_what_a_state_does_not_know_is_told_again_in_its_order(tree: Tree) -> None:
    before = Changes(tree, Told())
    before.begun("a")
    for from_chunk, text in ((0, "one"), (9, "two"), (0, "three")):
        before.take("a", from_chunk, text)
    assert before.pending("a", [(4, "one")]) == [(9, "two"), (0, "three")]
    before.grew("a", [])  # it was not begun anew
    told = Told()
    after = Changes(tree, told)
    after.begun("a")
    after.grew("a", [(4, "one"), (5, "three")])  # the last one stays the last
    assert told.wait(2) == [("a", 9, "two"), ("a", 0, "three")]
    after.grew("a", [])
    assert len(told.changes) == 2, "once is enough"
    after.ended("a", done=False)
    assert json.loads((tmp := Path(tree.folder("a")) / PROMPTS).read_text()) == [[0, "one"], [9, "two"], [0, "three"]]
    after.take("a", 1, "four")  # in the moment in which it ended
    assert len(json.loads(tmp.read_text())) == 4
    after.ended("a", done=True)
    assert not tmp.exists() and after.pending("a", []) == []


def test_nothing_is_kept_of_a_video_that_is_deleted_and_what_is_damaged_is_told_of(
    tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    changes = Changes(tree, Told())
    tree.mark("a", "cancel")
    changes.take("a", 0, "a secret prompt")
    assert [entry.name for entry in Path(tree.folder("a")).iterdir()] == ["cancel"]
    Path(tree.folder("b")).mkdir()
    (Path(tree.folder("b")) / PROMPTS).write_text("[[1")
    changes.begun("b")
    assert changes.pending("b", []) == [] and "cannot be read" in caplog.text


def test_a_changed_prompt_outlives_a_killed_server(tmp_path: Path) -> None:
    """Killed before a chunk was written that would have it."""
    words = (f"model={tiny_checkpoint(tmp_path / 'model')}", "guidance_scale=1", "--out", str(tmp_path / "out"))
    asked = {"prompt": "a red three", "num_frames": 45, "num_inference_steps": 90}
    change = {"prompt": "a blue seven", "from_chunk": 2}
    with process(*words) as (first, url):
        id = httpx.post(f"{url}/v1/videos", json=asked, timeout=60).json()["id"]
        end = time.monotonic() + 30
        while (answer := httpx.post(f"{url}/v1/videos/{id}/prompt", json=change, timeout=60)).status_code != 200:
            assert answer.status_code in (400, 409) and time.monotonic() < end, answer.text
            time.sleep(0.05)
        timeline = answer.json()
        assert [text for _, text in timeline["prompts"]] == ["a red three", "a blue seven"]
        first.kill()
        first.communicate(20)
    with process(*words) as (_, url):
        end = time.monotonic() + 60
        while (found := httpx.get(f"{url}/v1/videos/{id}", timeout=60).json())["status"] != "completed":
            assert found["status"] != "failed" and time.monotonic() < end, found
            time.sleep(0.1)
        _, (chunk, text) = httpx.get(f"{url}/v1/videos/{id}/timeline", timeout=60).json()["prompts"]
    assert text == "a blue seven" and 2 <= chunk < timeline["chunks"]
