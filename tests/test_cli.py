"""The command line: how words are told apart, exit codes, one-line errors, and what is printed."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pavdm_dist import cli
from pavdm_dist.commands.printing import report_lines
from pavdm_dist.commands.progress import PROGRESS, ChunkProgress
from pavdm_dist.config import SampleConfig
from pavdm_dist.errors import EngineError, FailedVideosError
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.values.merging import load_config

PLAN = {"model_calls": 135, "chunks": 22, "layer_split": [6, 6], "stages": [{"stage": 0, "ms": 1.5}], "cost": {"a": 2}}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stand-ins for the three library functions behind the verbs; records what they were given."""
    seen: list[tuple[Any, ...]] = []

    def render_command(config: SampleConfig, overwrite: bool, progress: Any) -> dict[str, str]:
        seen.append(("render", config, overwrite, progress))
        print("(raylet) A worker died")  # as Ray says it
        return {"output": config.output}

    def plan_command(config: SampleConfig, chunks: int | None = None) -> dict[str, Any]:
        seen.append(("plan", config, chunks))
        return PLAN

    def dry_run(config: SampleConfig, overwrite: bool) -> dict[str, Any]:
        seen.append(("dry run", config, overwrite))
        return PLAN

    sample = types.ModuleType("pavdm_dist.commands.sample")
    sample.__dict__.update(render_command=render_command)
    dry = types.ModuleType("pavdm_dist.commands.dry_run")
    dry.__dict__.update(dry_run=dry_run)
    plan = types.ModuleType("pavdm_dist.commands.plan")
    plan.__dict__.update(plan_command=plan_command)
    run = types.ModuleType("pavdm_dist.train.train_run")
    run.__dict__.update(train_slice=lambda config, provider: seen.append(("train", config)))
    monkeypatch.delenv("WORLD_SIZE", raising=False)  # left by a training test of this process
    monkeypatch.setitem(sys.modules, "pavdm_dist.commands.sample", sample)
    monkeypatch.setitem(sys.modules, "pavdm_dist.commands.dry_run", dry)
    monkeypatch.setitem(sys.modules, "pavdm_dist.commands.plan", plan)
    monkeypatch.setitem(sys.modules, "pavdm_dist.train.train_run", run)
    return seen


