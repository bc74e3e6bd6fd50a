"""Renderers on a Ray cluster: the shots of one process bit for bit, several in flight, and gangs that die meanwhile."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import pytest
from farms import farm_config, latents_of, packets_of, run_farm, some_shots, stops_at_chunk, write_manifest
from helpers import tiny_checkpoint
from previews import tiny_decoder

from pavdm_dist.farm.pool import Pool
from pavdm_dist.farm.traces import shot_times
from pavdm_dist.farm.tree import Tree

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def _stages() -> list[psutil.Process]:
    """Processes of stage actors that this one's cluster runs; Ray takes note of one that has ended when it likes."""
    children = psutil.Process().children(recursive=True)
    stages = [one for one in children if one.name().startswith("ray::StageActor")]
    return [one for one in stages if one.status() != psutil.STATUS_ZOMBIE]


def test_two_renderers_give_the_bits_of_one_process_though_one_dies(
    ray_cluster: None, model: Path, tmp_path: Path
) -> None:
    """Shots of several kinds in flight together; one gang is lost for good and its shots go to others."""
    shots = some_shots(5)
    shots[1] |= {"size": "32x48", "overrides": {"mode": "window", "guidance_scale": 3.0}, "num_frames": 37}
    shots[3] |= {"overrides": {"num_inference_steps": 9}, "num_frames": 60}
    manifest = write_manifest(tmp_path / "m.jsonl", shots)
    frames = {"preview_decoder": str(tiny_decoder(model))}
    config = farm_config(model, {"renderers": 2}, num_stages=1, streams=2, max_restarts=0, **frames)
    out, killed = tmp_path / "out", list[int]()

    def kill() -> None:
        while not any(Tree(str(out)).state(shot["id"]).standing == "running" for shot in shots):
            time.sleep(0.01)
        victim = _stages()[0]
        killed.append(victim.pid)
        victim.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    report = run_farm(config, manifest, out)
    killer.join()
    assert killed and (report["done"], report["failed"], report["left"]) == (5, 0, 0)
    run_farm(farm_config(model, **frames), manifest, tmp_path / "alone")
    assert latents_of(out) == latents_of(tmp_path / "alone")
    for shot in shots:
        one, other = (folder / f"shots/{shot['id']}/video.mp4" for folder in (out, tmp_path / "alone"))
        assert packets_of(one) == packets_of(other)


@pytest.mark.slow
def test_stages_that_are_not_to_be_waited_for_leave_their_shots_in_order(
    ray_cluster: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = tmp_path / "out", farm_config(model, {"renderers": 1}, num_stages=2, streams=2)
    manifest = write_manifest(tmp_path / "m.jsonl", some_shots(3, num_frames=600))
    with monkeypatch.context() as patched:
        patched.setattr(Pool, "grew", stops_at_chunk(4))
        report = run_farm(config, manifest, out)
    assert (report["done"], report["failed"], report["left"]) == (0, 0, 3)
    assert not _stages(), "an actor has outlived its farm"
    states = {Tree(str(out)).state(shot["id"]).standing for shot in some_shots(3)}
    assert states == {"begun", "queued"}
    config.farm.trace = True
    run_farm(config, manifest, out)
    times = shot_times(Tree(str(out)))
    assert times.keys() == {shot["id"] for shot in some_shots(3)} and all(len(stages) == 2 for stages in times.values())
    assert all(spans and spans == sorted(spans) for stages in times.values() for spans in stages)
    run_farm(farm_config(model), manifest, tmp_path / "alone")
    assert latents_of(out) == latents_of(tmp_path / "alone") and len(latents_of(out)) == 3
