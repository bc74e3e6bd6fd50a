"""Prompt files as people have them: read as they were meant, or refused with the line."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest
from helpers import tiny_checkpoint

from pavdm_dist import cli
from pavdm_dist.commands import prompt_files
from pavdm_dist.commands.prompt_files import PromptLine, read_prompts
from pavdm_dist.commands.sample import check_videos
from pavdm_dist.config import SampleConfig, validate_sample
from pavdm_dist.errors import ConfigError

MEANT = ["a red three", "ein blaues Sieben-Ü", "三"]
TEXT = "\n".join(MEANT)


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.replace("\n", "\r\n").encode("utf-16"),
        TEXT.replace("\n", "\r\n").encode() + b"\r\n\x1a",
        TEXT.encode() + b"\x1a\x1a",
        TEXT.replace("\n", "\r").encode(),
        TEXT.replace("\n", "  \t\n\n \u00a0\n\t ").encode() + b"\n\n\n",
        b"# a list\n" + TEXT.replace("\n", "\n#blue seven\n").encode(),
        "\n".join(f"\ufeff{line}" for line in MEANT).encode(),  # files with marks, joined
    ],
)
def test_the_same_prompts_however_they_are_written(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(content)
    assert [line.prompt for line in read_prompts(file)] == MEANT


def test_lines_are_counted_as_an_editor_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes("# two\r\n\r\na\u2028b\x0bc\x85d\te\r\n  last  ".encode())
    with caplog.at_level(logging.INFO):
        assert read_prompts(file) == [PromptLine(3, "a\u2028b\x0bc\x85d\te"), PromptLine(4, "last")]
    assert "2 prompts; comments, which begin with #: 1" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"a three\ncaf\xe9 three\n", r"UTF-8 text file (line 2, byte 0xe9: "),
        ("p.txt", b"a three\n\xff\xd8\xff\xe0JFIF", "(line 2, byte 0xff: "),
        ("p.txt", b"\xff\xfea\0\0\xd8b\0", "is no readable UTF-8 text file ("),
        ("p.txt", "a red three".encode("utf-16-le"), "line 1 ('a\\x00 \\x00r"),
        (
            "p.txt",
            b"a three\na\0b\n",
            "line 2 ('a\\x00b') holds NUL: it is no text, or UTF-16 without a mark; save",
        ),
        ("p.txt", b"a three\n\x1a\na seven\n", "line 2 ('\\x1a') holds control characters only, no prompt"),
        ("p.txt", b"\x1a", "has no prompt, one a line is expected"),
        ("p.txt", b"", "has no prompt, one a line is expected"),
        ("p.txt", b"\n \r\n\t\n# a comment\n", "has no prompt, one a line is expected"),
        ("p.csv", b"prompt,seed\na three,1\n", "must be a plain text file with a prompt in every line, not .csv"),
        ("p.JSONL", b'{"prompt": "a three"}\n', "must be a plain text file with a prompt in every line, not .JSONL"),
    ],
)
def test_what_is_no_list_of_prompts_is_one_sentence(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        read_prompts(file)
    text = str(raised.value)
    assert text.startswith(f"prompts={file}: ") and said in text and "\n" not in text


def test_a_film_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "film.mp4"
    with open(file, "wb") as film:
        film.truncate(2**40)
    monkeypatch.setattr(prompt_files, "MOST_BYTES", 2**16)
    with pytest.raises(ConfigError, match=r"film.mp4: is larger than 0 MiB; one prompt a line is expected"):
        read_prompts(file)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def test_a_prompt_that_cannot_be_is_named_by_its_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a three\n\n\n" + "a red three " * 20_000 + "\n")
    words = ["sample", f"prompts={file}", f"model={model}", f"output={tmp_path}/out"]
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"pavdm: prompts={file}: line 4: ") and err.count("\n") == 1 and len(err) < 400, err
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, said in (
        (fifo, "is no regular file"),
        (tmp_path, "is no regular file"),
        (tmp_path / "no", "no such file"),
    ):
        with pytest.raises(ConfigError, match=f"prompts={path}: {said}"):
            validate_sample(SampleConfig(prompts=str(path)))
    assert not (tmp_path / "out").exists()


def test_thousands_of_prompts_are_checked_in_seconds(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("".join(f"a red three\r\n# {number}\r\n" for number in range(1000)))
    config = SampleConfig(prompts=str(file), model=str(model), output=str(tmp_path / "out"), num_frames=5)
    began = time.monotonic()
    videos = check_videos(config, overwrite=False)
    assert time.monotonic() - began < 30
    outputs = [video.output.rpartition("/")[2] for video in videos.all]
    assert outputs[0] == "0000-a-red-three-s0.mp4" and outputs[-1] == "0999-a-red-three-s999.mp4"
