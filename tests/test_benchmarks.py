"""The measurements run and measure the same thing on both sides; what the clock says is not tested here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_checkpoint

from pavdm_dist.digits.settings import FPS, SIZE
from pavdm_dist.digits.world import render, sample_scene, scene_prompt
from pavdm_dist.io.encode import export_to_video
from pavdm_dist.io.metadata import Sidecar
from pavdm_dist.models.stdit3 import STDiT3Config

FOLDER = Path(__file__).parent.parent / "benchmarks"
SAVINGS = ("attention", "text", "window", "modulation")


def report(script: str, *arguments: str) -> dict[str, Any]:
    """What a script prints with ``--json``, which must be nothing else."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, str(FOLDER / script), "--json", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_machine(found: dict[str, Any]) -> None:
    assert found["machine"].keys() >= {"cpu", "cores", "load_1_min", "torch", "threads"}
    assert found["machine"]["threads"] == 1


def check_single_process(found: dict[str, Any]) -> None:
    check_machine(found)
    variants = {"straightforward", *SAVINGS, "all_four"}
    assert found["cpu_s_per_call"].keys() == {*variants, "package"}
    assert found["relative_difference"].keys() == variants
    assert found["same_latents"] and max(found["relative_difference"].values()) <= 1e-4
    assert found["clean_chunks"] == (1 + found["rounds"]) // 5
    assert found["shape"]["window_latents"] == 35
    saved = found["saved_part_of_call"]
    assert saved.keys() == {*SAVINGS, "together"}
    assert all(part["lowest"] <= part["median"] <= part["highest"] < 1 for part in saved.values())
    if saved["together"]["lowest"] > 0:
        assert found["share_of_saving"].keys() == {*SAVINGS, "rest"}
        assert sum(found["share_of_saving"].values()) == pytest.approx(1)
    else:
        assert found["share_of_saving"] is None
    low, high = found["ratio_range"]
    assert 0 < low <= found["ratio"] <= high


