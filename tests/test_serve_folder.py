"""What lasts of a server: its folder, which may be moved, in a store, shared, and read as a farm's."""

from __future__ import annotations

import errno
import io
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from farms import finished_tree
from helpers import tiny_checkpoint
from PIL import Image
from serving import settings

from pavdm_dist.cli import main
from pavdm_dist.errors import ConfigError
from pavdm_dist.farm import tree as tree_module
from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.farm.progress import FarmProgress
from pavdm_dist.farm.report import write_report
from pavdm_dist.farm.run import run_command
from pavdm_dist.farm.settings import FarmConfig, validate_farm
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.status import failed_shots, settings_of_run, status_report
from pavdm_dist.farm.tree import Failure, Tree
from pavdm_dist.io.encode import export_to_video
from pavdm_dist.serve.asked import tree_at
from pavdm_dist.serve.front import Front
from pavdm_dist.serve.front_desk import FrontDesk
from pavdm_dist.serve.refusals import Refusal
from pavdm_dist.serve.settings import ServeConfig
from pavdm_dist.serve.tokens import TOKEN

ASKED = {"prompt": "a red three", "num_frames": "9"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    config = settings(tiny_checkpoint(tmp_path_factory.mktemp("model")))
    config.farm.poll_s = 0.05
    return config


@pytest.fixture(scope="module")
def kinds(config: ServeConfig) -> Kinds:
    return Kinds(config)


@contextmanager
def opened(config: ServeConfig, kinds: Kinds, root: str) -> Iterator[Front]:
    """A server without HTTP."""
    desk = FrontDesk(config, kinds, Tree(root))
    desk.open()
    try:
        yield Front(desk)
    finally:
        desk.close()


def completed(front: Front, id: str) -> None:
    end = time.monotonic() + 30
    while (found := front.get(id))["status"] != "completed":
        assert time.monotonic() < end and found["status"] != "failed", found
        time.sleep(0.02)


def picture() -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), (200, 30, 30), np.uint8)).save(file, "png")
    file.seek(0)
    return file


