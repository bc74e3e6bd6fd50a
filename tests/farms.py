"""Farms on a tiny model: what several test files, and the kill test, share."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pavdm_dist.farm.pool import Pool
from pavdm_dist.farm.progress import FarmProgress
from pavdm_dist.farm.renderer import Renderer
from pavdm_dist.farm.run import run_command
from pavdm_dist.farm.settings import FarmConfig, PoolConfig, validate_farm
from pavdm_dist.farm.shot import Shot, make_shot
from pavdm_dist.farm.tree import Tree
from pavdm_dist.io.encode import export_to_video
from pavdm_dist.io.metadata import Sidecar
from pavdm_dist.request.outputs import VideoChunk
from pavdm_dist.values.merging import to_dict

PROMPTS = ("a red three drifting up", "a blue seven", "a red seven drifting", "a blue three")
# Of tiny videos: quick to make, with more than one chunk.
FRAMES = 13


def write_manifest(path: Path, shots: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(shot) + "\n" for shot in shots))
    return path


def some_shots(count: int, **more: Any) -> list[dict[str, Any]]:
    """Shots of different prompts; each has an id of its own."""
    return [{"id": f"shot-{i:03d}", "prompt": PROMPTS[i % len(PROMPTS)], **more} for i in range(count)]


def farm_config(model: Path, pool: dict[str, Any] | None = None, **settings: Any) -> FarmConfig:
    """Checked settings; short waits."""
    chosen = {"poll_s": 0.05, "retry_s": 0.05, **(pool or {})}
    config = FarmConfig(model=str(model), num_frames=FRAMES, guidance_scale=1.0, farm=PoolConfig(**chosen), **settings)
    validate_farm(config)
    return config


def run_farm(config: FarmConfig, manifest: Path | None, out: Path, only: list[str] | None = None) -> dict[str, Any]:
    """A farm in this process."""
    return run_command(config, None if manifest is None else str(manifest), str(out), FarmProgress, only)


def latents_of(out: Path) -> dict[str, str]:
    """By shot, the checksum of its latents; of complete ones."""
    found = {}
    for sidecar in sorted(out.glob("shots/*/video.json")):
        found[sidecar.parent.name] = json.loads(sidecar.read_text())["latents_sha256"]
    return found


def packets_of(video: Path) -> list[tuple[int, int, str]]:
    """What a video holds, whatever its boxes say."""
    import av

    with av.open(str(video)) as container:
        packets = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
        return [(packet.pts, packet.dts, hashlib.sha256(bytes(packet)).hexdigest()) for packet in packets]


def finished_tree(folder: Path, shots: Iterable[dict[str, Any]], model: Path | str = "embedded") -> Tree:
    """A farm's folder in which all shots are complete: small films of noise."""
    import numpy as np

    tree = Tree(str(folder))
    made = [make_shot(shot, "test") for shot in shots]
    tree.keep("shots.jsonl", made)
    tree.write_settings({"settings": to_dict(farm_config(Path(model)))})
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), dtype=np.uint8)
    for number, shot in enumerate(made):
        Path(tree.folder(shot.id)).mkdir(parents=True)
        export_to_video(frames, tree.output(shot.id), 24)
        facts: dict[str, Any] = {"num_frames": 9, "fps": 24.0, "height": 32, "width": 48, "device": "cpu", "threads": 1}
        Sidecar({"num_stages": 2}, shot.prompt, None, 100 + number, **facts, chunk_seconds=[0.5, 0.25]).write(
            tree.output(shot.id)
        )
    return tree


def stops_at_chunk(chunk: int) -> Callable[..., None]:
    """For ``Pool.grew``: all is told to end, without waiting, once a shot has given so many chunks."""
    grew = Pool.grew

    def told(self: Pool, renderer: Renderer, shot: Shot, given: VideoChunk) -> None:
        grew(self, renderer, shot, given)
        if given.index == chunk:
            # As the farm's own thread does it: who writes the shots goes on meanwhile.
            threading.Thread(target=self.stop).start()

    return told
