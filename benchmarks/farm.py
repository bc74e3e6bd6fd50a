"""What a farm costs beside the rendering: checks, a folder of finished shots, idle renderers, scheduling.

    python benchmarks/farm.py [--quick] [--json]

A tiny untrained model, whose shots take a fraction of a second: for real ones every share below is smaller.

* ``check``: a manifest of 100,000 lines (5,000 with --quick) checked whole, with model and prompts; seconds, and the
  most memory that Python held for a tenth of them and for a twentieth;
* ``check_own_prompts``: the same, with later prompts on every line that no other line has, as times or as chunks;
* ``held``: MiB that a farm's process holds beyond its model, of a manifest of 100,000 lines (2,000): all waiting, a
  look at one more, all over (nothing is rendered: the pool is told so), status and report of its folder;
* ``finished``: `farm run` over 10,000 finished shots (500), until it knows that nothing is left;
* ``finished_own_prompts``: the same, with another later prompt in each;
* ``rendering``, ``one_in_flight``: shots on one renderer of two stages, two or one of them in flight; ``idle_share``:
  of the renderer's time with no shot begun though some waited; ``stage_gaps_share``: of the time from the first unit
  to the last, what the first stage had between the last unit of a shot and the first of the next with nothing else in
  flight; ``scheduling_share``: CPU time that the pool's own calls took, of the farm's wall time.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from common import machine, machine_line, parser

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from farms import FRAMES, farm_config, run_farm, some_shots, write_manifest
from helpers import tiny_checkpoint

from pavdm_dist.engine.trace import read_trace
from pavdm_dist.farm.crew import Hand
from pavdm_dist.farm.desk import Ended
from pavdm_dist.farm.intake import Intake
from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.farm.manifest import checked
from pavdm_dist.farm.pool import Pool
from pavdm_dist.farm.report import write_report
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.status import status_report
from pavdm_dist.farm.tree import Tree
from pavdm_dist.values.merging import to_dict


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    quick = arguments.quick
    with tempfile.TemporaryDirectory() as name, redirect_stdout(sys.stderr):
        folder = Path(name)
        model = tiny_checkpoint(folder / "model")
        report = {
            "machine": machine(),
            "held": _held(model, folder, 2_000 if quick else 100_000),  # first: memory that was free is taken again
            "check": _check(model, folder, 5_000 if quick else 100_000, _manifest),
            "check_own_prompts": _check(model, folder, 5_000 if quick else 100_000, _own_prompts),
            "finished": _finished(model, folder, 500 if quick else 10_000),
            "finished_own_prompts": _finished(model, folder, 500 if quick else 10_000, own_prompts=True),
            "rendering": _rendering(model, folder, 12 if quick else 60, streams=2),
            "one_in_flight": _rendering(model, folder, 6 if quick else 30, streams=1),
        }
    print(json.dumps(report) if arguments.json else _table(report))


def _check(model: Path, folder: Path, lines: int, write: Callable[[Path, int], Path]) -> dict[str, Any]:
    kinds = Kinds(farm_config(model))

    def held(count: int) -> float:
        manifest = write(folder / f"{count}.jsonl", count)
        tracemalloc.start()
        assert sum(1 for _ in checked(str(manifest), kinds.check)) == count
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return round(most / 2**20, 2)

    manifest = write(folder / "timed.jsonl", lines)
    start, cpu = time.perf_counter(), time.process_time()
    assert sum(1 for _ in checked(str(manifest), kinds.check)) == lines
    return {
        "lines": lines,
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
        "mib_of_a_tenth": held(lines // 10),
        "mib_of_a_twentieth": held(lines // 20),
    }


def _held(model: Path, folder: Path, lines: int) -> dict[str, Any]:
    config = farm_config(model)
    kinds, tree, manifest = Kinds(config), Tree(str(folder / "held")), _manifest(folder / "held.jsonl", lines)
    assert kinds.identity and kinds.frames(Shot("a", "a"))
    before = _resident()
    held = {"lines": lines, **_passed(kinds, tree, manifest, lines)}
    tree.write_settings({"settings": to_dict(config)})
    for name, look in (("status_mib", status_report), ("report_mib", write_report)):
        look(tree.root)
        held[name] = _resident()
    return {name: round(value - before, 1) if name.endswith("_mib") else value for name, value in held.items()}


def _passed(kinds: Kinds, tree: Tree, manifest: Path, lines: int) -> dict[str, float]:
    """What is resident while shots go through a pool's hands, and what it and its intake keep behind them."""
    renderer: Any = SimpleNamespace(name="renderer-1", is_up=True, up_since=time.monotonic())
    intake, pool = Intake(str(manifest), tree, kinds), Pool(kinds, tree, endless=True)
    pool._crew.hands = [Hand(renderer)]
    held = {}
    for name, look in (("waiting_mib", intake.first), ("looked_mib", intake.more)):
        found = look()
        assert found is not None
        pool.submit(found.left)
        found.left.clear()
        held[name] = _resident()
        with manifest.open("a") as file:
            file.write('{"prompt": "one more"}\n')
    for _ in range(lines + 1):
        shot = pool.take(renderer)
        assert shot is not None
        pool.begun(renderer, shot, 0, 0)
        pool.ended(renderer, shot, Ended("done"))
    return {**held, "over_mib": _resident()}