def test_sample_sorts_its_words(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seed: 3\nfps: 12\n")
    assert cli.main(["sample", "a red three, x=y", str(file), "fps=8", "--overwrite", "num_stages=2"]) == 0
    ((verb, config, overwrite, progress),) = calls
    assert (verb, overwrite, progress) == ("render", True, ChunkProgress)
    assert (config.prompt, config.seed, config.fps, config.num_stages) == ("a red three, x=y", 3, 8.0, 2)


def test_a_prompt_may_hold_an_equals_sign_after_a_space(calls: list[tuple[Any, ...]]) -> None:
    assert cli.main(["sample", "two digits: 1+1 = 2"]) == 0
    assert calls[0][1].prompt == "two digits: 1+1 = 2"


def test_dry_run_plans_and_renders_nothing(calls: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", "x", "--dry-run", "--overwrite"]) == 0
    assert [(call[0], call[2]) for call in calls] == [("dry run", True)]
    assert "model_calls  135" in capsys.readouterr().out


def test_plan_takes_bare_chunks_and_prints_one_json_object(
    calls: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "chunks=22", "num_inference_steps=30", "window_chunks=6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == PLAN
    assert calls[0][2] == 22
    assert calls[0][1].num_inference_steps == 30


def test_plan_prints_readable_lines(calls: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "layer_split  6 6" in lines
    at = lines.index("stages")
    assert lines[at + 1 : at + 3] == ["  stage   ms", "      0  1.5"]
    assert calls[0][2] is None


def test_tables_fit_and_say_what_they_leave_out() -> None:
    rows = [{"mode": "causal", "stages": [0.00383, 0.00673] * 8, "layers_per_stage": [2] * 15 + [1], "s": 1.5}]
    wide, narrow, narrower = ("\n".join(report_lines({"rows": rows}, width)) for width in (200, 50, 30))
    assert "0.00383 0.00673 0.00383 0.00673 0.00383" in wide and "  2x15 1  1.5" in wide
    assert "0.00383..0.00673  2x15 1  1.5" in narrow
    assert "layers" not in narrower.splitlines()[1] and "layers_per_stage, s: --json" in narrower
    path = "/a/folder/whose/name/is/long.mp4"
    bad = [{"video": path, "reason": "corrupt or truncated after frame 3"}, {"video": "b.mp4"}]
    assert report_lines({"bad": bad}, 60) == [
        "bad",
        "  video                             reason",
        "  /a/folder/whose/name/is/long.mp4  corrupt or truncated",
        "                                    after frame 3",
        "  b.mp4                             -",
    ]
    levels = report_lines({"levels": [round(i / 60, 4) for i in range(60)], "end": "drain"})
    assert len(levels) > 2 and levels[1].startswith(" " * len("levels  ")) and levels[-1] == "end     drain"


NUMBERS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats())
CELLS = NUMBERS | st.lists(st.integers(0, 10**9) | st.floats(allow_nan=False), max_size=64)
NAMES = st.sampled_from(["num_stages", "layers_per_stage", "memory_gib", "seconds_per_video", "cost", "a", "b"])


@given(st.lists(st.dictionaries(NAMES, CELLS, min_size=1), min_size=1, max_size=4))
def test_tables_of_numbers_are_never_wider_than_the_terminal(rows: list[dict[str, Any]]) -> None:
    lines = report_lines({"cluster": {"considered": rows}})
    assert max(map(len, lines)) <= 120
    assert len(lines) >= 2 + 1 + len(rows)


def test_train_hands_the_merged_settings_over(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("seed: 4\n")
    assert cli.main(["train", str(file), "max_seconds=600"]) == 0
    assert calls == [("train", load_config(TrainConfig, file, ["max_seconds=600"]))]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sample"], "nothing to render"),
        (["sample", "x", "num_frame=3"], "did you mean num_frames?"),
        (["sample", "x", "size=64x64"], "no such key 'size', did you mean height and width?\n"),
        (["sample", "mood=happy, a red three"], "mode? (a prompt that holds = is given as prompt='...')\n"),
        (["sample", "a_title=a red three"], "; --print-config lists the keys (a prompt that holds = is given as"),
        (["sample", "configs/train/embedded.yaml"], "no such key 'run_dir', which is a setting of pavdm train\n"),
        (["train", "configs/sample/quick.yaml"], "no such key 'prompt', which is a setting of pavdm sample,"),
        (["sample", "x", "cluster.devices=8"], "no such key 'cluster', which is a setting of pavdm plan\n"),
        (["train", "lr=0.1"], "no such key 'lr', did you mean optimizer.lr?\n"),
        (["train", "num_inference_steps=9"], "did you mean objective.num_inference_steps?\n"),
        (["train", "optimizer.seed=3"], "optimizer: no such key 'seed'; the keys are name, lr,"),
        (["sample", "red", "three"], "quote the prompt"),
        (["sample", "x", "a.yaml", "b.yaml"], "two config files"),
        (["sample", "x", "a.yaml"], "no such config file"),
        (["plan", "chunks=0"], "chunks=0: must be a whole number above 0"),
        (["plan", "chunks=x"], "chunks=x"),
        (["plan", "chunks=" + "9" * 5000], f"chunks={'9' * 77}...: must be a whole number above 0 and below 1,000,000"),
        (["plan", "chunks=3", "num_frames=7"], "give one of the three"),
        (["train"], "give a config: pavdm train CONFIG.yaml; `pavdm configs ls` lists the shipped ones"),
        (["train", "--dry-run", "--json"], "give a config: pavdm train CONFIG.yaml"),
        (["train", "embedded"], "neither a .yaml file nor key=value"),
        (["configs", "cp", "sample/quik"], "did you mean sample/quick.yaml?"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(
    calls: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert not calls
    assert out == ""
    assert err.startswith("pavdm: ")
    assert err.count("\n") == 1
    assert sentence in err


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (EngineError("stage 1 died:\nkilled"), 2, "pavdm: stage 1 died: killed\n"),
        (KeyboardInterrupt(), 130, "pavdm: interrupted\n"),
        (KeyboardInterrupt("12 s are in a.mp4.parts"), 130, "pavdm: interrupted: 12 s are in a.mp4.parts\n"),
    ],
)
def test_failures_of_the_run(
    calls: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    status: int,
    line: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(sys.modules["pavdm_dist.commands.sample"], "render_command", fail)
    assert cli.main(["sample", "x"]) == status
    assert capsys.readouterr().err == line


def test_standard_output_holds_the_result_alone(
    calls: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sample", "x", "output=a.mp4", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"output": "a.mp4"} and "A worker died" in said.err


def test_faults_of_the_package_keep_their_traceback(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["pavdm_dist.commands.plan"], "plan_command", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan"])


@pytest.mark.parametrize(("count", "status"), [(1, 101), (3, 103), (25, 125), (26, 125), (400, 125)])
def test_the_exit_status_says_how_many_videos_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], count: int, status: int
) -> None:
    def render(*_: Any, **__: Any) -> None:
        raise FailedVideosError("some failed", count)

    monkeypatch.setattr("pavdm_dist.commands.sample.render_command", render)
    assert cli.main(["sample", "a red three"]) == status
    assert capsys.readouterr().err == "pavdm: some failed\n"


@pytest.mark.parametrize("words", [["sample", "x", "--seed", "3"], ["env", "stray"], ["configs"], ["render"]])
def test_unknown_flags_and_verbs_exit_with_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "usage: pavdm" in capsys.readouterr().err


def test_printed_config_is_a_valid_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["sample", "--print-config", "seed=5", "layers_per_stage=[1, 2]", "num_stages=2"]) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert load_config(SampleConfig, file) == SampleConfig(seed=5, layers_per_stage=[1, 2], num_stages=2)


def test_configs_ls_and_cp(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["configs", "ls"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"sample/demo.yaml", "train/embedded.yaml"} <= set(names)
    assert cli.main(["configs", "cp", "sample/quick.yaml"]) == 0
    copied = (tmp_path / "quick.yaml").read_text()
    assert load_config(SampleConfig, tmp_path / "quick.yaml").num_stages == 0

    (tmp_path / "quick.yaml").write_text("mine")
    assert cli.main(["configs", "cp", "sample/quick"]) == 2
    assert (tmp_path / "quick.yaml").read_text() == "mine"
    assert cli.main(["configs", "cp", "sample/quick", "--overwrite"]) == 0
    assert (tmp_path / "quick.yaml").read_text() == copied


def test_env_reports_versions_and_starts_no_ray(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert cli.main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report["cpus"] >= 1
    ray = sys.modules.get("ray")
    assert ray is None or not ray.is_initialized() or "RAY_ADDRESS" in report["ray"]


def test_logging_leaves_the_root_logger_alone(calls: list[tuple[Any, ...]]) -> None:
    before = list(logging.getLogger().handlers)
    assert cli.main(["plan", "--verbose"]) == 0
    assert logging.getLogger().handlers == before
    assert logging.getLogger("pavdm_dist").level == logging.DEBUG
    assert len(logging.getLogger("pavdm_dist").handlers) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_logs_a_line_per_chunk_when_not_on_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    clock, out = Clock(), io.StringIO()
    progress = ChunkProgress(48, fps=24, num_videos=2, file=out, clock=clock)
    with caplog.at_level(logging.INFO, logger="pavdm_dist"):
        for index, stream in enumerate((0, 1)):
            clock.now += 10
            progress.chunk(stream, index, 24)
    progress.close()
    # 24 of 96 frames in 10 s: 1 s of video in 10 s is 6 a minute, 72 frames take 30 s more.
    assert [record.getMessage() for record in caplog.records] == [
        "video 0 chunk 0: 24/96 frames, 6.0 s of video/min, 0:30 left",
        "video 1 chunk 1: 48/96 frames, 6.0 s of video/min, 0:20 left",
    ]
    assert out.getvalue() == ""


def test_progress_draws_one_bar_on_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    clock, out = Clock(), Terminal()
    progress = ChunkProgress(100, fps=10, file=out, clock=clock)
    clock.now += 60
    progress.chunk(0, 0, 40)
    progress.chunk(0, 1, 80)  # a last chunk that is longer than what is kept
    progress.close()
    progress.close()
    assert "40/100 frames, 4.0 s of video/min, 1:30 left" in out.getvalue()
    assert "100/100 frames" in out.getvalue()
    assert "120/100" not in out.getvalue()
    assert not caplog.records


@pytest.mark.parametrize(
    ("kind", "lines"),
    [("openjd", ["openjd_progress: 25.0", "openjd_progress: 50.0"]), ("deadline", ["Progress: 25%", "Progress: 50%"])],
)
def test_progress_gives_a_farm_the_lines_that_it_reads(
    kind: str, lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    clock, out = Clock(), Terminal()
    progress = PROGRESS[kind](48, fps=24, num_videos=2, file=out, clock=clock)
    with caplog.at_level(logging.INFO, logger="pavdm_dist"):
        for index, stream in enumerate((0, 1)):
            clock.now += 10
            progress.chunk(stream, index, 24)
    progress.close()
    assert out.getvalue().splitlines() == lines  # and no bar, though it is a terminal
    assert len(caplog.records) == 2


@pytest.mark.parametrize("kind", PROGRESS)
def test_progress_counts_what_is_there_already_but_not_for_the_pace(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock, out = Clock(), Terminal()
    progress = PROGRESS[kind](96, fps=24, file=out, clock=clock)
    with caplog.at_level(logging.INFO, logger="pavdm_dist"):
        for index in (2, 3):
            clock.now += 10
            progress.found(48)
            progress.chunk(0, index, 24)
    progress.close()
    # 24 of the 48 that were missing in 10 s: the other 24 take 10 s more.
    said = ["72/96 frames, 6.0 s of video/min, 0:10 left", "96/96 frames, 6.0 s of video/min, 0:00 left"]
    if kind == "auto":
        assert all(pace in out.getvalue() for pace in ("48/96 frames", *said)) and not caplog.records
    else:
        assert [record.getMessage().partition(": ")[2] for record in caplog.records] == said
        percents = [float(line.split(": ")[1].removesuffix("%")) for line in out.getvalue().splitlines()]
        assert percents == [50, 75, 100]


@pytest.mark.parametrize("kind", PROGRESS)
def test_progress_without_standard_error_tells_nothing_and_ends_nothing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python has it where that was closed when the program was started: ``pavdm sample ... 2>&-``."""
    monkeypatch.setattr(sys, "stderr", None)
    progress = PROGRESS[kind](48, fps=24)
    progress.chunk(0, 0, 24)
    progress.close()


def test_sample_takes_the_lines_of_a_farm_by_a_setting(calls: list[tuple[Any, ...]]) -> None:
    for kind in PROGRESS:
        assert cli.main(["sample", "a red three", f"progress={kind}"]) == 0
    assert [call[3] for call in calls] == list(PROGRESS.values())
    assert cli.main(["sample", "a red three", "progress=loud"]) == 2


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pavdm_dist", "sample"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("pavdm: nothing to render")