def check_long_run(found: dict[str, Any], chunks: int) -> None:
    check_machine(found)
    assert found["chunks"] == chunks
    assert found["frames"] == 8 * chunks - 3  # two latents of four frames; the very first latent is one frame
    for memory in (found["resident"], found["private"]):
        assert memory["end_over_after_24"] == memory["end_kb"] / memory["after_24_kb"]
        assert memory["highest_kb"] >= max(memory["end_kb"], memory["after_24_kb"])
        assert 1 <= memory["highest_first_at_chunk"] <= chunks
    assert found["private"]["end_kb"] <= found["resident"]["end_kb"]
    assert found["cpu"]["lowest_12_s"] <= found["cpu"]["chunks_13_to_24_s"] <= found["cpu"]["highest_12_s"]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts importable by name, as they are for each other."""
    monkeypatch.syspath_prepend(str(FOLDER))


def test_no_script_has_the_name_of_a_module_of_the_tests() -> None:
    """Scripts have both folders on their path, and mypy takes two modules of a name for one."""
    scripts, modules = ({path.stem for path in folder.glob("*.py")} for folder in (FOLDER, FOLDER.parent / "tests"))
    assert scripts and not scripts & modules


@pytest.mark.usefixtures("scripts")
def test_straightforward_loop_and_its_single_savings_give_the_package_s_latents() -> None:
    from single_process import measure

    config = STDiT3Config(
        depth=2, hidden_size=32, num_heads=4, in_channels=4, caption_channels=12, model_max_length=5, pred_sigma=False
    )
    found = measure(config, cells=6, rounds=9)
    check_single_process(found)
    assert found["clean_chunks"] == 2
    assert found["relative_difference"]["all_four"] <= 1e-6  # the same operations, written twice


@pytest.mark.usefixtures("scripts")
def test_too_few_rounds_to_finish_a_chunk_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from single_process import main

    monkeypatch.setattr(sys, "argv", ["single_process.py", "--rounds", "3"])
    with pytest.raises(SystemExit, match=r"^--rounds 3: at least"):
        main()


@pytest.mark.slow
@pytest.mark.usefixtures("scripts")
def test_long_run_counts_what_it_made_and_repeats_its_beginning(tmp_path: Path) -> None:
    from long_run import run

    short, longer = run(48, None), run(50, tmp_path)
    check_long_run(short, 48)
    check_long_run(longer, 50)
    assert short["frames_on_disk"] is None and longer["frames_on_disk"] == longer["frames"]
    assert (tmp_path / "long.mp4").exists()
    assert short["latents_sha256_after_24"] == longer["latents_sha256_after_24"]
    assert short["latents_sha256"] != longer["latents_sha256"]


@pytest.mark.usefixtures("scripts")
def test_the_trend_of_known_memory_is_found() -> None:
    from long_run import trend

    leak = trend([1000 + 7 * chunk + 2 * (chunk % 2) for chunk in range(100)])
    assert leak["slope_kb_per_chunk"] == pytest.approx(7, abs=0.01)
    assert leak["noise_kb"] == pytest.approx(1, abs=0.05)
    assert leak["highest_first_at_chunk"] == 100 and leak["eighths_kb"] == sorted(set(leak["eighths_kb"]))
    still = trend([5000, *[4000] * 60])
    assert (still["slope_kb_per_chunk"], still["end_over_after_24"], still["highest_first_at_chunk"]) == (0, 1, 1)


@pytest.mark.slow
def test_a_folder_of_real_videos_is_read_back_and_unfit_ones_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    scene = sample_scene(np.random.default_rng(3), "heldout", 1)
    video = tmp_path / "real.mp4"
    export_to_video(render(scene, 0, 241), video, FPS)
    prompt = scene_prompt(scene)
    facts = Sidecar({}, prompt, None, 0, 241, FPS, SIZE, SIZE, "cpu", 1)
    facts.write(video)
    found = report("embedded.py", "--quick", "--folder", str(tmp_path))
    assert found["videos"] == 1 and found["per_video"][0]["prompt"] == prompt
    assert found["generated"]["whole"]["digit"] >= 0.9 and found["generated"]["whole"]["colour"] == 1
    assert len(found["per_video"][0]["generated"]) == 12
    assert found["codec_foreground_psnr"] > 25

    replace(facts, num_frames=100).write(video)
    command = [sys.executable, str(FOLDER / "embedded.py"), "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"real.mp4 has 100 frames of {SIZE}x{SIZE}" in done.stderr


@pytest.mark.slow  # tests/test_recovery.py has a frozen stage and a dead decoder, tests/test_resume.py a dead command
@pytest.mark.timeout(240)
def test_killed_at_random_moments_all_is_kept() -> None:
    found = report("chaos.py", "--quick")
    check_machine(found)
    assert [kill["victim"] for kill in found["kills"]] == ["middle", "decoder", "driver"]
    for kill in found["kills"]:
        assert kill["equal"] and (kill["detected_s"] is None) == (kill["victim"] == "driver")
        assert kill["streaming_again_s"] is not None
        assert kill["rows_repeated"] is None or kill["rows_repeated"] <= kill["rows_allowed"]


def test_what_is_judged_of_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one: times and rows at their bounds and above, and a moment at which nothing is left to lose."""
    monkeypatch.syspath_prepend(FOLDER)
    from chaos import Kill, faults, struck

    good = {"detected_s": 5.0, "streaming_again_s": 15.0, "rows_repeated": 5, "rows_allowed": 5}
    stage = Kill("first", 0.5, "SIGKILL", "window", 2, hit=True, equal=True, **good)  # type: ignore[arg-type]
    frozen = replace(stage, signal="SIGSTOP", detected_s=9.0, streaming_again_s=19.0)
    driver = replace(stage, victim="driver", detected_s=None)
    assert not any(map(faults, (stage, frozen, driver)))
    for kill, changed, said in (
        (stage, {"detected_s": 5.1}, "detected_s=5.1: at most 5"),
        (frozen, {"detected_s": 9.1}, "detected_s=9.1: at most 9"),
        (stage, {"streaming_again_s": 15.1}, "streaming_again_s=15.1: at most 15"),
        (driver, {"streaming_again_s": 15.1}, "streaming_again_s=15.1: at most 15"),
        (frozen, {"streaming_again_s": 19.1}, "streaming_again_s=19.1: at most 19"),
        (stage, {"streaming_again_s": None}, "nothing streamed again"),
        (stage, {"rows_repeated": 6}, "rows_repeated=6: at most 5"),
        (stage, {"equal": False}, "the result differs"),
        (stage, {"hit": False, "redrawn": 5}, "nothing was hit in 6 draws"),
    ):
        assert faults(replace(kill, **changed)) == [said]
        assert faults(replace(kill, **changed), quick=True) == ([] if "_s=" in said else [said])
    moments: list[float] = []

    def strike(kill: Any) -> None:
        moments.append(kill.moment)
        kill.equal, kill.hit = True, len(moments) % 4 == 3

    drawn = Kill("last", 0.987, "SIGKILL", "displaced", 3)
    found = struck(drawn, strike, "0 3")
    assert found.redrawn == 2 and found.moment == moments[2] != moments[1] != moments[0] == 0.987
    moments.append(0)
    assert struck(drawn, strike, "0 3").moment == found.moment, "drawn from the seed alone"
    assert struck(drawn, lambda kill: setattr(kill, "equal", True), "0 3").redrawn == 5
    assert struck(drawn, lambda _: None, "0 3").redrawn == 0, "a result that differs is never drawn away"