def _resident() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


def _manifest(path: Path, lines: int) -> Path:
    kinds: list[dict[str, Any]] = [{}, {"size": "32x48"}, {"overrides": {"guidance_scale": 2.0}}, {"seconds": 3}]
    return write_manifest(path, ({"prompt": f"a red three number {i}", **kinds[i % 4]} for i in range(lines)))


def _own_prompts(path: Path, lines: int) -> Path:
    def overrides(i: int) -> dict[str, Any]:
        if i % 2:
            return {"timed_prompts": {"0s": "a red three", "2s": f"a blue seven number {i}"}}
        return {"prompt_schedule": [{"from_chunk": 3, "prompt": f"a blue seven number {i}"}], "guidance_scale": 2.0}

    shots = ({"prompt": "a red three", "seconds": 5, "overrides": overrides(i)} for i in range(lines))
    return write_manifest(path, shots)


def _finished(model: Path, folder: Path, shots: int, own_prompts: bool = False) -> dict[str, Any]:
    """One shot is rendered, and its files stand for all."""
    out, config = folder / f"finished{own_prompts:d}", farm_config(model)
    listed = some_shots(shots, seed=0, num_frames=8 * FRAMES)
    for number, shot in enumerate(listed):
        shot["prompt"] = listed[0]["prompt"]
        if own_prompts:
            shot["overrides"] = {"prompt_schedule": [{"from_chunk": 2, "prompt": f"a blue seven number {number}"}]}
    run_farm(config, write_manifest(folder / "one.jsonl", listed[:1]), out)
    first = out / "shots/shot-000"
    sidecar = json.loads((first / "video.json").read_text())
    for shot in listed[1:]:
        place = out / "shots" / shot["id"]
        place.mkdir()
        for file in first.iterdir():
            if not own_prompts or file.suffix != ".json":
                (place / file.name).hardlink_to(file)
        if own_prompts:
            sidecar["identity"]["prompt_schedule"] = [list(shot["overrides"]["prompt_schedule"][0].values())]
            (place / "video.json").write_text(json.dumps(sidecar))
    manifest = write_manifest(folder / "all.jsonl", listed)
    start, cpu = time.perf_counter(), time.process_time()
    report = run_farm(config, manifest, out)
    assert report["done_before"] == shots and report["frames"] == 0
    spent = {"seconds": round(time.perf_counter() - start, 2), "cpu_s": round(time.process_time() - cpu, 2)}
    return {"shots": shots, **spent}


def _rendering(model: Path, folder: Path, shots: int, streams: int) -> dict[str, Any]:
    import ray

    spent = _timed_calls(Pool, ("take", "is_free", "begun", "grew", "_settled", "tick"))
    trace = folder / f"trace{streams}.json"
    config = farm_config(model, {"renderers": 1, "poll_s": 2.0}, num_stages=2, streams=streams)
    config.trace = str(trace)  # of the one renderer
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        manifest = write_manifest(folder / f"render{streams}.jsonl", some_shots(shots, num_frames=8 * FRAMES))
        report = run_farm(config, manifest, folder / f"rendered{streams}")
    finally:
        ray.shutdown()
    assert report["done"] == shots
    return {
        "shots": shots,
        "seconds": report["seconds"],
        "frames_per_second": report["frames_per_second"],
        "idle_share": report["idle_share"],
        "stage_gaps_share": round(_gaps(trace), 4),
        "scheduling_share": round(sum(spent.values()) / report["seconds"], 4),
    }


def _timed_calls(cls: type, names: tuple[str, ...]) -> dict[str, float]:
    """CPU seconds that threads spend in methods of a class from now on, by method."""
    spent = dict.fromkeys(names, 0.0)

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*arguments: Any) -> Any:
            start = time.thread_time()
            try:
                return method(*arguments)
            finally:
                spent[name] += time.thread_time() - start

        return call

    for name in names:
        setattr(cls, name, timed(name, getattr(cls, name)))
    return spent


def _gaps(trace: Path) -> float:
    """Of the first stage's time, what it waited for the first unit of a shot while none was in flight."""
    spans = read_trace(trace)[0]
    last: dict[int, float] = {}
    for span in spans:
        last[span.unit.stream] = span.end
    seen: set[int] = set()
    gaps, end = 0.0, spans[0].end
    for span in spans:
        stream = span.unit.stream
        if stream not in seen and seen and all(last[other] <= span.start for other in seen):
            gaps += span.start - end
        seen.add(stream)
        end = max(end, span.end)
    return gaps / (end - spans[0].start)


def _table(report: dict[str, Any]) -> str:
    lines = [machine_line(report["machine"]), ""]
    for name, figures in report.items():
        if name != "machine":
            lines.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
