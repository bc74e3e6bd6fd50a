"""``pavdm serve``: a real server of a tiny model, asked with OpenAI's own client, over sockets, and wrongly."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import httpx2 as httpx
import numpy as np
import pytest
import torch
from helpers import tiny_checkpoint
from needs import needs
from serving import Served, ask, served, settings, storm

from pavdm_dist.commands.progress import ChunkProgress
from pavdm_dist.commands.sample import render_command
from pavdm_dist.config import PromptChange, SampleConfig
from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.farm.settings import PoolConfig
from pavdm_dist.farm.shot import Shot, make_shot
from pavdm_dist.farm.tree import Tree
from pavdm_dist.io.metadata import read_sidecar, versions
from pavdm_dist.io.parts import parts_folder
from pavdm_dist.serve.fragments import fragments, mime_type
from pavdm_dist.serve.front import Front
from pavdm_dist.serve.front_desk import FrontDesk
from pavdm_dist.serve.live import LOOK_S
from pavdm_dist.serve.refusals import Refusal
from pavdm_dist.serve.run import _listen
from pavdm_dist.serve.settings import asks_for_token, is_loopback, validate_serve

if TYPE_CHECKING:
    import openai

needs("needs OpenAI's client", "openai")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One for all tests that do not end it."""
    config = settings(model, http={"max_queue": 1000, "max_body_mib": 1.0, "max_seconds": 60.0})
    with served(config, tmp_path_factory.mktemp("out")) as running:
        yield running


def client_of(server: Served, token: str = "none") -> openai.OpenAI:
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=token, max_retries=0)


def packets(file: Any) -> list[tuple[int, bytes]]:
    """Time and bytes of every packet of a video."""
    with av.open(file) as container:
        stream = container.streams.video[0]
        found = [packet for packet in container.demux(stream) if packet.size]
        return [(round(packet.pts * packet.time_base * stream.average_rate), bytes(packet)) for packet in found]


def post(server: Served, **fields: Any) -> httpx.Response:
    # As Python writes JSON, which has a way to say halves of characters, too.
    headers = {"content-type": "application/json"}
    return ask.post(f"{server.url}/v1/videos", content=json.dumps(fields), headers=headers)


def message(answer: httpx.Response) -> str:
    text = answer.json()["error"]["message"]
    assert "Traceback" not in answer.text and "\n" not in text
    return text


# --- OpenAI's client ------------------------------------------------------------------------------------------------


def test_openais_client_makes_polls_fetches_lists_and_deletes_a_video(server: Served, tmp_path: Path) -> None:
    import openai

    client = client_of(server)
    video = client.videos.create(prompt="a red three", seconds="1", size="48x32", extra_body={"seed": 7})
    assert (video.object, video.prompt, video.seconds, video.size) == ("video", "a red three", "1", "48x32")
    assert video.status in ("queued", "in_progress") and video.created_at > 1_700_000_000
    done = client.videos.poll(video.id)
    assert (done.status, done.progress, done.error) == ("completed", 100, None) and done.completed_at is not None
    fetched = client.videos.download_content(video.id).read()
    assert fetched == Path(server.desk.tree.output(video.id)).read_bytes()
    # The same bits as the command line makes.
    made = SampleConfig(
        prompt="a red three", seconds=1.0, seed=7, height=32, width=48, model=server.desk.config.model,
        output=str(tmp_path / "a.mp4"), chunks_per_segment=1,
    )  # fmt: skip
    (result,) = render_command(made, False, ChunkProgress)["videos"]
    assert read_sidecar(server.desk.tree.output(video.id))["latents_sha256"] == result["latents_sha256"]
    assert packets(io.BytesIO(fetched)) == packets(result["output"])
    # Lists go by pages, the newest first.
    others = [client.videos.create(prompt="a blue seven", seconds="0.5").id for _ in range(3)]
    assert [one.id for one in client.videos.list(limit=2)][:3] == others[::-1]
    page = client.videos.list(limit=2, order="asc")
    assert page.data[0].id == video.id and page.has_more
    assert client.videos.delete(video.id).deleted
    for call in (client.videos.retrieve, client.videos.delete, client.videos.download_content):
        with pytest.raises(openai.NotFoundError, match="there is no video"):
            call(video.id)
    assert [entry.name for entry in Path(server.desk.tree.folder(video.id)).iterdir()] == ["cancel"]
    assert video.id not in [one.id for one in client.videos.list()]
    for one in others:
        server.wait(one)