@pytest.mark.slow
def test_quick_runs_from_the_command_line() -> None:
    check_single_process(report("single_process.py", "--quick"))
    check_long_run(report("long_run.py", "--quick"), 60)


@pytest.mark.slow
def test_full_single_process_measurement() -> None:
    check_single_process(report("single_process.py", "--rounds", "4"))


@pytest.mark.slow
def test_long_run_keeps_its_memory() -> None:
    found = report("long_run.py", "--chunks", "300")
    check_long_run(found, 300)
    assert found["resident"]["end_over_after_24"] <= 1.02


@pytest.mark.slow
def test_state_and_snapshots_are_accounted_for() -> None:
    found = report("state_cost.py", "--quick")
    check_machine(found)
    assert found["models"].keys() == {"embedded", "tiny"}
    for part in found["models"].values():
        spent = part["ms_per_chunk"]
        assert all(spent[name] > 0 for name in ("snapshot", "ledger", "state", "files"))
        assert part["share"] == pytest.approx(
            (spent["snapshot"] + spent["ledger"] + spent["state"]) / spent["run"], 0.02
        )
    # Rows of the other one take milliseconds, and the clock is not what a test is about.
    assert found["models"]["embedded"]["share"] < 0.01


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_training_equals_plain_torch_and_shards_its_bytes() -> None:
    found = report("zero.py", "--quick")
    check_machine(found)
    assert found["zero_stage"].keys() == {"0", "1", "2", "3"} and found["parameters"] > 35e6
    for stage, part in found["zero_stage"].items():
        assert part["max_loss_difference"] < 1e-5 and part["throughput_vs_ddp"] > 0
        # Stage 3 pads every parameter, 1 and 2 every group.
        assert part["optimizer_bytes_share"] == pytest.approx(1.0 if stage == "0" else 0.5, abs=2e-3)
    assert 0 <= found["waiting_share_2_ahead"] <= found["waiting_share_0_ahead"] + 0.02


@pytest.mark.slow
def test_masks_compares_models_on_the_same_windows() -> None:
    found = report("masks.py", "embedded", "--clips", "1", "--windows", "2")
    assert found["models"].keys() == {"embedded"}
    assert 0.05 < found["models"]["embedded"]["full"] < 1 and 0.05 < found["models"]["embedded"]["causal"] < 1