def test_a_folder_that_is_moved_has_what_its_videos_begin_with(
    config: ServeConfig, kinds: Kinds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    desk = FrontDesk(config, kinds, Tree("out"))  # never opened: it was killed before it rendered anything
    id = Front(desk).create(ASKED, picture())["id"]
    (line,) = [json.loads(path.read_text()) for path in Path("out/manifests").iterdir()]
    assert line["image"] == "input.png"
    os.rename("out", "moved")
    monkeypatch.chdir("/")
    with opened(config, kinds, str(tmp_path / "moved")) as front:
        completed(front, id)
    assert json.loads((tmp_path / "moved" / "shots" / id / "video.json").read_text())["identity"]["image"]


def test_a_servers_folder_is_known_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tree_at("out").root == str(tmp_path / "out") and tree_at("memory://x/").root == "memory://x"


def test_a_folder_that_cannot_be_used_is_told_of_in_one_sentence(
    config: ServeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a model is loaded or a cluster asked, where it can be."""
    monkeypatch.delenv(TOKEN, raising=False)

    def left(name: str, is_folder: bool) -> str:
        """A folder in which something else is in the way."""
        out = tmp_path / uuid.uuid4().hex
        (out / name).mkdir(parents=True) if is_folder else (out.mkdir(), (out / name).touch())
        return str(out)

    (dangling := tmp_path / "dangling").mkdir()
    (dangling / "serve.token").symlink_to("nowhere")
    cases = [
        (left("farm.json", True), "farm.json is a folder"),
        (left("shots", False), "shots is a file"),
        (left("manifests", False), "manifests is a file"),
        (left("serve.token", True), "serve.token: cannot be used: Is a directory"),
        (str(dangling), "serve.token: cannot be used: No such file"),
        ("/proc/xx", "/proc/xx"),
    ]
    for out, said in cases:
        assert main(["serve", "model=none", "http.port=0", "http.auth=token", "--out", out]) == 2
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1 and f"out={out}" in told[0] and said in told[0], told
    # What only writing shows is told of all the same.
    words = ["serve", f"model={config.model}", "http.port=0", "--out", "/proc/xx"]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "out=/proc/xx" in told and ": cannot be used: " in told and "Traceback" not in told


def test_whether_a_video_is_over_is_told_by_few_files(
    config: ServeConfig, kinds: Kinds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked ten times a second of each video that is watched, which may have thousands of segments."""
    desk, looked = FrontDesk(config, kinds, Tree(str(tmp_path))), list[str]()
    (tmp_path / "shots" / "a" / "video.mp4.parts").mkdir(parents=True)
    holds_work = tree_module.holds_work
    monkeypatch.setattr(tree_module, "holds_work", lambda parts: looked.append(parts) or holds_work(parts))
    monkeypatch.setattr(Tree, "lock", lambda _, id: looked.append(id))
    assert not desk.is_over("a") and not looked
    assert desk.state("a").standing == "queued" and looked
    desk.tree.fail("a", Failure("it was"))
    assert desk.is_over("a")
    desk.tree.forget_failure("a")
    desk.tree.mark("a", "cancel")
    assert desk.is_over("a")
    desk.closing = True
    assert desk.is_over("b")


def test_a_folder_in_a_store_takes_pictures_and_clips(config: ServeConfig, kinds: Kinds, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (33, 32, 48, 3), dtype=np.uint8)
    export_to_video(frames, str(tmp_path / "clip.mp4"), 24)
    with opened(config, kinds, f"memory://{uuid.uuid4().hex}") as front:
        clip = io.BytesIO((tmp_path / "clip.mp4").read_bytes())
        for reference in (picture(), clip):
            completed(front, id := front.create(ASKED, reference)["id"])
            kept = front.desk.tree.shots_of(f"{front.desk._stamp:020d}-{id}.jsonl")
            assert next(iter(kept)) == front.desk.shot(id)
    with pytest.raises(ConfigError, match=r"image=memory://none.png: no such file"):
        kinds.check(Shot("a", "a", image="memory://none.png"))


def test_clients_are_not_told_where_the_files_are(config: ServeConfig, kinds: Kinds, tmp_path: Path) -> None:
    front = Front(FrontDesk(config, kinds, Tree(str(tmp_path))))
    with pytest.raises(ConfigError) as raised:
        front.create(ASKED, io.BytesIO(b"\x89PNG\r\n\x1a\n but no more"))
    assert "image=input.png: is no readable picture" in str(raised.value) and str(tmp_path) not in str(raised.value)
    assert not list((tmp_path / "shots").iterdir())
    id = front.create(ASKED, None)["id"]
    output = front.desk.tree.output(id)
    front.desk.tree.fail(id, Failure(f"output={output} cannot be written: no space, see {tmp_path}/logs", "storage"))
    error = front.get(id)["error"]
    assert error == {"code": "storage", "message": "output=video.mp4 cannot be written: no space, see logs"}


def test_the_commands_of_farms_read_a_servers_folder(config: ServeConfig, kinds: Kinds, tmp_path: Path) -> None:
    with opened(config, kinds, str(tmp_path)) as front:
        completed(front, front.create(ASKED, None)["id"])
        failed = front.create({**ASKED, "num_frames": "900"}, None)["id"]
        front.desk.cancel(failed)
    tree = Tree(str(tmp_path))
    front = Front(FrontDesk(config, kinds, tree))
    id = front.create(ASKED, None)["id"]
    tree.fail(id, Failure("the disk was full", "storage"))
    report = status_report(str(tmp_path))
    assert (report["shots"], report["done"], report["failed"]) == (2, 1, 1)
    assert report["failures"] == [{"id": id, "kind": "storage", "error": "the disk was full"}]
    again = settings_of_run(tree, ["farm.retries=1"])
    validate_farm(again)
    assert type(again) is FarmConfig and again.model == config.model and again.chunks_per_segment == 1
    assert failed_shots(str(tmp_path), []) == [id]
    assert run_command(again, None, str(tmp_path), FarmProgress, [id])["done"] == 1
    write_report(str(tmp_path))
    assert front.get(id)["status"] == "completed"


def test_a_farms_shots_are_told_of_as_they_were_made(config: ServeConfig, kinds: Kinds, tmp_path: Path) -> None:
    """This server would make another length and size of them, and began after they were complete."""
    timed = {"overrides": {"timed_prompts": {"0s": "a red three", "1s": "a blue seven"}}}
    tree = finished_tree(tmp_path, [{"id": "made", **timed, "size": "64x64"}, {"id": "failed", **timed}])
    path = Path(tree.folder("made"), "video.json")
    made = {"prompt": "a red seven", "num_frames": 36, "created": "2026-01-02T03:04:05+00:00"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **made}))
    Path(tree.folder("failed"), "video.json").unlink()
    tree.fail("failed", Failure("no frame is finite"))
    with opened(config, kinds, str(tmp_path)) as front:
        began, complete, timeline = front.began_at, front.get("made"), front.timeline("made")
        failed, asked_prompts = front.get("failed"), front.timeline("failed")["prompts"]
    assert [complete[name] for name in ("status", "prompt", "seconds", "size")] == [
        "completed", "a red seven", "1.5", "48x32",
    ]  # fmt: skip
    assert complete["created_at"] == complete["completed_at"] == 1_767_323_045 < began
    assert (timeline["chunks"], timeline["done"], timeline["prompts"]) == (2, 2, [[0, "a red seven"]])
    assert (failed["prompt"], failed["created_at"], failed["completed_at"]) == ("a red three", began, None)
    assert asked_prompts == [[0, "a red three"]]


