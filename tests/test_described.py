"""What `--print-config` says: every setting of every verb with its meaning, as YAML that means the same."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml

from pavdm_dist import cli
from pavdm_dist.config import LoraConfig, PromptChange, SampleConfig
from pavdm_dist.train.objective import WindowKind
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.values.described import described_yaml, said_of
from pavdm_dist.values.fields import FrameRate, Within
from pavdm_dist.values.merging import load_config, to_dict
from pavdm_dist.verbs import SETTINGS

LONG = "  # sides of Part, px; null = all, which is told at such a length that it takes two lines, and finds no place"


@dataclass
class Part:
    """A section; see ``elsewhere``.

    Attributes:
        left, right: sides of :class:`Part`, px; None = all, which is told at such a length that it takes two lines, and
            finds no place behind the key.
    """

    left: int | None = None
    right: int = 2


@dataclass
class Described:
    # a heading; None = none
    name: str = "x"  # of it
    kind: Literal["a", "b"] = "a"
    # above its
    # field
    share: Annotated[float, Within(0, 1)] | None = None
    rate: FrameRate = 24.0  # of frames
    wide: list[Annotated[int, Within(1, 10**9)]] = field(
        default_factory=list
    )  # behind a field of several lines; None = none ...
    part: Part = field(default_factory=Part)
    words: list[str] = field(default_factory=lambda: ["a # b"])  # as they are


@dataclass
class Inherited(Described):
    name: str = "y"
    kind: Literal["a", "b"] = "b"  # another


def settings_of(verb: str) -> Any:
    module, name = SETTINGS[verb]
    return getattr(import_module(module), name)


def test_each_line_has_its_comment_and_what_is_legal() -> None:
    assert described_yaml(Described()) == (
        "# a heading; null = none\n"
        "name: x  # of it\n"
        "kind: a  # [a | b]\n"
        "share: null  # [0 to 1] above its field\n"
        "rate: 24.0  # [above 0 and at most 1,000, also 30000/1001 or ntsc] of frames\n"
        "wide: []  # [a list, each entry 1 or more] behind a field of several lines; null = none ...\n"
        "part:  # A section; see elsewhere\n"
        f"{LONG} behind the\n  # key\n"
        "  left: null\n"
        f"{LONG} behind the\n  # key\n"
        "  right: 2\n"
        "# as they are\n"
        "words:\n"
        "- 'a # b'\n"
    )
    assert said_of(Inherited)["name"].about == "of it"
    assert said_of(Inherited)["kind"].about == "another"


def test_without_source_files_the_lines_are_bare(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(_: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr("inspect.getsource", nowhere)
    said_of.cache_clear()
    try:
        assert described_yaml(Described()).startswith("name: x\nkind: a  # [a | b]\nshare: null  # [0 to 1]\n")
    finally:
        said_of.cache_clear()


@pytest.mark.parametrize("verb", SETTINGS)
def test_what_a_verb_prints_means_the_same(verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cls = settings_of(verb)
    words = [*verb.split(), *(["--out", "renders"] if verb == "farm run" else [])]
    assert cli.main([*words, "--print-config"]) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "printed.yaml"
    file.write_text(printed)
    assert load_config(cls, file) == load_config(cls)
    assert list(yaml.safe_load(printed)) == [entry.name for entry in dataclasses.fields(cls)]
    assert max(map(len, printed.splitlines())) <= 120
    if verb != "eval":  # which takes no file
        assert cli.main([*words, str(file), "--print-config"]) == 0
        assert capsys.readouterr().out == printed


@pytest.mark.parametrize("verb", SETTINGS)
def test_every_setting_says_what_it_means(verb: str) -> None:
    def silent(cls: type, section: str = "") -> Iterator[str]:
        said = said_of(cls)
        for name, hint in typing.get_type_hints(cls).items():
            if name not in said or not said[name].about:
                yield section + name
            if dataclasses.is_dataclass(hint):
                yield from silent(typing.cast(type, hint), f"{section}{name}.")

    assert list(silent(settings_of(verb))) == []


@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(
            prompt="one: # two\nthree \x85 ${x} " + "long " * 60,
            prompt_schedule=[PromptChange(1, "a"), PromptChange(3, "b # c")],
            timed_prompts={"0s": "a: b", "2s": "# d"},
            lora=[LoraConfig("x", 0.5)],
            layers_per_stage=[1, 2],
            num_stages=2,
            output="- [x",
        ),
        TrainConfig(sampling={"a": {"b": [1, {"c": None}]}, "d": "??? # e"}, deepspeed={"x": True}),
    ],
)
def test_any_settings_read_back_equal(config: Any, tmp_path: Path) -> None:
    if isinstance(config, TrainConfig):
        config.objective.mixture = [WindowKind(0.5, "replacement"), WindowKind()]
    file = tmp_path / "printed.yaml"
    file.write_bytes(described_yaml(config).encode())
    read = load_config(type(config), file)
    assert to_dict(read) == to_dict(config) and read == config