def check_gpu(found: dict[str, Any]) -> None:
    check_machine(found)
    assert found["skipped"] == found["failed"] == []
    for part in (*found["units"].values(), *found["sampling"].values(), *found["training"].values()):
        assert 0 < part["share_of_peak"] < 1
    assert set(found["units"]["causal 3 plain"]["by_chunks"]) == {"1", "3"}, (
        "a clean chunk, and all noisy ones together"
    )
    assert all(part["same_bits"] for part in found["staged"].values())
    assert all(
        part["phases"].keys() == {"forward", "backward", "step", "update"} for part in found["training"].values()
    )
    assert found["decode"]["embedded"]["seconds_a_chunk"] > 0


@pytest.mark.usefixtures("scripts")
def test_every_part_of_the_gpu_measurement_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At its smallest, in this process; ``ray`` alone needs a GPU."""
    import gpu

    words = ["--quick", "--json", "--latents", "5", "--mode", "causal", "--steps", "1", "--recompute", "none"]
    monkeypatch.setattr(gpu, "STARTED", time.perf_counter())
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    gpu.main()
    found = json.loads(capsys.readouterr().out)
    check_gpu(found)
    assert {part for part in gpu.PARTS if part in found} == {*gpu.PARTS} - {"ray"}
    assert gpu.text(found).count("\n") == sum(len(found[part]) for part in gpu.PARTS if part in found)


@pytest.mark.usefixtures("scripts")
def test_what_fails_or_does_not_fit_on_a_gpu_is_named_and_ends_no_other_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu

    def fails(*given: object) -> dict[str, Any]:
        raise AttributeError("'Shift' object has no attribute 'chunk'")

    def is_too_large(*given: object) -> dict[str, Any]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu, "STARTED", time.perf_counter())
    for part, stand_in in (("staged", fails), ("whole", is_too_large), ("units", lambda *given: {"seconds": 1.0})):
        monkeypatch.setattr(gpu, part, stand_in)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--json", "--mode", "window"])
    made = gpu.calls
    monkeypatch.setattr(gpu, "calls", lambda *given: made(*given)[:3])
    with pytest.raises(SystemExit, match=r"^1$"):
        gpu.main()
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == ["staged window: AttributeError: 'Shift' object has no attribute 'chunk'"]
    assert found["skipped"] == ["sampling window: out of memory"]
    assert found["units"] == {"window 1 plain": {"seconds": 1.0}}


@pytest.mark.timeout(120)
@pytest.mark.slow
def test_the_gpu_measurement_runs_where_there_is_none() -> None:
    found = report("gpu.py", "--quick", "--latents", "10")
    check_gpu(found)
    assert found["sampling"]["window"]["pflop"] > found["sampling"]["causal"]["pflop"] > 0, "the context is kept"
    late = report("gpu.py", "--quick", "--part", "units", "--mode", "window", "--minutes", "0")
    assert late["skipped"] == ["units window 1 plain: no time left"] and "units" not in late


@pytest.mark.slow
def test_drift_is_measured_and_not_rendered_again(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    words = ["--quick", "--seconds", "3", "--methods", "real", "pavdm", "replacement", "--work", str(tmp_path / "w")]
    words += ["--variants", "few:num_inference_steps=12"]
    found = report("drift.py", *words, "--output", str(tmp_path / "report"))
    check_machine(found)
    rows = {row["group"]: row for row in found["groups"]}
    assert list(rows) == ["real", "pavdm", "replacement", "few"] and not found["failed"]
    # In the frames themselves all colours are right; the file has colour at half the resolution.
    assert rows["real"]["digit"] == 1 and rows["real"]["colour"] > 0.7 and rows["real"]["law_error"] < 0.2
    assert rows["few"]["latents_per_s"] == pytest.approx(0.4 * rows["pavdm"]["latents_per_s"])
    assert rows["few"]["cpu_s_per_s"] < rows["pavdm"]["cpu_s_per_s"] and rows["real"]["cpu_s_per_s"] is None
    assert {row["group"] for row in found["paired"]} == {"replacement", "few"}
    plots = {path.name for path in (tmp_path / "report" / "plots").iterdir()}
    assert plots >= {"drift.png", "digit.png", "quality_over_cost.png", "frames-00.png"}
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*") if path.is_file()}
    assert report("drift.py", *words)["groups"] == found["groups"]
    assert {path: path.stat().st_mtime_ns for path in made} == made
    refused = subprocess.run(
        [sys.executable, str(FOLDER / "drift.py"), *words, "--guidance-scale", "2"], capture_output=True, text=True
    )
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "pavdm: output=" in refused.stderr and "was made with sampling.guidance_scale" in refused.stderr


@pytest.mark.slow
def test_a_farm_costs_little_beside_its_rendering() -> None:
    found = report("farm.py", "--quick")
    check_machine(found)
    assert found["check"]["mib_of_a_tenth"] < 1 and found["finished"]["shots"] == 500
    for what in ("check", "finished"):
        assert found[f"{what}_own_prompts"]["cpu_s"] < 3 * found[what]["cpu_s"] + 1
    rendering = found["rendering"]
    assert rendering["idle_share"] < 0.05 and rendering["stage_gaps_share"] < 0.05
    assert rendering["scheduling_share"] < 0.01


@pytest.mark.slow
def test_a_server_is_measured_to_the_end() -> None:
    pytest.importorskip("uvicorn", reason="needs pavdm-dist[serve]")
    found = report("serve.py", "--quick")
    check_machine(found)
    assert [row["request"] for row in found["first_bytes"]] == [1, 2] and len(found["storms"]) == 3
    for row in found["first_bytes"]:
        assert 0 < row["first_chunk_s"] < row["seconds"] and row["more_s"] == pytest.approx(
            row["seconds"] - row["first_chunk_s"], abs=2e-3
        )
    for row in found["storms"]:
        assert (row["videos"], row["lost"]) == (12, 0) and 0 < row["asked_s"] <= row["seconds"]
        assert 10 < row["own_mib"] <= row["most_mib"] and row["threads"] > 1


@pytest.mark.usefixtures("scripts")
def test_a_video_that_fails_or_stands_still_ends_the_measurement_of_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("uvicorn", reason="needs pavdm-dist[serve]")
    import serve
    from safetensors.torch import load_file, save_file
    from serving import served, settings

    model = tiny_checkpoint(tmp_path / "model")
    (weights,) = model.glob("transformer/*.safetensors")
    tensors = load_file(weights)
    tensors["final_layer.linear.bias"] = tensors["final_layer.linear.bias"] * float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with served(settings(model), tmp_path / "videos") as running:
        server = serve.Server(0, running.url, serve.deque(["its last words"]))
        id = running.front.create({"prompt": "a red three", "seconds": 1}, None)["id"]
        with pytest.raises(SystemExit, match=rf"video {id} has failed: .*not finite.*[\s\S]*its last words"):
            server.complete(id)
        server.idle()
        with pytest.raises(SystemExit, match=r"GET /v1/videos/none: 404 .*never asked for"):
            server.get("/v1/videos/none")
    monkeypatch.setattr(serve, "PATIENCE_S", 0.0)
    with pytest.raises(SystemExit, match=r"three videos: nothing has come for 0 s, it stands at 3; .*\nits last words"):
        server.until("three videos", lambda: (False, 3))


@pytest.mark.slow
@pytest.mark.usefixtures("scripts")
def test_a_server_that_does_not_start_or_is_gone_ends_its_measurement(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="needs pavdm-dist[serve]")
    import serve

    out = ["--out", str(tmp_path / "out")]
    refused = pytest.raises(SystemExit, match=r"the server did not start; [\s\S]*pavdm: model=.*none")
    with refused, serve.running(f"model={tmp_path / 'none'}", *out):
        raise AssertionError("it has started")
    gone = pytest.raises(SystemExit, match=r"the server does not answer \(\w+Error: [\s\S]*listening on")
    with gone, serve.running(f"model={tiny_checkpoint(tmp_path / 'model')}", *out) as server:
        os.kill(server.pid, signal.SIGKILL)
        while True:
            server.get("/health")