def test_a_video_whose_failure_cannot_be_written_has_failed(
    config: ServeConfig, kinds: Kinds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(config, kinds, str(tmp_path)) as front:
        with monkeypatch.context() as patch:
            patch.setattr(Tree, "fail", full)
            # A manifest's shot: the server's own are looked at before they are taken.
            front.desk.submit(Shot("a", "a", num_frames=9, image=str(tmp_path / "none.png")))
            end = time.monotonic() + 30
            # It leaves the queue a moment before its failure is told.
            while front.desk.unfinished or front.get("a")["status"] == "queued":
                assert time.monotonic() < end
                time.sleep(0.02)
            found = front.get("a")
            assert found["status"] == "failed" and found["error"]["code"] == "input", found
            assert "none.png" in found["error"]["message"] and front.desk.is_over("a")
            assert front.desk.tree.state("a").failure is None
        while front.desk.tree.state("a").standing != "failed":
            assert time.monotonic() < end
            time.sleep(0.02)
        assert front.get("a") == found


def test_servers_on_one_folder_know_each_others_videos(config: ServeConfig, kinds: Kinds, tmp_path: Path) -> None:
    one, other = (Front(FrontDesk(config, kinds, Tree(str(tmp_path)))) for _ in range(2))
    id = one.create(ASKED, picture())["id"]
    assert other.get(id) == one.get(id) and other.desk.shot(id) == one.desk.shot(id)
    assert [found["id"] for found in other.list(10, None, newest_first=True)["data"]] == [id]
    other.desk.cancel(id)
    for front in (one, other):
        with pytest.raises(Refusal, match="there is no video"):
            front.get(id)
        assert front.list(10, None, newest_first=True)["data"] == []
    one.desk.tree.keep("farm.jsonl", [Shot("a", "a")])
    for unknown in ("video_none", "a", "../shots", "x" * 5000, "\x00", ""):
        with pytest.raises(Refusal, match="there is no video"):
            other.get(unknown)
