"""``cluster/ray_job/submit.sh`` on a real cluster of this machine: code is sent, a token is asked for, a job that was
stopped goes on when it is sent again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import tiny_checkpoint

from pavdm_dist.commands.progress import ChunkProgress
from pavdm_dist.commands.sample import render_command
from pavdm_dist.config import SampleConfig
from pavdm_dist.io.metadata import is_complete, read_sidecar

ROOT = Path(__file__).parent.parent
pytest.importorskip("aiohttp_cors", reason="needs ray[default]: pip install 'pavdm-dist[cluster]'")


@pytest.fixture
def dashboard(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a head that asks for a token, ended by the process that started it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 40)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as free, socket.socket() as other:
        free.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = free.getsockname()[1], other.getsockname()[1]
    head = subprocess.Popen(
        [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={ports[0]}",
            f"--dashboard-port={ports[1]}", "--num-cpus=2", "--object-store-memory=104857600", "--disable-usage-stats",
            f"--temp-dir={tmp_path_factory.mktemp('ray')}", "--node-ip-address=127.0.0.1",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not _answers(ports[1]):
            assert time.monotonic() < end and head.poll() is None
            time.sleep(0.5)
        yield f"http://127.0.0.1:{ports[1]}"
    finally:
        head.terminate()
        head.wait(timeout=60)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def submit(dashboard: str, id: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", ROOT / "cluster" / "ray_job" / "submit.sh", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "RAY_API_SERVER_ADDRESS": dashboard,
            "PYTHON": sys.executable,
            "SUBMISSION_ID": id,
        },
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_was_stopped_goes_on_when_it_is_sent_again(dashboard: str, tmp_path: Path) -> None:
    from ray.job_submission import JobSubmissionClient

    model = tiny_checkpoint(tmp_path / "model")
    output = tmp_path / "a.mp4"
    words = ["sample", "a red three", f"model={model}", "seconds=60", "num_stages=1", "chunks_per_segment=2"]
    client = JobSubmissionClient(dashboard)
    first = submit(dashboard, "first", *words, f"output={output}")
    end = time.monotonic() + 180
    while len(list(tmp_path.glob("a.mp4.parts/segment-*.mp4"))) < 5:
        assert time.monotonic() < end and first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    client.stop_job("first")
    said = first.communicate(timeout=120)[0]
    assert client.get_job_status("first") == "STOPPED" and not is_complete(output), said[-2000:]
    second = submit(dashboard, "second", *words, f"output={output}")
    said = second.communicate(timeout=300)[0]
    assert second.returncode == 0 and is_complete(output) and "goes on at chunk" in said, said[-2000:]
    # Only code was sent, and the job ran that code.
    assert f"{ROOT}/pavdm_dist" not in said
    made = SampleConfig(
        prompt="a red three", model=str(model), seconds=60.0, output=str(tmp_path / "b.mp4"), chunks_per_segment=2
    )
    (whole,) = render_command(made, False, ChunkProgress)["videos"]
    assert read_sidecar(output)["latents_sha256"] == whole["latents_sha256"]
    third = submit(dashboard, "third", *words, f"output={output}")
    said = third.communicate(timeout=120)[0]
    assert third.returncode == 0 and "is complete already" in said, said[-2000:]