def test_a_video_begins_with_a_picture_that_is_sent_along(server: Served) -> None:
    import openai
    from PIL import Image

    picture = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), (200, 30, 30), np.uint8)).save(picture, "png")
    picture.seek(0)
    video = client_of(server).videos.create(
        prompt="a red three", seconds="0.5", input_reference=("three.png", picture, "image/png")
    )
    server.wait(video.id)
    # Its pixels are part of what the video is.
    assert read_sidecar(server.desk.tree.output(video.id))["identity"]["image"]
    for content, said in (
        (b"no picture at all", "must be a picture"),
        (b"\x89PNG\r\n\x1a\n but no more", "no readable"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            client_of(server).videos.create(prompt="a", input_reference=("a.png", io.BytesIO(content), "image/png"))


def test_a_picture_of_very_many_pixels_is_refused_before_it_is_decoded(server: Served) -> None:
    import time

    from PIL import Image

    picture = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(picture, "png")  # 10 kB
    began = time.process_time()
    answer = ask.post(
        f"{server.url}/v1/videos", data={"prompt": "a"}, files={"input_reference": ("a.png", picture.getvalue())}
    )
    assert answer.status_code == 400 and time.process_time() - began < 1.0
    said = "input_reference: is 9000x9000, and may have 50 million pixels at most; scale it down"
    assert message(answer) == said


def test_players_ask_for_what_there_is_and_for_parts_of_it(server: Served) -> None:
    id = post(server, prompt="a red three", num_frames=9, input_reference=None).json()["id"]
    server.wait(id)
    content = f"{server.url}/v1/videos/{id}/content"
    whole = ask.get(content).content
    head = ask.head(content)
    assert head.status_code == 200 and head.headers["content-length"] == str(len(whole)) and not head.content
    assert ask.get(content, headers={"range": "bytes=4-7"}).content == whole[4:8]
    for range, status in (("bytes=a-b", 400), ("frames=1-2", 400), ("bytes", 400), ("bytes=99999999-", 416)):
        answer = ask.get(content, headers={"range": range})
        assert answer.status_code == status and answer.headers["content-range"] == f"bytes */{len(whole)}"
        assert message(answer) == f"Range: {range}: must be bytes=FIRST-LAST within the {len(whole)} bytes of the video"
    answer = ask.post(f"{server.url}/v1/videos", data={"prompt": "a", "input_reference": "a.png"})
    assert answer.status_code == 400 and message(answer).startswith("input_reference: must be a file of a form")


@pytest.mark.parametrize("size", ["16384x16384", "16384x8", "8x16384", "104x64"])
def test_the_size_that_is_named_in_the_place_of_a_larger_one_may_be(server: Served, size: str) -> None:
    said = message(post(server, prompt="a", num_frames=9, size=size))
    nearest = said.rpartition("size=")[2]
    width, height = map(int, nearest.split("x"))
    assert 4000 <= width * height <= 6144, said
    id = post(server, prompt="a", num_frames=9, size=nearest).json()["id"]
    assert ask.delete(f"{server.url}/v1/videos/{id}").status_code == 200


# --- live -----------------------------------------------------------------------------------------------------------


def test_the_first_frames_are_watched_while_the_rest_is_sampled(server: Served) -> None:
    server.desk.hold(1)
    try:
        id = post(server, prompt="a red three", seconds=2).json()["id"]
        with ask.stream("GET", f"{server.url}/v1/videos/{id}/live") as answer:
            assert answer.headers["content-type"] == "video/mp4"
            pieces = answer.iter_raw()
            early = next(pieces)
            while b"mdat" not in early:
                early += next(pieces)
            # The bytes come a moment before the chunk is counted.
            while not (told := ask.get(f"{server.url}/v1/videos/{id}/timeline").json())["done"]:
                time.sleep(0.05)
            assert (told["done"], told["prompts"]) == (1, [[0, "a red three"]]) and told["chunks"] > 4
            # Where it is: in this process, behind the first shift that gave a chunk.
            assert (told["engine"], told["stages"], told["decoding"]) == ("one process", [], [])
            assert 0 < told["row"] < told["rows"] and told["awaited"] == f"row {told['row']} comes next"
            # The chunks behind it are on their way, the later the noisier.
            levels = [one["level"] for one in told["window"]]
            assert [one["chunk"] for one in told["window"]] == [1, 2, 3] and levels == sorted(levels) and levels[0] > 0
            assert ask.get(f"{server.url}/v1/videos/{id}").json()["status"] == "in_progress"
            # What is there of it can be played.
            first = len(packets(io.BytesIO(early)))
            assert 0 < first < 48
            server.desk.let()
            whole = early + b"".join(pieces)
        found = server.wait(id)
    finally:
        server.desk.let()
    content = ask.get(f"{server.url}/v1/videos/{id}/content").content
    assert found["status"] == "completed" and packets(io.BytesIO(whole)) == packets(io.BytesIO(content))
    # Whoever comes late sees the same.
    assert packets(io.BytesIO(ask.get(f"{server.url}/v1/videos/{id}/live").content)) == packets(io.BytesIO(content))


def test_a_socket_gives_the_same_bytes_with_what_a_browser_must_know(server: Served) -> None:
    from websockets.sync.client import connect

    id = post(server, prompt="a blue seven", seconds=1).json()["id"]
    texts, data = [], b""
    with connect(f"{server.url.replace('http', 'ws')}/v1/videos/{id}/live") as sock:
        for part in sock:
            if isinstance(part, bytes):
                data += part
            else:
                texts.append(json.loads(part))
    assert texts == [{"mime": mime_type(server.desk.tree.output(id))}, {"status": "completed"}]
    assert texts[0]["mime"].startswith('video/mp4; codecs="avc1.')
    assert packets(io.BytesIO(data)) == packets(server.desk.tree.output(id))
    with (
        pytest.raises(Exception, match=r"4404|403"),
        connect(f"{server.url.replace('http', 'ws')}/v1/videos/x/live") as sock,
    ):
        sock.recv()


def test_a_viewer_that_goes_is_let_go_of_while_its_video_waits(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from websockets.sync.client import connect

    asked: list[str] = []
    is_over = server.desk.is_over

    def counted(id: str) -> bool:
        asked.append(id)
        return is_over(id)

    monkeypatch.setattr(server.desk, "is_over", counted)
    server.desk.hold(1)
    try:
        first, waiting = (post(server, prompt="a red three", seconds=1).json()["id"] for _ in range(2))
        address = f"{server.url.replace('http', 'ws')}/v1/videos/{waiting}/live"
        with connect(address) as sock:
            sock.send("of no interest")
            while waiting not in asked:
                time.sleep(0.01)
        deadline, seen = time.monotonic() + 10, -1
        while seen != (seen := asked.count(waiting)):
            assert time.monotonic() < deadline, "the video is looked at although nobody watches"
            time.sleep(5 * LOOK_S)
        assert server.front.get(waiting)["status"] == "queued"
    finally:
        server.desk.let()
    for id in (first, waiting):
        server.wait(id)


def test_fragments_of_parts_are_those_of_the_whole(server: Served) -> None:
    output = server.desk.tree.output(server.wait(post(server, prompt="a", seconds=3).json()["id"])["id"])
    whole = b"".join(data for data, _ in fragments(output))
    assert sum(count for _, count in fragments(output)) == 72 and packets(io.BytesIO(whole)) == packets(output)
    key = next(index for index, (_, packet) in enumerate(packets(output)[1:], 1) if packet[4] & 31 in (5, 6, 7))
    start = next(fragments(output))[0]
    rest = b"".join(data for data, _ in fragments(output, key, key, header=False))
    assert packets(io.BytesIO(start + rest)) == packets(output)[key:]
    # From within what depends on earlier frames it begins at the next one that does not, without a gap in its times.
    (_, first), *rest = fragments(output, 1, 1)
    assert sum(count for _, count in rest) == 72 - key and first == 0
    again = packets(io.BytesIO(start + b"".join(data for data, _ in rest)))
    assert again == [(time - key + 1, data) for time, data in packets(output)[key:]]


def test_a_prompt_is_changed_in_mid_video(server: Served) -> None:
    server.desk.hold(2)
    try:
        id = post(server, prompt="a red three", seconds=3).json()["id"]
        url = f"{server.url}/v1/videos/{id}/prompt"
        while not server.desk.has(id, chunks=2):
            time.sleep(0.01)
        for fields, said in (
            ({}, "must be text"),
            ({"prompt": "a", "from_chunk": 99}, "has chunks 0 to"),
            ({"x": 1}, "the fields are"),
            ({"prompt": "a", "from_chunk": "1" * 5000}, "from_chunk=1+[.]{3}: must be a whole number"),
            ({"prompt": "a", "from_chunk": "²"}, "must be a whole number"),
            ({"prompt": "a", "from_chunk": [1]}, "must be a whole number"),
            ({"prompt": "\ud800"}, "half a character"),
            ({"prompt": "a" * 4001}, "at most 4000"),
        ):
            refused = ask.post(url, content=json.dumps(fields), headers={"content-type": "application/json"})
            assert refused.status_code == 400 and re.search(said, message(refused))
        told = ask.post(url, data={"prompt": "a blue seven"})
        # No chunk has it yet; the next one that is born will, or the one behind it.
        assert told.status_code == 200
        first, (coming, text) = told.json()["prompts"]
        assert first == [0, "a red three"] and coming > 2 and text == "a blue seven"
        server.desk.let()
        server.wait(id)
    finally:
        server.desk.let()
    (change,) = read_sidecar(server.desk.tree.output(id))["extra"]["prompt_changes"]
    assert change[0] > 2 and change[1] == "a blue seven"
    told = ask.get(f"{server.url}/v1/videos/{id}/timeline").json()
    assert told["prompts"] == [[0, "a red three"], change] and told["done"] == told["chunks"] and told["window"] == []
    late = ask.post(url, json={"prompt": "a red three"})
    assert late.status_code == 409 and "is not being rendered" in message(late)


def test_a_video_whose_chunks_are_all_born_takes_no_prompt(server: Served) -> None:
    """Whoever is told that a change was taken sees it in the video."""
    server.desk.hold(3)
    try:
        id = post(server, prompt="a red three", num_frames=33).json()["id"]
        while not server.desk.has(id, chunks=3):
            time.sleep(0.01)
        told = ask.get(f"{server.url}/v1/videos/{id}/timeline").json()
        assert told["chunks"] == 5 and told["window"][-1]["chunk"] == 4, "it is not over, and nothing more is born"
        late = ask.post(f"{server.url}/v1/videos/{id}/prompt", json={"prompt": "a blue seven"})
        assert late.status_code == 409 and message(late).startswith(f"all chunks of video {id} are born")
        assert not (Path(server.desk.tree.folder(id)) / "prompts.json").exists()
    finally:
        server.desk.let()
    server.wait(id)


def test_a_complete_video_takes_no_prompt_though_its_renderer_holds_it_still(server: Served) -> None:
    server.desk.hold(2)
    try:
        id = post(server, prompt="a red three", seconds=0.5).json()["id"]
        assert server.desk.num_chunks(server.desk.shot(id)) == 2
        server.wait(id)
        while not server.desk.has(id, chunks=2):
            time.sleep(0.01)
        late = ask.post(f"{server.url}/v1/videos/{id}/prompt", json={"prompt": "a blue seven"})
        assert late.status_code == 409 and "is not being rendered" in message(late)
    finally:
        server.desk.let()


def test_a_video_is_cancelled_where_it_is(server: Served) -> None:
    server.desk.hold(1)
    try:
        running, waiting = (post(server, prompt="a red three", seconds=30).json()["id"] for _ in range(2))
        with ask.stream("GET", f"{server.url}/v1/videos/{running}/live") as answer:
            pieces = answer.iter_raw()
            next(pieces)
            for id in (waiting, running):
                assert ask.delete(f"{server.url}/v1/videos/{id}").json() == {
                    "id": id, "object": "video.deleted", "deleted": True,
                }  # fmt: skip
                assert ask.get(f"{server.url}/v1/videos/{id}").status_code == 404
            server.desk.let()
            list(pieces)  # the stream ends with the video
    finally:
        server.desk.let()
    deadline = time.monotonic() + 30
    while {running, waiting} & {shot.id for shot in server.desk.shots()}:  # until their files are gone
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for id in (waiting, running):
        left = set(Path(server.desk.tree.folder(id)).iterdir())
        assert {path.name for path in left} == {"cancel"}, left
        assert not list(Path(server.desk.tree.path("manifests")).glob(f"*{id}*"))


# --- what lasts -----------------------------------------------------------------------------------------------------


def test_a_server_that_is_started_again_goes_on_with_the_same_videos(model: Path, tmp_path: Path) -> None:
    config = settings(model)
    with served(config, tmp_path / "out") as first:
        first.desk.hold(3)
        ids = [post(first, prompt="a red three", seconds=2, seed=seed).json()["id"] for seed in (3, 4)]
        deleted = post(first, prompt="a blue seven").json()["id"]
        assert ask.delete(f"{first.url}/v1/videos/{deleted}").status_code == 200
        while not first.desk.has(ids[0], chunks=3):
            time.sleep(0.01)
        before = [first.front.get(id) for id in ids]
    # Saved where it was: nothing is complete, what was made is there.
    tree = Tree(str(tmp_path / "out"))
    assert [tree.state(id).standing for id in ids] == ["begun", "queued"] and tree.seconds_rendered(ids[0]) > 0
    with served(config, tmp_path / "out") as second:
        after = [second.wait(id) for id in ids]
        assert [one["created_at"] for one in after] == [one["created_at"] for one in before]
        assert [one["id"] for one in second.front.list(10, None, newest_first=False)["data"]] == ids
        assert ask.get(f"{second.url}/v1/videos/{deleted}").status_code == 404
    made = SampleConfig(
        prompt="a red three",
        seconds=2.0,
        seed=3,
        model=str(model),
        output=str(tmp_path / "a.mp4"),
        chunks_per_segment=1,
    )
    (result,) = render_command(made, False, ChunkProgress)["videos"]
    assert packets(tree.output(ids[0])) == packets(result["output"])
    assert read_sidecar(tree.output(ids[0]))["latents_sha256"] == result["latents_sha256"]


def test_a_video_that_was_begun_by_other_versions_is_begun_anew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a farm it would wait for a machine that has them; here none comes, and its client can do nothing about it."""
    config = settings(model, farm=PoolConfig(poll_s=0.05))
    with served(config, tmp_path / "out") as first:
        first.desk.hold(2)
        id, other = (post(first, prompt="a red three", seconds=2, seed=7).json()["id"] for _ in range(2))
        while not first.desk.has(id, chunks=2):
            time.sleep(0.01)
    output = first.desk.tree.output(id)
    begun = set(os.listdir(parts_folder(output)))
    assert {name for name in begun if name.endswith(".mp4")}
    monkeypatch.setattr("pavdm_dist.commands.origin.versions", lambda: {**versions(), "torch": "9.9"})
    with served(config, tmp_path / "out") as second:
        for one in (id, other):
            second.wait(one)
    said = caplog.text
    assert f"shot {id}: what was begun of it is removed, and it is begun anew" in said and 'versions.torch="' in said
    made, same = (read_sidecar(second.desk.tree.output(one)) for one in (id, other))
    assert made["identity"]["versions"]["torch"] == "9.9" and made["latents_sha256"] == same["latents_sha256"]
    assert not Path(parts_folder(output)).exists()


def test_a_video_that_was_begun_with_other_settings_is_left_as_it_is(model: Path, tmp_path: Path) -> None:
    """That is whoever started the server: the settings before go on with it."""
    with served(settings(model), tmp_path / "out") as first:
        first.desk.hold(2)
        id = post(first, prompt="a red three", seconds=2).json()["id"]
        while not first.desk.has(id, chunks=2):
            time.sleep(0.01)
    begun = os.listdir(parts_folder(first.desk.tree.output(id)))
    with served(settings(model, num_inference_steps=12), tmp_path / "out") as second:
        failed = second.wait(id, "failed")
    assert "num_inference_steps" in failed["error"]["message"] and failed["error"]["code"] == "unfit"
    assert os.listdir(parts_folder(first.desk.tree.output(id))) == begun
    with served(settings(model), tmp_path / "out") as third:
        third.wait(id)
    assert read_sidecar(third.desk.tree.output(id))["num_frames"] == 48


@pytest.mark.slow
def test_on_stages_of_a_cluster_videos_are_the_same_bits(ray_cluster: None, model: Path, tmp_path: Path) -> None:
    """Two at once in one gang; the one whose prompt is changed on the way is as one that was asked for so."""
    config = settings(model, num_stages=2, streams=2)
    config.farm.renderers = 1
    with served(config, tmp_path / "out") as server:
        server.desk.hold(1)
        ids = [post(server, prompt="a red three", num_frames=101, seed=seed).json()["id"] for seed in (3, 4)]
        while not server.desk.has(ids[1], chunks=1):  # the other may be ahead of it, and holds it up then
            server.desk.let(1)
            time.sleep(0.05)
        told = ask.get(f"{server.url}/v1/videos/{ids[0]}/timeline").json()
        assert [stage["blocks"] for stage in told["stages"]] == [[0, 3], [3, 4]] and told["engine"] == "stages"
        assert {stage["video"] for stage in told["stages"]} <= set(ids) and told["stages"][0]["row"] >= 0
        assert 0 < told["row"] <= told["rows"] and told["awaited"]
        assert ask.post(f"{server.url}/v1/videos/{ids[1]}/prompt", json={"prompt": "a blue seven"}).status_code == 200
        server.desk.let()
        for id in ids:
            server.wait(id)
        outputs = [server.desk.tree.output(id) for id in ids]
    ((chunk, _),) = read_sidecar(outputs[1])["extra"]["prompt_changes"]
    for number, (output, seed, schedule) in enumerate(
        ((outputs[0], 3, []), (outputs[1], 4, [PromptChange(chunk, "a blue seven")]))
    ):
        made = SampleConfig(
            prompt="a red three", prompt_schedule=schedule, num_frames=101, seed=seed, model=str(model),
            output=str(tmp_path / f"{number}.mp4"), chunks_per_segment=1,
        )  # fmt: skip
        (result,) = render_command(made, False, ChunkProgress)["videos"]
        assert read_sidecar(output)["latents_sha256"] == result["latents_sha256"]
        assert packets(output) == packets(result["output"])


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "prompt is missing"),
        ({"prompt": "  "}, "must be text"),
        ({"prompt": 7}, "prompt=7"),
        ({"prompt": "a", "seconds": "many"}, "seconds="),
        ({"prompt": "a", "seconds": -1}, "seconds=-1"),
        ({"prompt": "a", "seconds": 61}, "seconds=61.*at most 60"),
        ({"prompt": "a", "seconds": 1, "num_frames": 8}, "give one of them"),
        ({"prompt": "a", "size": "720p"}, "must be WIDTHxHEIGHT"),
        ({"prompt": "a", "size": "50x32"}, "width=50"),
        ({"prompt": "a", "size": "99999x32"}, "99999|width"),
        (
            {"prompt": "a", "size": "16384x16384"},
            r"^size=16384x16384: has 268435456 pixels, and may have 6144 at most \(http.max_pixels\); nearest legal:",
        ),
        ({"prompt": "a", "seed": -1}, "seed=-1"),
        ({"prompt": "a", "num_inference_steps": 7}, "num_inference_steps"),
        ({"prompt": "a", "model": "sora-2"}, "this server has"),
        ({"prompt": "a", "quality": "hd"}, "no such field quality"),
        ({"prompt": "a", "id": "../../x"}, "no such field id"),
        ({"prompt": "a", "input_reference": "https://example.org/a.png"}, "must be a file of a form"),
        ({"prompt": "a", "input_reference": 5}, "^input_reference: must be a file of a form"),
        ({"prompt": "a " * 1900}, "words|long"),
        ({"prompt": "a" * 4001}, "is 4001 characters long; at most 4000"),
        ({"prompt": "a", "negative_prompt": "a" * 4001}, "negative_prompt=.*at most 4000"),
        ({"prompt": "a \ud800"}, "prompt=.*half a character at place 3"),
        ({"prompt": "a", "negative_prompt": "\udfff"}, "negative_prompt=.*half a character"),
        ({"prompt": "a", "size": "\ud800"}, "size=.*half a character"),
        ({"prompt": "a", "\ud800": 1}, "no such field"),
        ({"prompt": "a", "seed": "9223372036854775808"}, "seed=9223372036854775808"),
        ({"prompt": "a", "seed": "1" * 3000}, "seed="),
    ],
)
def test_a_request_that_cannot_be_is_one_sentence(server: Served, fields: dict[str, Any], said: str) -> None:
    before = server.desk.counts.asked
    answer = post(server, **fields)
    assert answer.status_code == 400 and re.search(said, message(answer)), answer.text
    assert server.desk.counts.asked == before


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({"seconds": 60, "fps": 1000}, ["fps"]),
        ({"seconds": 60, "num_inference_steps": 6000}, ["num_inference_steps"]),
        ({"num_frames": 60_000, "fps": 1000}, ["num_frames"]),
        ({"seconds": 30, "fps": 120, "num_inference_steps": 24}, ["num_inference_steps", "fps"]),
        ({"seconds": 60, "fps": 1000, "num_inference_steps": 6000}, ["num_inference_steps", "fps"]),
    ],
)
def test_frame_rate_and_steps_lead_past_no_bound(server: Served, asked: dict[str, Any], names: list[str]) -> None:
    """Each of the largest values that a refusal names is legal, and nothing above it is."""
    said = message(post(server, prompt="a red three", **asked))
    wanted, nearest = re.fullmatch(r"(.*): is more than 4 times the work of .*; nearest legal: (.*)", said).groups()  # type: ignore[union-attr]
    assert [part.partition("=")[0] for part in wanted.split(", ")] == names
    assert [part.partition("=")[0] for part in re.split(", | or ", nearest)] == names
    for way in nearest.split(" or "):
        values = {name: int(value) for name, value in (part.split("=") for part in way.split(", "))}
        server.desk.check(make_shot(_overridden({**asked, **values}), "test"))
        last = list(values)[-1]
        values[last] += 10 if last != "num_inference_steps" else 3  # a chunk more, or a step of the window's
        with pytest.raises(ConfigError, match="times the work"):
            server.desk.check(make_shot(_overridden({**asked, **values}), "test"))
    # Whatever is within the bounds with the server's own settings is taken, with guidance, too.
    server.desk.check(make_shot(_overridden({"seconds": 60, "guidance_scale": 7.0}), "test"))
    server.desk.check(make_shot(_overridden({"seconds": 5, "fps": 100, "num_inference_steps": 12}), "test"))


def _overridden(values: dict[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in values.items() if name in ("seconds", "num_frames")}
    return {"id": "x", "prompt": "a", **own, "overrides": {n: value for n, value in values.items() if n not in own}}


def test_values_that_no_form_would_send_are_refused_in_words(server: Served) -> None:
    names = ("prompt", "seconds", "size", "fps", "\ud800")
    values = (True, float("nan"), 2**70, "\ud800", "\0", [], {}, 10**400, {"a": {"b": 1}}, "1e999")
    with httpx.Client(timeout=30) as session:
        for name in names:
            for value in values if "prompt" not in name else values[:8]:  # any text is a prompt
                text = f'{{"prompt": "a", "num_frames": 1, {json.dumps(name)}: {_json(value)}}}'
                answer = session.post(
                    f"{server.url}/v1/videos", content=text, headers={"content-type": "application/json"}
                )
                assert answer.status_code == 400, (name, value, answer.text)
                assert len(message(answer)) < 1000


def _json(value: Any) -> str:
    return "1" + "0" * 400 if value == 10**400 else json.dumps(value)


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("GET", "/v1/videos/video_none", 404, "there is no video 'video_none'"),
        ("GET", "/v1/videos/..%2f..%2fserve.token", 404, ""),
        ("GET", "/v1/videos/video_none/live", 404, "there is no video"),
        ("GET", "/v1/videos/video_none/content", 404, "there is no video"),
        ("GET", "/v1/videos?limit=0", 400, "limit=0: must be 1 to 100"),
        ("GET", "/v1/videos?limit=many", 422, "limit"),
        ("GET", "/v1/videos?order=up", 400, "must be asc or desc"),
        ("GET", "/v1/videos?after=video_none", 404, "there is no video"),
        ("PUT", "/v1/videos", 405, "Method Not Allowed"),
        ("GET", "/v2/videos", 404, "Not Found"),
        ("GET", "/page.html", 404, ""),
    ],
)
def test_an_address_that_leads_nowhere(server: Served, method: str, path: str, status: int, said: str) -> None:
    answer = ask.request(method, server.url + path)
    assert answer.status_code == status and said in message(answer)


def test_a_body_that_is_none(server: Served) -> None:
    for content, kind in ((b"{", "application/json"), (b"[1]", "application/json"), (b"\xff\xfe", "text/plain")):
        answer = ask.post(f"{server.url}/v1/videos", content=content, headers={"content-type": kind})
        assert answer.status_code == 400, answer.text
        message(answer)
    files = {"other": ("a.png", b"x", "image/png")}
    assert ask.post(f"{server.url}/v1/videos", data={"prompt": "a"}, files=files).status_code == 400
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert ask.post(f"{server.url}/v1/videos", content=b"--y\r\n", headers=broken).status_code == 400


def raw(server: Served, head: str, body: bytes = b"") -> bytes:
    """What the server answers to bytes that no client would send."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
        answer = b""
        while part := connection.recv(65536):
            answer += part
            if b"\r\n\r\n" in answer and answer.endswith(b"}"):
                break
    return answer


def test_a_body_of_a_gigabyte_is_refused_before_it_is_sent(server: Served) -> None:
    head = "POST /v1/videos HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
    announced = raw(server, f"{head}Content-Length: {2**30}\n", b"x" * 1000)
    assert announced.startswith(b"HTTP/1.1 413") and b"1 MiB at most" in announced
    # One that says nothing of its length is counted.
    piece = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    counted = raw(server, f"{head}Transfer-Encoding: chunked\n", piece + piece)
    assert counted.startswith(b"HTTP/1.1 413") and b"1 MiB at most" in counted


def test_pages_of_others_and_names_of_others_are_kept_out(server: Served) -> None:
    for headers, said in (
        ({"Origin": "https://example.org"}, "another site"),
        ({"Origin": "http://["}, "another site"),
        ({"Host": "example.org"}, "this machine"),
    ):
        answer = ask.post(f"{server.url}/v1/videos", json={"prompt": "a"}, headers=headers)
        assert answer.status_code == 403 and said in message(answer)
    same = {"Origin": server.url, "Host": server.url.removeprefix("http://")}
    assert ask.get(f"{server.url}/v1/videos", headers=same).status_code == 200


def test_a_full_queue_says_when_to_come_again(model: Path, tmp_path: Path) -> None:
    import openai

    with served(settings(model, http={"max_queue": 2}), tmp_path) as server:
        server.desk.hold(1)
        kept = [post(server, prompt="a red three", seconds=1).json()["id"] for _ in range(2)]
        answer = post(server, prompt="a red three")
        assert answer.status_code == 429 and "2 videos are unfinished" in message(answer)
        assert int(answer.headers["retry-after"]) >= 1 and server.desk.counts.refused == 1
        with pytest.raises(openai.RateLimitError):
            client_of(server).videos.create(prompt="a red three")
        server.desk.let()
        for id in kept:
            server.wait(id)
        assert post(server, prompt="a red three", seconds=0.5).status_code == 200


def test_a_token_is_asked_for(model: Path, tmp_path: Path) -> None:
    import openai
    from websockets.sync.client import connect

    with served(settings(model), tmp_path, token="s3cret-of-this-test") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": "pavdm_token=wrong"}):
            answer = ask.get(f"{server.url}/v1/videos", headers=headers)
            assert answer.status_code == 401 and "the token is missing or wrong" in message(answer)
            assert answer.headers["www-authenticate"] == "Bearer"
        with pytest.raises(openai.AuthenticationError):
            client_of(server, "wrong").videos.list()
        assert client_of(server, "s3cret-of-this-test").videos.list().data == []
        assert {ask.get(server.url + path).status_code for path in ("/", "/health", "/page.js")} == {200}
        assert ask.get(f"{server.url}/metrics").status_code == 401
        socket_url = f"{server.url.replace('http', 'ws')}/v1/videos/x/live"
        with pytest.raises(Exception, match=r"4401|403"), connect(socket_url) as sock:
            sock.recv()
        # The page keeps it in a cookie that scripts cannot read.
        assert ask.post(f"{server.url}/login", data={"token": "wrong"}).status_code == 401
        for content in (b'{"token": "\\ud800"}', b'{"token": 7}'):
            answer = ask.post(f"{server.url}/login", content=content)
            assert answer.status_code == 401 and "is not this server's token" in message(answer)
        # It is open to everybody, and takes little.
        answer = ask.post(f"{server.url}/login", content=b" " * 4097)
        assert answer.status_code == 413 and "4 KiB at most" in message(answer)
        with httpx.Client() as browser:
            answer = browser.post(f"{server.url}/login", data={"token": "s3cret-of-this-test"})
            assert (
                "HttpOnly" in answer.headers["set-cookie"] and "samesite=strict" in answer.headers["set-cookie"].lower()
            )
            assert browser.get(f"{server.url}/v1/videos").status_code == 200


def test_beyond_the_loopback_a_token_is_the_default() -> None:
    def asks(**http: Any) -> bool:
        config = settings("embedded", http=http)
        validate_serve(config)
        return asks_for_token(config.http)

    assert [asks(host=host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "10.0.0.1", "::")] == [
        False
    ] * 3 + [True] * 3
    assert not asks(host="0.0.0.0", auth="none") and asks(auth="token")
    assert is_loopback("LocalHost") and not is_loopback("localhost.example.org")
    with pytest.raises(ConfigError, match=r"prompt=.*is a shot's own"):
        validate_serve(settings("embedded", prompt="a"))
    with _listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"http.port={port}: cannot be listened on"):
            _listen("127.0.0.1", port)


# --- many at once ---------------------------------------------------------------------------------------------------


def test_none_is_lost_when_many_come_at_once_and_nothing_of_them_is_kept(server: Served) -> None:
    def held() -> tuple[int, int]:
        """All objects, and tensors among them."""
        while server.desk.unfinished:
            time.sleep(0.02)
        gc.collect()
        objects = gc.get_objects()
        return len(objects), sum(type(one) is torch.Tensor for one in objects)

    storm(server.url, clients=4, each=1)
    objects, tensors = held()
    ids = storm(server.url, clients=4, each=3)
    for id in ids:
        assert server.wait(id)["progress"] == 100
    assert len(set(ids)) == 12
    deadline = time.monotonic() + 20  # threads let go of their last video's tensors a moment after its end
    while (after := held())[1] > tensors and time.monotonic() < deadline:
        time.sleep(0.1)
    assert after[1] <= tensors and after[0] - objects < 100 * len(ids)
    listed = {one.id for one in client_of(server).videos.list(limit=100)}
    assert set(ids) <= listed


def test_metrics_and_health(server: Served) -> None:
    from prometheus_client import parser

    server.wait(post(server, prompt="a", seconds=0.5).json()["id"])
    deadline = time.monotonic() + 60
    while not server.desk.counts.done:  # a moment after the files of the first one are complete
        assert time.monotonic() < deadline
        time.sleep(0.01)
    health = ask.get(f"{server.url}/health")
    assert health.status_code == 200 and health.json()["status"] == "ok" and health.json()["queued"] == 0
    answer = ask.get(f"{server.url}/metrics")
    found = {family.name: family for family in parser.text_string_to_metric_families(answer.text)}
    ends = {
        sample.labels["end"]: sample.value for sample in found["pavdm_serve_videos"].samples if "end" in sample.labels
    }
    assert 1 <= ends["done"] <= server.desk.counts.done and ends["asked"] >= ends["done"]
    assert 0 < found["pavdm_serve_frames"].samples[0].value <= server.desk.counts.frames
    assert found["pavdm_serve_queued_videos"].samples[0].value == 0


def test_a_server_that_renders_no_more_says_so(model: Path, tmp_path: Path) -> None:
    """By the marker of farms: what is under way is saved, and nothing is taken that nobody would render."""
    config = settings(model)
    config.farm.poll_s = 0.05
    with served(config, tmp_path) as server:
        server.desk.hold(1)
        id = post(server, prompt="a red three", seconds=2).json()["id"]
        while not server.desk.has(id, chunks=1):
            time.sleep(0.01)
        (tmp_path / "drain").touch()
        server.desk.let(1)
        deadline = time.monotonic() + 20
        while (health := ask.get(f"{server.url}/health")).status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert health.json()["status"] == "closing" and "drain: marker found" in health.json()["trouble"]
        (tmp_path / "drain").unlink()
        answer = post(server, prompt="a")
        assert answer.status_code == 503 and "is ending: " in message(answer) and "drain" in message(answer)
        assert ask.get(f"{server.url}/v1/videos/{id}").json()["status"] in ("in_progress", "queued")
    assert server.desk.tree.state(id).standing == "begun"


def test_too_many_failures_close_a_server(model: Path, tmp_path: Path) -> None:
    config = settings(model)
    config.farm.max_failed, config.farm.poll_s = 0, 0.05
    desk = FrontDesk(config, Kinds(config), Tree(str(tmp_path)))
    desk.open()
    try:
        # A manifest's shot: the server's own are looked at before they are taken.
        desk.submit(Shot("a", "a", num_frames=9, image=str(tmp_path / "none.png")))
        desk._ticker.join(timeout=20)
        assert desk.closing and "farm.max_failed=0" in desk.trouble
        with pytest.raises(Refusal, match="is ending: 1 shots failed"):
            desk.check_room()
    finally:
        desk.close()


def test_a_fault_of_the_pool_is_told_and_tried_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(model)
    desk = FrontDesk(config, Kinds(config), Tree(str(tmp_path)))

    def breaks() -> None:
        raise KeyError("x")

    with monkeypatch.context() as patch:
        patch.setattr(desk._pool, "tick", breaks)
        assert desk._look_after() == 30.0 and "KeyError" in desk.trouble and not desk.closing
    monkeypatch.setattr(desk._pool, "tick", lambda: None)
    assert desk._look_after() == 1.0 and not desk.trouble
    assert Front(desk).health()["status"] == "ok"


def test_the_time_to_the_first_frames_is_that_of_the_first_chunk(server: Served) -> None:
    """The bound that was promised: a second more at most."""
    began = time.monotonic()
    id = post(server, prompt="a red three", seconds=2).json()["id"]
    with ask.stream("GET", f"{server.url}/v1/videos/{id}/live") as answer:
        data = b""
        for piece in answer.iter_raw():
            data += piece
            if b"mdat" in data:
                break
    seen = time.monotonic() - began
    server.wait(id)
    first = server.desk.counts.first_chunk_s
    assert first is not None and seen <= first + 1.0


def test_no_thread_is_left_behind(model: Path, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with served(settings(model), tmp_path) as server:
        server.wait(post(server, prompt="a", seconds=0.5).json()["id"])
    deadline = time.monotonic() + 10
    while left := [thread for thread in set(threading.enumerate()) - before if "AnyIO" not in thread.name]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
