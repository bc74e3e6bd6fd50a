"""The drift benchmark: the same prompts and noise for every method, gone on with, and PA-VDM ahead of replacement."""

from __future__ import annotations

import importlib
import io
import json
import os
import queue
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from needs import needs
from PIL import Image

from pavdm_dist.commands.signals import ENDING, Stopped
from pavdm_dist.errors import ConfigError
from pavdm_dist.evaluate.drift import drift_of, mean_interval
from pavdm_dist.evaluate.features import frechet_distance
from pavdm_dist.evaluate.measured import Measured, measure

needs("draws handwritten digits", "sklearn")

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The benchmark's files by name. Its folder has names that tests have too: it is on the path only here."""
    names = ("drift_videos", "drift_measured", "drift_report", "drift")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        for name in (*names, "common"):
            patch.delitem(sys.modules, name, raising=False)
        yield {name: importlib.import_module(name) for name in names}
        for name in (*names, "common"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def videos(modules: dict[str, ModuleType]) -> ModuleType:
    """``benchmarks/drift_videos.py``."""
    return modules["drift_videos"]


@pytest.fixture(scope="module")
def measures(modules: dict[str, ModuleType]) -> ModuleType:
    """``benchmarks/drift_measured.py``."""
    return modules["drift_measured"]


@pytest.fixture(scope="module")
def report(modules: dict[str, ModuleType]) -> ModuleType:
    """``benchmarks/drift_report.py``."""
    return modules["drift_report"]


def test_kept_measures_are_known_by_code_that_is_there(measures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    version = measures._version()
    monkeypatch.setattr(measures, "_MEASURES", measures._MEASURES[1:])
    assert measures._version() != version


def test_all_methods_have_the_same_prompts_and_noise(videos: ModuleType, tmp_path: Path) -> None:
    ways = videos.variants_of(["real", "pavdm", "fifo"], ["few:num_inference_steps=12"], [], ["guidance_scale=2"])
    jobs = videos.jobs_of(tmp_path, ways, 3, 2, 240, None)
    by_way = {way.name: [job for job in jobs if job.variant == way] for way in ways}
    takes = {name: [(job.number, job.seed) for job in own] for name, own in by_way.items()}
    assert takes["pavdm"] == takes["fifo"] == takes["few"] and len(set(takes["pavdm"])) == 6
    assert takes["real"] == takes["pavdm"][:3], "a scene is drawn once"
    made = [job.variant.name for job in jobs]
    assert made[:3] == ["real"] * 3 and made[3:] == ["pavdm", "fifo", "few"] * 6
    configs = {name: videos.config_of(own[1]) for name, own in by_way.items() if name != "real"}
    assert len({(config.prompt, config.seed, config.num_frames) for config in configs.values()}) == 1
    assert {config.guidance_scale for config in configs.values()} == {2.0}
    assert (configs["fifo"].method, configs["few"].num_inference_steps) == ("fifo", 12)


def test_a_way_without_a_model_of_its_own_has_its_methods(videos: ModuleType) -> None:
    models = ["pavdm=A", "replacement=B", "few=C"]
    names = ["pavdm", "causal", "replacement", "fifo"]
    further = ["few:num_inference_steps=12", "short:method=replacement,window_chunks=3", "own:model=D"]
    ways = videos.variants_of(names, further, models, [])
    found = {way.name: next((w for w in way.words if w.startswith("model=")), None) for way in ways}
    expected = {"pavdm": "A", "causal": "A", "replacement": "B", "fifo": "A", "few": "C", "short": "B", "own": "D"}
    assert found == {name: f"model={folder}" for name, folder in expected.items()}
    assert not videos.variants_of(["pavdm"], [], [], [])[0].words, "the shipped one"


@pytest.mark.parametrize(
    ("names", "further", "models", "said"),
    [
        (["rolling"], [], [], "methods=rolling: must be of pavdm, causal"),
        (["pavdm"], ["few"], [], "variants=few: write NAME:key=value"),
        (["pavdm"], ["a/b:seed=1"], [], "variants=a/b:seed=1: write NAME"),
        (["pavdm"], ["pavdm:seed=1"], [], "variants=pavdm:seed=1: pavdm is taken"),
        (["pavdm"], [], ["rolling=A"], "models=rolling=A: write NAME=FOLDER, NAME being of pavdm"),
    ],
)
def test_words_that_are_none_are_refused(
    videos: ModuleType, names: list[str], further: list[str], models: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        videos.variants_of(names, further, models, [])


def test_what_cannot_be_made_is_refused_before_anything_is(videos: ModuleType, tmp_path: Path) -> None:
    for words, said in (
        ("window_chunks=4", "bad: window_chunks=4 does not divide"),
        ("height=128,width=128", "bad: height=128 width=128 fps=24: the prompts are of a world of 64x64"),
    ):
        jobs = videos.jobs_of(tmp_path, videos.variants_of(["pavdm"], [f"bad:{words}"], [], []), 2, 1, 48, None)
        with pytest.raises(ConfigError, match=said):
            videos.missing(jobs)


def made_up(job: Any, digit: list[float], error: list[float]) -> Measured:
    """A minute of it in six chunks."""
    times = [10.0 * i for i in range(6)]
    chunks: dict[str, list[float | None]] = {"digit": list(digit), "trajectory_error": list(error)}
    drift = {name: drift_of(times, values, 100, 0) for name, values in chunks.items()}
    known = {name: found for name, found in drift.items() if found is not None}
    prompt = "a red three drifting up" if job.number else "a red three drifting up, a blue two bouncing"
    return Measured(job.path, prompt, 60.0, 1440, 24.0, 64, 64, job.variant.name, times, [240] * 6, chunks, known, {})


def test_ends_and_pairs_are_what_they_say(videos: ModuleType, report: ModuleType, tmp_path: Path) -> None:
    ways = videos.variants_of(["pavdm", "replacement"], [], [], [])
    jobs = videos.jobs_of(tmp_path, ways, 4, 1, 1440, None)
    falls = {"pavdm": 0.0, "replacement": 0.1}
    errors = [0.5 + i for i in range(6)]
    found = [
        made_up(job, [1 - falls[job.variant.name] * i - 0.01 * job.number for i in range(6)], errors) for job in jobs
    ]
    result = report.result_of(found, jobs)
    rows = {row["group"]: row for row in result["groups"]}
    assert rows["pavdm"]["digit_ratio"] == pytest.approx(1)
    # Of two prompts, one of which has three of the videos.
    assert rows["replacement"]["digit_first_10s"] == pytest.approx((1 + 0.98) / 2)
    assert rows["replacement"]["digit_ratio"] == pytest.approx(0.49 / 0.99)
    assert (rows["replacement"]["videos"], rows["replacement"]["prompts"]) == (4, 2)
    (end,) = [row for row in result["ends"] if (row["group"], row["measure"]) == ("replacement", "digit")]
    assert end["low"] <= end["ratio"] <= end["high"]
    pairs = {row["measure"]: row for row in result["paired"]}
    assert pairs["digit"]["group"] == "replacement" and (pairs["digit"]["pairs"], pairs["digit"]["prompts"]) == (4, 2)
    assert pairs["digit"]["minus_pavdm"] == pytest.approx(-0.25) == pytest.approx(pairs["digit"]["low"])
    assert pairs["trajectory_error"]["minus_pavdm"] == 0
    worst = {(row["group"], row["digits"]): row["worst"] for row in result["digits"]}
    assert worst == pytest.approx({
        ("pavdm", 1): 0.98, ("pavdm", 2): 1, ("replacement", 1): 0.73, ("replacement", 2): 0.75,
    })  # fmt: skip
    text = report.table(result)
    assert "replacement minus pavdm, digit, 4 pairs of 2 prompts: -0.2500 (-0.2500 to -0.2500)" in text
    half = report.result_of(found[:3], jobs)
    assert half["paired"][0]["pairs"] == 1, "those that are there are compared"


def test_seeds_of_one_prompt_are_not_independent(videos: ModuleType, report: ModuleType, tmp_path: Path) -> None:
    """Of gaps and of ratios: half of their variance is the prompt's, and intervals are as often right as they say."""
    jobs = videos.jobs_of(tmp_path, videos.variants_of(["pavdm", "fifo"], [], [], []), 6, 4, 1440, None)
    named, rng, held = {job.path: job for job in jobs}, np.random.default_rng(0), np.zeros(2)
    plain = {job.path: replace(made_up(job, [1.0] * 6, [1.0] * 6), prompt=f"{job.number}") for job in jobs}
    for _ in range(300):
        of_prompt, found = rng.normal(0, 0.02, 6), []
        for job in jobs:
            later = 1 + (job.variant.name == "fifo") * (of_prompt[job.number] + rng.normal(0, 0.02))
            found.append(replace(plain[job.path], chunks={"digit": [1.0, *[later] * 5]}))
        (gap,) = report._paired(found, named)
        (ratio,) = report._ends("fifo", [video for video in found if video.group == "fifo"])
        held += gap["low"] <= 0 <= gap["high"], ratio["low"] <= 1 <= ratio["high"]
    assert (held / 300 > 0.92).all() and (held / 300 < 0.98).all(), "0.76 where seeds count like prompts"
    assert (gap["pairs"], gap["prompts"], ratio["videos"], ratio["prompts"]) == (24, 6, 24, 6)


def test_one_seed_of_each_prompt_is_a_pair(videos: ModuleType, report: ModuleType, tmp_path: Path) -> None:
    jobs = videos.jobs_of(tmp_path, videos.variants_of(["pavdm", "fifo"], [], [], []), 4, 1, 1440, None)
    worth = dict(zip([job.path for job in jobs], np.random.default_rng(0).uniform(0.2, 1, len(jobs)), strict=True))
    found = [replace(made_up(job, [worth[job.path]] * 6, [0.1] * 6), prompt=f"{job.number}") for job in jobs]
    gap = report._paired(found, {job.path: job for job in jobs})[0]
    gaps = [worth[fifo.path] - worth[pavdm.path] for pavdm, fifo in zip(jobs[::2], jobs[1::2], strict=True)]
    assert (gap["pairs"], gap["prompts"], gap["minus_pavdm"]) == (4, 4, pytest.approx(np.mean(gaps)))
    assert (gap["low"], gap["high"]) == pytest.approx(mean_interval(gaps))


def test_cpu_seconds_are_of_what_was_sampled(videos: ModuleType, report: ModuleType, tmp_path: Path) -> None:
    """A video may begin with the film that it goes on from."""
    (job,) = videos.jobs_of(tmp_path, videos.variants_of(["pavdm"], [], [], []), 1, 1, 720, None)
    found = made_up(job, [1.0] * 6, [0.1] * 6)
    Path(job.path).parent.mkdir()
    for spent, per_second in ((90.0, 3.0), (None, None)):
        Path(videos.cost_path(job.path)).write_text(json.dumps({"cpu_seconds": spent, "seconds_of_video": 30.0}))
        assert report.result_of([found], [job])["groups"][0]["cpu_s_per_s"] == per_second


def test_what_was_measured_once_is_read_again(videos: ModuleType, measures: ModuleType, tmp_path: Path) -> None:
    (job,) = videos.jobs_of(tmp_path, videos.variants_of(["pavdm"], [], [], []), 1, 1, 1440, None)
    one = made_up(job, [1.0] * 6, [0.1] * 6)
    file = tmp_path / "a" / "one.npz"
    measures._keep(file, "key", one)
    assert measures._read(file, "key") == one
    assert measures._read(file, "other code") is None
    features = np.random.default_rng(0).normal(size=(120, 8))
    measures._keep(file, "key", replace(one, features=features))
    assert measures._read(file, "key").features == pytest.approx(features, rel=1e-6)
    for length in (0, 10, file.stat().st_size - 10):
        (tmp_path / "torn.npz").write_bytes(file.read_bytes()[:length])
        assert measures._read(tmp_path / "torn.npz", "key") is None


def test_the_distance_to_real_scenes_is_over_what_both_have(
    videos: ModuleType, report: ModuleType, tmp_path: Path
) -> None:
    jobs = videos.jobs_of(tmp_path, videos.variants_of(["real", "codec", "pavdm"], [], [], []), 3, 1, 1440, None)
    rng, found, lasts = np.random.default_rng(0), {}, {"real": 40, "codec": 9, "pavdm": 40}
    for job in jobs:
        features = rng.normal(job.variant.name == "pavdm", 1, size=(lasts[job.variant.name], 6))
        video = made_up(job, [1.0] * 6, [0.1] * 6)
        found[job.variant.name, job.number] = replace(
            video, prompt=f"a red {('one', 'two', 'three')[job.number]} drifting up", features=features
        )
    # One made video is without features, and the scene of another could not be measured.
    found["pavdm", 0] = replace(found["pavdm", 0], features=None)
    del found["real", 1]
    rows = {row["group"]: row for row in report.result_of(list(found.values()), jobs)["groups"]}
    expected = {
        "pavdm": frechet_distance(found["pavdm", 2].features, found["real", 2].features),
        "codec": frechet_distance(
            np.concatenate([found["codec", number].features for number in (0, 2)]),
            np.concatenate([found["real", number].features[:9] for number in (0, 2)]),
        ),
        "real": None,
    }
    assert {name: row["frechet_distance_eff"] for name, row in rows.items()} == pytest.approx(expected)
    short = [replace(video, features=video.features[:1]) for video in (found["real", 2], found["pavdm", 2])]
    assert [row["frechet_distance_eff"] for row in report.result_of(short, jobs)["groups"]] == [None, None]


def reference(videos: ModuleType, work: Path, name: str = "real", **changed: Any) -> Any:
    (job,) = videos.jobs_of(work, videos.variants_of([name], [], [], []), 1, 1, 9, 1)
    return replace(job, **changed)


@pytest.mark.parametrize("name", ["real", "codec"])
def test_a_reference_is_of_its_own_scene(videos: ModuleType, tmp_path: Path, name: str) -> None:
    job = reference(videos, tmp_path, name)
    assert videos.missing([job]) == [job]
    videos._refer(job)
    assert videos.missing([job]) == [] and videos.is_there(job)
    for changed, said in (
        ({"frames": 13}, r"num_frames=9 \(now 13\)"),
        ({"digits": 2}, "prompt=.*scene.digits="),
        ({"seed": 5}, r"seed=0 \(now 5\)"),
    ):
        other = replace(job, **changed)
        with pytest.raises(ConfigError, match=f"{name}: output=.* was made with .*{said}.*another --work"):
            videos.missing([other])
        assert not videos.is_there(other)


def test_a_reference_of_another_codec_or_of_none_that_is_known(videos: ModuleType, tmp_path: Path) -> None:
    job = reference(videos, tmp_path, "codec")
    videos._refer(job)
    sidecar = Path(job.path).with_suffix(".json")
    found = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(found | {"identity": found["identity"] | {"codec": "another"}}))
    with pytest.raises(ConfigError, match='was made with codec="another"'):
        videos.missing([job])
    sidecar.write_text(json.dumps(found | {"identity": {}}))
    assert videos.missing([job]) == [job] and not videos.is_there(job), "made again"
    videos._refer(job)
    assert json.loads(sidecar.read_text())["identity"] == found["identity"]


@pytest.fixture
def measures_in_process(measures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads for processes, and no judge, whose training takes longer than all tests here."""
    without = replace(measures.SETTINGS, features="off", motion="off", scenes="off", digits="off")
    monkeypatch.setattr(measures, "SETTINGS", without)
    monkeypatch.setattr(measures, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(workers))


@pytest.mark.usefixtures("measures_in_process")
def test_a_video_that_cannot_be_measured_costs_no_other(
    videos: ModuleType, measures: ModuleType, tmp_path: Path
) -> None:
    jobs = videos.jobs_of(tmp_path, videos.variants_of(["real"], [], [], []), 2, 1, 24, 1)
    for job in jobs:
        videos._refer(job)
    Path(jobs[0].path).write_bytes(b"no video")
    found, failed = measures.measure_all(tmp_path, jobs, 1)
    assert [one.video for one in found] == [jobs[1].path]
    assert list(failed) == [jobs[0].path] and "p0000-s0.mp4 is not a video" in failed[jobs[0].path]
    assert measures._kept_at(tmp_path, jobs[1]).exists() and not measures._kept_at(tmp_path, jobs[0]).exists()
    Path(jobs[1].path).write_bytes(b"is not read again")
    assert measures.measure_all(tmp_path, jobs[1:], 1) == (found, {})


@pytest.mark.usefixtures("measures_in_process")
def test_what_was_measured_before_a_signal_is_kept(
    videos: ModuleType, measures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = videos.jobs_of(tmp_path, videos.variants_of(["real"], [], [], []), 2, 1, 24, 1)
    for job in jobs:
        videos._refer(job)
    keep, kept = measures._keep, []

    def until_the_second(*values: Any) -> None:
        if kept:
            raise Stopped(signal.SIGTERM)
        keep(*values)
        kept.append(values[0])

    monkeypatch.setattr(measures, "_keep", until_the_second)
    monkeypatch.setattr(measures.multiprocessing, "active_children", list)
    with pytest.raises(Stopped, match="1 of 2 videos are measured") as stop:
        measures.measure_all(tmp_path, jobs, 1)
    assert stop.value.number == signal.SIGTERM
    assert [path for path in (measures._kept_at(tmp_path, job) for job in jobs) if path.exists()] == kept


def test_what_it_cost_is_computed_anew(
    videos: ModuleType, measures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = videos.jobs_of(tmp_path, videos.variants_of(["pavdm"], [], [], []), 1, 1, 1440, None)
    monkeypatch.setattr(measures, "cost_of", lambda _: {"calls_per_s": 1.0})
    one = replace(made_up(job, [1.0] * 6, [0.1] * 6), whole={"loop_score": 0.5, "calls_per_s": 1.0})
    measures._keep(tmp_path / "one.npz", "key", one)
    monkeypatch.setattr(measures, "cost_of", lambda _: {"calls_per_s": 2.0})
    assert measures._read(tmp_path / "one.npz", "key").whole == {"loop_score": 0.5, "calls_per_s": 2.0}


@pytest.mark.parametrize("words", ["--prompts 0", "--seeds 0", "--seconds 0", "--seconds nan", "--shown -1"])
def test_nothing_is_not_the_default(
    modules: dict[str, ModuleType], tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["drift.py", "--work", str(tmp_path / "w"), "--methods", "real", *words.split()])
    with pytest.raises(SystemExit) as ended:
        modules["drift"].main()
    assert ended.value.code == 2 and f"{words.split()[0]}" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "w").exists()


@pytest.fixture
def handlers() -> Iterator[None]:
    """A process that was told to end hears nothing more; this one goes on."""
    before = {number: signal.getsignal(number) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_what_every_method_is_given_a_variant_may_say_otherwise(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(modules["drift"], "make_all", lambda jobs, *_: made.extend(jobs) or [])
    words = ["--work", str(tmp_path), "--methods", "pavdm", "fifo", "--variants", "more:num_inference_steps=30"]
    words += [
        "--steps",
        "12",
        "--guidance-scale",
        "2",
        "--seconds",
        "3",
        "--prompts",
        "1",
        "--seeds",
        "1",
        "--no-report",
    ]
    monkeypatch.setattr(sys, "argv", ["drift.py", *words])
    modules["drift"].main()
    configs = {job.variant.name: modules["drift_videos"].config_of(job) for job in made}
    given = {name: (one.num_inference_steps, one.guidance_scale) for name, one in configs.items()}
    assert given == {"pavdm": (12, 2), "fifo": (12, 2), "more": (30, 2)}


@pytest.mark.usefixtures("handlers", "measures_in_process")
def test_a_report_that_is_not_waited_for_costs_no_numbers(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for job in modules["drift_videos"].jobs_of(
        tmp_path / "w", modules["drift_videos"].variants_of(["real"], [], [], []), 1, 1, 24, None
    ):
        modules["drift_videos"]._refer(job)
    monkeypatch.setattr(modules["drift_report"], "page", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    words = ["--work", str(tmp_path / "w"), "--methods", "real", "--prompts", "1", "--seeds", "1", "--seconds", "1"]
    monkeypatch.setattr(sys, "argv", ["drift.py", *words, "--output", str(tmp_path / "out"), "--json"])
    with pytest.raises(SystemExit) as ended:
        modules["drift"].main()
    captured = capsys.readouterr()
    assert ended.value.code == 128 + signal.SIGINT and "the same command goes on" in captured.err
    assert json.loads(captured.out)["groups"][0]["videos"] == 1 and not (tmp_path / "out").exists()


def test_a_sheet_does_without_a_video_that_is_gone(videos: ModuleType, report: ModuleType, tmp_path: Path) -> None:
    jobs = videos.jobs_of(tmp_path, videos.variants_of(["real", "pavdm"], [], [], []), 1, 1, 48, None)
    videos._refer(jobs[0])
    png = report.sheet("a film", [made_up(job, [1.0] * 6, [0.1] * 6) for job in jobs])
    with Image.open(io.BytesIO(png)) as drawn:
        assert drawn.size[0] == report._NAME + 64 * report._ZOOM + 4, "the one moment of the one that is there"


@pytest.mark.usefixtures("handlers")
def test_a_signal_before_all_were_started_is_a_sentence(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Process:
        """The first is told to stop and does not; the second is never started."""

        made: ClassVar[list[Process]] = []

        def __init__(self, **_: Any) -> None:
            self.pid: int | None = None
            self.told: list[str] = []
            Process.made.append(self)

        def start(self) -> None:
            if len(Process.made) > 1 and self is Process.made[1]:
                signal.raise_signal(signal.SIGTERM)
            self.pid = 1

        def is_alive(self) -> bool:
            return "kill" not in self.told

        def terminate(self) -> None:
            self.told.append("terminate")

        def join(self, timeout: float | None = None) -> None:
            assert self.pid is not None, "can only join a started process"
            assert timeout is not None or "kill" in self.told, "would never end"

        def kill(self) -> None:
            self.told.append("kill")

    context = modules["drift_videos"].multiprocessing.get_context("spawn")
    monkeypatch.setattr(context, "Process", Process)
    words = ["--work", str(tmp_path), "--methods", "real", "--prompts", "2", "--seconds", "1", "--workers", "2"]
    monkeypatch.setattr(sys, "argv", ["drift.py", *words])
    with pytest.raises(SystemExit) as ended:
        modules["drift"].main()
    assert ended.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.splitlines()[-1] == "stopped: 0 of 2 videos are there; the same command goes on"
    assert [one.told for one in Process.made] == [["terminate", "kill"], []]


@pytest.mark.usefixtures("handlers")
def test_a_process_that_is_told_to_stop_says_so(
    videos: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = reference(videos, tmp_path)
    monkeypatch.setattr(videos, "_refer", lambda _: signal.raise_signal(signal.SIGTERM))
    waiting: queue.Queue[Any] = queue.Queue()
    waiting.put(job)
    threads = torch.get_num_threads()
    try:
        videos._worker(waiting, queue.Queue(), None)
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().err == f"{job.path}: stopped: nothing was finished\n"


def test_pavdm_is_ahead_of_replacement(
    videos: ModuleType, report: ModuleType, measures: ModuleType, tmp_path: Path
) -> None:
    """The shipped model, which was trained for PA-VDM's levels; one held-out prompt over the border of two blocks.

    Twelve steps without guidance keep it short: over 4.5 seconds the nine is one in all of the frames, and in 0.21.
    """
    words = ["num_inference_steps=12", "guidance_scale=1"]
    jobs = videos.jobs_of(tmp_path, videos.variants_of(["pavdm", "replacement"], [], [], words), 1, 1, 108, 1)
    for job in videos.missing(jobs):
        videos._sample(job)
    assert all(videos.is_there(job) for job in jobs)
    settings = replace(measures.SETTINGS, features="off", motion="off", scenes="off")
    found = [measure(job.path, settings) for job in jobs]
    rows = {row["group"]: row for row in report.result_of(found, jobs)["groups"]}
    assert rows["pavdm"]["cpu_s_per_s"] > 0 and rows["pavdm"]["latents_per_s"] > 0
    assert rows["pavdm"]["digit"] > 0.7 and rows["pavdm"]["digit"] > rows["replacement"]["digit"] + 0.3
    assert rows["pavdm"]["law_error"] < rows["replacement"]["law_error"]
