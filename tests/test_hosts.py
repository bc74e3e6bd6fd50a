"""Two hosts with addresses of their own, and a link between them that is slowed and cut while a video crosses it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest
from helpers import tiny_checkpoint
from hosts import Cable, Host, two_hosts
from hub import COMMIT, REPOSITORY

from pavdm_dist.cli import main

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]
VIDEO = ["a red three drifting up", "seconds=60", "seed=3", "guidance_scale=1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Hash of the video's latents, made by one process."""
    output = tmp_path_factory.mktemp("reference") / "video.mp4"
    assert main(["sample", *VIDEO, f"model={model}", f"output={output}", "num_stages=0"]) == 0
    return _hash(output)


@pytest.fixture
def pair() -> Iterator[tuple[Host, Host, Cable]]:
    """Two hosts, and the cable between them."""
    if reason := hosts.why_not():
        pytest.skip(reason)
    with two_hosts() as made:
        yield made


def _hash(output: Path) -> str:
    return json.loads(output.with_suffix(".json").read_text())["latents_sha256"]


class Sample:
    """``pavdm sample`` on a host, and what it says when."""

    def __init__(self, host: Host, model: Path | str, output: Path, *settings: str, **environment: str) -> None:
        where = [f"model={model}", f"output={output}", "num_stages=2", f"ray_address={host.address}:{hosts.PORT}"]
        command = [sys.executable, "-m", "pavdm_dist", "sample", *VIDEO, *where, *settings]
        self.output, self._lines = output, list[tuple[float, str]]()
        self._process = host.start(command, environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append((time.monotonic(), line))

    def heard(self, pattern: str, seconds: float = 120) -> float:
        """When the first line with this pattern came, awaited."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for at, line in list(self._lines):
                if re.search(pattern, line):
                    return at
            assert self._process.poll() is None or self._reader.is_alive(), self.text
            time.sleep(0.05)
        raise AssertionError(f"{pattern!r} does not come in\n{self.text}")

    def streams(self, seconds: float = 120) -> None:
        """Waits for the first segment of the video."""
        end = time.monotonic() + seconds
        while not list(self.output.parent.glob(f"{self.output.name}.parts/*.mp4")):
            assert time.monotonic() < end and self._process.poll() is None, self.text
            time.sleep(0.02)

    def end(self, seconds: float = 200) -> int:
        status = self._process.wait(seconds)
        self._reader.join(10)
        return status

    @property
    def warnings(self) -> str:
        return "".join(line for _, line in self._lines if " INFO chunk" not in line)

    @property
    def text(self) -> str:
        return "".join(line for _, line in self._lines)


Pair = tuple[Host, Host, Cable]


def test_a_slow_link_changes_nothing(pair: Pair, model: Path, reference: str, tmp_path: Path) -> None:
    first, second, cable = pair
    first.ray(1)  # two stages take both hosts
    second.ray(1, first)
    cable.delay_s = 0.005
    run = Sample(first, model, tmp_path / "video.mp4")
    assert run.end() == 0 and _hash(run.output) == reference, run.text


@pytest.mark.parametrize(
    ("cpus", "limit_s"),
    [
        (1, 5 + 10),  # the other half of the pipeline is gone: the stage here says so
        (2, 5 + 15),  # all of it is, and nothing here waits for a link
    ],
)
def test_a_host_that_is_gone_without_a_word(
    pair: Pair, model: Path, reference: str, tmp_path: Path, cpus: int, limit_s: float
) -> None:
    first, second, cable = pair
    first.ray(1)
    second.ray(cpus, first)
    run = Sample(first, model, tmp_path / "video.mp4", "link_timeout_s=5", "node_wait_s=3")
    run.streams()
    cable.is_cut, cut = True, time.monotonic()
    noticed = run.heard(r"restart 1 of")
    again = run.heard(r"generation \d+ is up")
    print(f"{cpus} stage(s) were there: noticed after {noticed - cut:.1f} s, again up after {again - cut:.1f} s")
    assert run.end() == 0 and _hash(run.output) == reference, run.text
    print(run.warnings)
    assert noticed - cut < limit_s and "going on with 1 stage(s)" in run.text


def test_every_host_has_its_own_copy_of_the_model(pair: Pair, model: Path, reference: str, tmp_path: Path) -> None:
    first, second, _ = pair
    caches = [_cache(tmp_path / name, model) for name in ("here", "there")]
    first.ray(1)
    second.ray(1, first, {"HF_HOME": str(caches[1])}, f"mount -t tmpfs none {model}; mount -t tmpfs none {caches[0]}")
    driver = {"HF_HOME": str(caches[0]), "HF_HUB_OFFLINE": "1"}
    run = Sample(first, REPOSITORY, tmp_path / "hub.mp4", **driver)
    assert run.end() == 0 and _hash(run.output) == reference, run.text

    run = Sample(first, model, tmp_path / "folder.mp4")
    assert run.end() == 2
    said = rf"pavdm: [^\n]*{model}/\w+ does not exist in the checkpoint on {second.name}\n$"  # an empty mount point
    assert re.search(said, run.text) and "Traceback" not in run.text, run.text
    assert not list(tmp_path.glob("folder*"))


def _cache(home: Path, model: Path) -> Path:
    """The hub library's cache, with the model in it."""
    repository = home / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    shutil.copytree(model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return home
