"""Settings: merge order, refusals that name the field, and the checks that need no tensor."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pavdm_dist.commands.resolve import engine_options
from pavdm_dist.config import PromptChange, SampleConfig, frames_wanted, validate_sample
from pavdm_dist.data.prepare import PrepareConfig
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.shipped import configs_root
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.values.merging import load_config, to_dict, to_yaml


def sample(*overrides: str) -> SampleConfig:
    return load_config(SampleConfig, None, overrides)


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        validate_sample(sample(*overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("seed: 3\nwindow_chunks: 4\n")
    merged = load_config(SampleConfig, file, ["window_chunks=5"])
    assert (merged.seed, merged.window_chunks, merged.num_stages) == (3, 5, 0)


def test_sections_merge_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("optimizer: {lr: 0.5}\ndeepspeed: {bf16: {enabled: true}}\n")
    merged = load_config(
        TrainConfig, file, ["optimizer.betas=[0.8, 0.9]", "deepspeed.zero_optimization.stage=1", "data.batch_size=2"]
    )
    assert merged.optimizer.lr == 0.5
    assert merged.optimizer.betas == [0.8, 0.9]
    assert merged.optimizer.ema_decay == TrainConfig().optimizer.ema_decay
    assert merged.deepspeed == {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    assert merged.data.batch_size == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["num_frame=3"], ["num_frame", "did you mean num_frames?"]),
        (["num-frames=3"], ["num-frames", "did you mean num_frames?"]),
        (["num_frames=many"], ["num_frames=many", "a whole number or null"]),
        (["num_frames=1.5"], ["num_frames=1.5", "a whole number"]),
        (["fps=true"], ["fps=True", "a number"]),
        (["seed=null"], ["seed=null", "a whole number"]),
        (["seed=[1"], ["seed=[1", "a whole number"]),
        (["start=frame"], ["start=frame", "noise, chunk or clip"]),
        (["layers_per_stage=[2, x]"], ["layers_per_stage[1]=x", "a whole number"]),
        (["layers_per_stage=4"], ["layers_per_stage=4", "a list"]),
        (["prompt_schedule=[{from_chunk: 2, promt: x}]"], ["prompt_schedule", "'promt'", "did you mean prompt?"]),
        (["prompt_schedule=[{from_chunk: 2}]"], ["prompt_schedule[0].prompt", "missing"]),
        (["prompt_schedule=[{from_chunk: x, prompt: y}]"], ["prompt_schedule: from_chunk=x", "a whole number"]),
        (["prompt_schedule=[3]"], ["prompt_schedule", "{from_chunk, prompt}"]),
        (["seed.x=1"], ["seed has no keys"]),
        (["seed"], ["'seed'", "key=value"]),
    ],
)
def test_a_wrong_override_names_field_value_and_what_is_legal(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        sample(*overrides)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("optimizer: {lrr: 1}", ["optimizer: ", "did you mean lr?"]),
        ("optimizer: 3", ["optimizer=3", "section"]),
        ("- 1", ["key: value"]),
        ("a: [", ["not readable as YAML"]),
        ("seed: !!int ''", ["not readable as YAML"]),
        ("seed: !!bool x", ["not readable as YAML"]),
        ("seed: !!timestamp x", ["not readable as YAML"]),
        ("resume: maybe", ["resume=maybe", "auto, must or never"]),
    ],
)
def test_a_wrong_file_names_itself_and_the_field(tmp_path: Path, content: str, words: list[str]) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        load_config(TrainConfig, file)
    assert all(word in str(error.value) for word in [str(file), *words]), str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(SampleConfig, tmp_path / "none.yaml")


@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"])), st.integers(0, 2**60))
@settings(deadline=None)
def test_prompts_are_taken_literally(text: str, seed: int) -> None:
    config = sample(f"prompt={text}", f"seed={seed}")
    assert config.prompt == (None if text == "null" else text)
    assert config.seed == seed


@pytest.mark.parametrize("text", ["a: b", "no", "3", "${seed}", r"\${seed}", "[1, 2]", "x=y", "two, words", "???"])
def test_dumped_yaml_reads_back_equal(tmp_path: Path, text: str) -> None:
    config = sample(f"prompt={text}", "seconds=1e1", "layers_per_stage=[3, 4]")
    config.prompt_schedule = [PromptChange(3, text)]
    config.timed_prompts = {"0s": text}
    file = tmp_path / "dump.yaml"
    file.write_text(to_yaml(config))
    assert config.prompt == text
    assert load_config(SampleConfig, file) == config
    assert to_dict(config)["prompt_schedule"] == [{"from_chunk": 3, "prompt": text}]


CONTROLS = [chr(code) for code in (*range(1, 0x20), *range(0x7F, 0xA1), 0xAD, 0x2028, 0x2029, 0xFEFF, 0xFFFE, 0x10FFFF)]
ENDS = ["\t", "\n", "\r", "\x1f", "\x85", "\xa0", "\u2028", "\u2029", "\ufeff"]


@pytest.mark.parametrize("shape", ["{}", "a{}b", "a {} b", "{}a: 'b'", 'a"{}\\'])
def test_characters_that_yaml_takes_for_ends_of_lines_read_back_equal(tmp_path: Path, shape: str) -> None:
    file = tmp_path / "dump.yaml"
    characters = CONTROLS if shape == "a{}b" else ENDS
    changes = [PromptChange(number, shape.format(character)) for number, character in enumerate(characters, 1)]
    file.write_bytes(to_yaml(SampleConfig(prompt="x", prompt_schedule=changes)).encode())
    assert load_config(SampleConfig, file).prompt_schedule == changes


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
@settings(deadline=None, database=None, max_examples=25)
def test_any_text_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    config = SampleConfig(prompt=text, output=text)
    file.write_bytes(to_yaml(config).encode())
    assert load_config(SampleConfig, file) == config


def test_letters_of_any_script_stay_readable_in_files() -> None:
    assert "prompt: 红色的三 é" in to_yaml(SampleConfig(prompt="红色的三 é"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prompt: no", "prompt=False: must be text or null; YAML reads true or false here, put text in quotes"),
        ("prompt: 007", "prompt=7: must be text or null; YAML reads a number here"),
        ("negative_prompt: 1e-3", None),
        ("negative_prompt: 1.5", "negative_prompt=1.5: must be text or null; YAML reads a number"),
        ("output: 2026-11-26", "output=2026-11-26: must be text; YAML reads a date here"),
        ("output: 2026-11-26 10:00:00", "YAML reads a time here"),
        ("model: !!binary aGk=", "YAML reads another kind of value here"),
        ("prompt_schedule: [{from_chunk: 2, prompt: yes}]", "prompt_schedule[0].prompt=True: must be text"),
        ("prompt: [a]", "prompt=['a']: must be text or null"),
        ("prompt: 'no'", None),
        ("prompt: null", None),
    ],
)
def test_what_yaml_takes_for_something_else_is_no_text(tmp_path: Path, content: str, said: str | None) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    if said is None:
        load_config(SampleConfig, file)
        return
    with pytest.raises(ConfigError) as error:
        load_config(SampleConfig, file)
    assert str(error.value).startswith(f"{file}: ") and said in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("name", "written", "meant"),
    [
        ("seed", "010", 10),
        ("seed", "08", 8),
        ("seed", "+0_10", 10),
        ("seed", "0", 0),
        ("seed", "0x1F", 31),
        ("num_frames", "0100", 100),
        ("guidance_scale", "007", 7.0),
        ("seconds", "010.5", 10.5),
        ("layers_per_stage", "[010, 09]", [10, 9]),
        ("timed_prompts", "{0s: a, 0:20: b, 1:20: c}", {"0s": "a", "0:20": "b", "1:20": "c"}),
    ],
)
def test_numbers_mean_what_people_mean(tmp_path: Path, name: str, written: str, meant: object) -> None:
    """YAML 1.1 reads leading zeros in base 8 and colons in base 60."""
    file = tmp_path / "c.yaml"
    file.write_text(f"{name}: {written}\n")
    assert getattr(sample(f"{name}={written}"), name) == getattr(load_config(SampleConfig, file), name) == meant
    with pytest.raises(ConfigError, match="seed=1:30: must be a whole number"):
        sample("seed=1:30")
    with pytest.raises(ConfigError, match=r"seconds=1:30\.5: must be a number"):
        sample("seconds=1:30.5")


@pytest.mark.parametrize(
    ("cls", "name", "written", "said"),
    [
        (SampleConfig, "seed", "???", "seed=???: must be a whole number"),
        (SampleConfig, "dtype", "???", "dtype=???: must be auto, bfloat16, float16 or float32"),
        (SampleConfig, "include_input", "???", "include_input=???: must be true or false"),
        (SampleConfig, "fps", "???", "fps=???: must be a number or null"),
        (SampleConfig, "timed_prompts", "???", "timed_prompts=???: must be a mapping"),
        (SampleConfig, "layers_per_stage", "[1, '???']", "layers_per_stage[1]=???: must be a whole number"),
        (SampleConfig, "lora", "[{model: a, scale: '???'}]", "lora: scale=???: must be a number"),
        (TrainConfig, "optimizer", "{lr: '???'}", "optimizer.lr=???: must be a number"),
    ],
)
def test_what_omegaconf_takes_for_missing_is_a_value_like_others(
    tmp_path: Path, cls: type, name: str, written: str, said: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"{name}: {written}\n")
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(cls, file)
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(cls, None, [f"{name}={written}"])


def test_text_that_settings_were_written_with_is_read_back(tmp_path: Path) -> None:
    """What older versions wrote without quotes, as to YAML 1.1 it is text, is text."""
    file = tmp_path / "c.yaml"
    file.write_text("prompt: 08\nprompts: 0o17\n")
    config = load_config(SampleConfig, file)
    assert (config.prompt, config.prompts) == ("08", "0o17")


def test_lists_of_texts_in_overrides_hold_texts_too() -> None:
    with pytest.raises(ConfigError, match=r"prompt_schedule\[0\].prompt=7: must be text; YAML reads a number"):
        sample("prompt_schedule=[{from_chunk: 2, prompt: 007}]")
    with pytest.raises(ConfigError, match=r"source\[1\]=2024: must be text; YAML reads a number"):
        load_config(PrepareConfig, None, ["source=[a, 2024]"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["prompt=x", "num_frames=0"], "num_frames=0: must be above 0"),
        (["prompt=x", "num_frames=-5"], "num_frames=-5"),
        (["prompt=x", "fps=.nan"], "fps=nan: must be a finite number"),
        (["prompt=x", "guidance_scale=-1"], "guidance_scale=-1.0: must be 0 or more"),
        (["prompt=x", "num_frames=5", "seconds=2"], "give one of them"),
        (["prompt=x", "mode=circular"], "mode=circular: must be window, causal or displaced"),
        (["prompt=x", "num_inference_steps=30", "window_chunks=7"], "use window_chunks 6 or 10"),
        (["prompt=x", "num_inference_steps=31", "window_chunks=6"], "num_inference_steps 30 or 36"),
        ([], "nothing to render"),
        (["prompt= "], "nothing to render"),
        (["prompt=x", "prompts=y.txt"], "give one of them"),
        (["prompts=no/such/file.txt"], "no such file"),
        (["prompt=x", "start=clip"], "needs a conditioning clip"),
        (["prompt=x", "video=clip.mp4"], "start=noise uses no clip"),
        (["prompt=x", "start=clip", "video=no/such.mp4"], "no such file"),
        (["prompt=x", "include_input=true"], "there is no input"),
        (["prompt=x", "layers_per_stage=[2, 2]"], "set num_stages=2"),
        (
            ["prompt=x", "gpus_per_stage=1"],
            "gpus_per_stage=1.0: is for stages, there are none with num_stages=0; ",
        ),
        (["prompt=x", "cpus_per_stage=2"], "cpus_per_stage=2.0: is for stages, there are none with num_stages=0"),
        (["prompt=x", "cpus_per_decoder=1"], "cpus_per_decoder=1.0: is for stages"),
        (["prompt=x", "threads_per_decoder=2"], "threads_per_decoder=2: is for stages"),
        (["prompt=x", "gpus_per_decoder=0.5"], "gpus_per_decoder=0.5: is for stages"),
        (["prompt=x", "backend=gloo"], "backend=gloo: is for stages"),
        (["prompt=x", "ray_address=auto"], "ray_address=auto: is for stages"),
        (["prompt=x", "link_timeout_s=9"], "link_timeout_s=9.0: is for stages"),
        (["prompt=x", "start_timeout_s=9"], "start_timeout_s=9.0: is for stages"),
        (["prompt=x", "num_stages=1", "start_timeout_s=0"], "start_timeout_s=0.0: must be above 0"),
        (["prompt=x", "restart_backoff_s=0"], "restart_backoff_s=0.0: is for stages"),
        (["prompt=x", "num_stages=1", "restart_backoff_s=-1"], "restart_backoff_s=-1.0: must be"),
        (["prompt=x", "num_stages=2", "device=cpu", "gpus_per_stage=1"], "gpus_per_stage=1 gives every stage a GPU"),
        (["prompt=x", "dtype=half"], "dtype=half: must be auto, bfloat16, float16 or float32"),
        (["prompt=x", "device=gpu"], "device=gpu: must be auto, cpu or cuda"),
        (["prompt=x", "decoder=gpu"], "decoder=gpu: must be auto, cpu, cuda or shared"),
        (["prompt=x", "num_stages=3", "layers_per_stage=[2, 2]"], "2 entries for num_stages=3"),
        (["prompt=x", "num_stages=2", "layers_per_stage=[0, 2]"], "layers_per_stage[0]=0: must be 1 or more"),
        (
            ["prompt=x", "prompt_schedule=[{from_chunk: 0, prompt: y}]"],
            "prompt_schedule[0].from_chunk=0: must be above 0",
        ),
        (
            ["prompt=x", "prompt_schedule=[{from_chunk: 4, prompt: y}, {from_chunk: 4, prompt: z}]"],
            "from_chunk=4 must be above 4",
        ),
    ],
)
def test_contradictions_are_refused_without_any_tensor(overrides: list[str], words: str) -> None:
    assert words in refused(*overrides)


def test_limits_of_stages_reach_the_engine() -> None:
    """Every setting of time and restarts that both have: with its own default, and as it is set."""
    common = {field.name for field in fields(SampleConfig)} & {field.name for field in fields(EngineOptions)}
    limits = sorted(name for name in common if name.endswith("_s") or name in ("max_restarts", "stall_factor"))
    assert limits == [
        "link_timeout_s", "max_restarts", "node_wait_s", "placement_timeout_s", "restart_backoff_s", "stall_factor",
        "stall_limit_s", "start_timeout_s",
    ]  # fmt: skip
    chosen = engine_options(sample("num_stages=2", *(f"{name}={7 + i}" for i, name in enumerate(limits))))
    assert [getattr(chosen, name) for name in limits] == list(range(7, 7 + len(limits)))
    assert all(getattr(SampleConfig, name) == getattr(EngineOptions, name) for name in limits)


def test_prompt_files_need_an_output_folder(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red three\n")
    assert "must be a folder" in refused(f"prompts={file}", "output=a.mp4")
    validate_sample(sample(f"prompts={file}", "output=shots"))


def test_lengths() -> None:
    assert frames_wanted(sample("num_frames=7"), 24) == 7
    assert frames_wanted(sample("seconds=2.5"), 24) == 60
    assert frames_wanted(sample(), 8) == 40
    assert frames_wanted(sample("seconds=0.001"), 24) == 1


def test_shipped_files_are_valid() -> None:
    files = sorted(configs_root().rglob("*.yaml"))
    assert {"sample", "train"} <= {file.parent.name for file in files}
    for file in files:
        if file.parent.name == "train":
            load_config(TrainConfig, file)
        else:
            validate_sample(load_config(SampleConfig, file), needs_prompt=False)


def test_a_home_in_front_of_a_path_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file, and few shells, replace it behind an equals sign; a folder named ~ is nobody's wish."""
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "c.yaml"
    file.write_text("model: ~/models/m\nprompt: ~/ and ~\nseed: 1")
    config = load_config(SampleConfig, file, ["output=~/o.mp4", "negative_prompt=~/x"])
    assert (config.model, config.output) == ("/home/me/models/m", "/home/me/o.mp4")
    assert (config.prompt, config.negative_prompt) == ("~/ and ~", "~/x")
    assert load_config(PrepareConfig, None, ["source=[~/a, b/~/c]"]).source == ["/home/me/a", "b/~/c"]
    assert load_config(TrainConfig, None, ["run_dir=~/run"]).run_dir == "/home/me/run"


def test_json_is_a_config_file_whatever_letters_it_holds(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    prompt, later = "a red three 😀 三", "𝟟"
    file.write_text(json.dumps({"prompt": prompt, "prompt_schedule": [{"from_chunk": 1, "prompt": later}]}))
    config = load_config(SampleConfig, file)
    assert config.prompt == prompt and config.prompt_schedule == [PromptChange(1, later)]
    file.write_text(r'prompt: "half \ud83d"')
    with pytest.raises(ConfigError, match=r"prompt='half \\ud83d': is not text that a file or its name can hold"):
        load_config(SampleConfig, file)
