"""Manifests: what others write is read, what cannot be is named by line, and no line has a say in another's shot."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import pytest

from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.formats import MOST_CHARACTERS
from pavdm_dist.farm.manifest import ManifestError, checked, read_shots
from pavdm_dist.farm.shot import Shot, make_shot, seed_of, size_of


def _shots(path: Path) -> list[Shot]:
    return list(checked(str(path)))


def _written(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding=encoding)
    return path


def test_own_lines_have_all_fields_and_come_back_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").touch()
    line = {
        "id": "one.a_b-2", "prompt": "a red three", "negative_prompt": "grey", "seed": 7, "seconds": 2.5,
        "size": "48x32", "video": "clip.mp4", "priority": -3, "overrides": {"mode": "causal"}, "tags": ["x"],
    }  # fmt: skip
    (shot,) = _shots(_written(tmp_path / "m.jsonl", json.dumps(line) + "\n\n"))
    assert shot.video == str(tmp_path / "clip.mp4") and size_of(shot.size or "", "") == (32, 48)
    assert make_shot(json.loads(shot.to_line()), "again") == shot
    assert (shot.tags, shot.overrides, shot.priority) == (("x",), {"mode": "causal"}, -3)


def test_tables_text_and_batch_lines_of_others(tmp_path: Path) -> None:
    table = 'id,prompt,seed,num_frames,seconds,overrides,tags\nx,"a red, three",5,33,,"{""mode"": ""causal""}",a; b\n'
    (own,) = _shots(_written(tmp_path / "own.csv", table))
    assert own == Shot("x", "a red, three", seed=5, num_frames=33, overrides={"mode": "causal"}, tags=("a", "b"))
    sora = (
        "path,text,num_frames,fps,height,width,aspect_ratio\n/clips/a.mp4,a seven,51,24,240,424,0.56\n/p/b.png,b,,,,,\n"
    )
    clip, picture = _shots(_written(tmp_path / "sora.csv", sora))
    assert (clip.video, clip.num_frames, clip.size) == ("/clips/a.mp4", 51, "424x240")
    assert clip.overrides == {"fps": "24"} and picture.image == "/p/b.png" and picture.size is None
    lines = "# a comment\r\na red three||clips/a_s0_16f.mp4\r\n\r\nb || \r\n"
    with_clip, plain = _shots(_written(tmp_path / "lines.txt", lines))
    assert with_clip.video == str(tmp_path / "clips/a_s0_16f.mp4") and (plain.prompt, plain.video) == ("b", None)
    body = {"model": "any", "prompt": "a", "seconds": "4", "size": "1280x720", "input_reference": "p.jpg", "seed": 3}
    batch = {"custom_id": "request-1", "method": "POST", "url": "/v1/videos", "body": {**body, "guidance_scale": 2.0}}
    (shot,) = _shots(_written(tmp_path / "batch.jsonl", json.dumps(batch)))
    assert (shot.id, shot.seconds, shot.size, shot.seed) == ("request-1", 4.0, "1280x720", 3)
    assert shot.image == str(tmp_path / "p.jpg") and shot.overrides == {"guidance_scale": 2.0}


def test_a_number_that_is_none_is_no_second_name(tmp_path: Path) -> None:
    """NaN is not equal to itself."""
    (shot,) = _shots(_written(tmp_path / "m.jsonl", '{"prompt": "a", "fps": NaN}'))
    assert str(shot.overrides) == "{'fps': nan}"  # which the check of settings refuses


def test_names_of_the_same_may_say_the_same(tmp_path: Path) -> None:
    line = {"id": "x", "text": "a", "prompt": "a", "width": 64, "height": 48, "size": "64x48", "fps": 12}
    (shot,) = _shots(_written(tmp_path / "m.jsonl", json.dumps({**line, "overrides": {"fps": 12}})))
    assert shot == Shot("x", "a", size="64x48", overrides={"fps": 12})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_as_editors_save_them(tmp_path: Path, encoding: str) -> None:
    found = _shots(_written(tmp_path / "m.txt", "grün\r\nblau\r\n", encoding))
    assert [shot.prompt for shot in found] == ["grün", "blau"]
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(ConfigError, match="is no UTF-8 text"):
        _shots(tmp_path / "latin.txt")


def test_a_line_that_is_taken_out_changes_no_other_shot(tmp_path: Path) -> None:
    prompts = ["a red three", "a blue seven", "a red three", "a blue seven", "a red three", "one"]
    whole = _shots(_written(tmp_path / "a.txt", "\n".join(prompts)))
    assert len({shot.id for shot in whole}) == len({seed_of(shot, 0) for shot in whole}) == 6
    for out in range(6):
        left = _shots(_written(tmp_path / "b.txt", "\n".join(prompts[:out] + prompts[out + 1 :])))
        # Of equal lines it is the last one that has gone: they are each other's equals.
        gone = {shot.id for shot in whole} - {shot.id for shot in left}
        assert len(gone) == 1 and {shot.id for shot in left} < {shot.id for shot in whole}
        assert next(shot.prompt for shot in whole if shot.id in gone) == prompts[out]
    assert seed_of(whole[0], 0) != seed_of(whole[0], 1) and seed_of(Shot("x", "p", seed=9), 5) == 9


BAD = [
    ('{"prompt": "a"', "line 1: is not valid JSON"),
    ('["a"]', "line 1: must hold names and values"),
    ('{"prompt": "a", "frames": 3}', "line 1: no such field frames; the fields are id, prompt,"),
    ('{"id": "a"}', "line 1: prompt is missing"),
    ('{"prompt": "a", "seed": -1}', r"line 1: seed=-1: must be 0 to"),
    ('{"prompt": "a", "seed": 1.5}', "line 1: seed=1.5: must be"),
    ('{"prompt": "a", "id": "../../etc/passwd"}', r"line 1: id='../../etc/passwd': must be 1 to 100 letters"),
    ('{"prompt": "a", "id": ".."}', "line 1: id='..': must be"),
    ('{"prompt": "a", "id": "a/b"}', "line 1: id='a/b': must be"),
    ('{"prompt": "  "}', "line 1: prompt='  ': must be text"),
    ('{"prompt": "a", "size": "240p"}', "line 1: size='240p': must be WIDTHxHEIGHT"),
    ('{"prompt": "a", "num_frames": 3, "seconds": 2}', "line 1: num_frames=3 and seconds=2: give one"),
    ('{"prompt": "a", "overrides": [1]}', "line 1: overrides="),
    ('{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {}}', "must be POST /v1/videos"),
    ('{"prompt": "' + "a" * MOST_CHARACTERS + '"}', "line 1: is longer than"),
    ('{"prompt": "a", "overrides": {"prompt_suffix": "\\ud800"}}', r"line 1: overrides=.*ud800.*: is not text that"),
    ('{"prompt": "a", "width": 64}', "line 1: width=64: give width and height, or size=WIDTHxHEIGHT"),
    ('{"prompt": "a", "size": "64x48", "width": 64, "height": 32}', "line 1: size=64x48 and width x height=64x32: are"),
    ('{"text": "a", "prompt": "b"}', "line 1: text=a and prompt=b: are names of the same; give one of them"),
    ('{"prompt": "a", "id": "x", "custom_id": "y"}', "line 1: id=x and custom_id=y: are names of the same"),
    ('{"prompt": "a", "fps": 24, "overrides": {"fps": 12}}', "line 1: fps=24 and overrides.fps=12: are names of"),
    ('{"prompt": "a", "id": NaN}', "line 1: id=nan: must be text"),
    ('{"prompt": "a", "num_frames": NaN}', "line 1: num_frames=nan: must be"),
    ("[" * 100_000, "line 1: is not valid JSON: it is nested too deeply"),
]


@pytest.mark.parametrize(("line", "said"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_is_named_by_line(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(ManifestError, match=said) as refused:
        _shots(_written(tmp_path / "m.jsonl", line + '\n{"prompt": "fine"}\n'))
    assert "\n" not in str(refused.value) and "1 line(s) cannot be used" in str(refused.value)


def test_all_faults_are_told_together_and_doubled_ids_with_both_lines(tmp_path: Path) -> None:
    lines = ['{"prompt": "a", "id": "x"}', "{", '{"prompt": "b", "id": "x"}', *["nothing"] * 20]
    with pytest.raises(ManifestError) as refused:
        _shots(_written(tmp_path / "m.jsonl", "\n".join(lines)))
    said = str(refused.value)
    assert "22 line(s)" in said and "line 3: id=x is that of line 1, too" in said and said.endswith("; and 10 more")
    with pytest.raises(ManifestError, match="line 2: has not the 2 columns"):
        _shots(_written(tmp_path / "m.csv", "id,prompt\nx,a,b\n"))
    with pytest.raises(ManifestError, match="has no shot"):
        _shots(_written(tmp_path / "empty.jsonl", "\n\n"))
    with pytest.raises(ConfigError, match=r"must end in one of .jsonl"):
        _shots(_written(tmp_path / "m.json", "[]"))
    with pytest.raises(ConfigError, match="cannot be read"):
        _shots(tmp_path / "none.jsonl")


def test_a_manifest_is_checked_in_constant_memory(tmp_path: Path) -> None:
    def peak(lines: int) -> int:
        path = tmp_path / f"{lines}.jsonl"
        with path.open("w") as file:
            for number in range(lines):
                file.write(json.dumps({"id": f"shot-{number:06d}", "prompt": f"number {number}"}) + "\n")
        tracemalloc.start()
        assert sum(1 for _, shot in read_shots(str(path)) if isinstance(shot, Shot)) == lines
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(3000)  # Python keeps two thousand tuples of each length for the next use
    assert peak(5000) < peak(500) + 30_000


_LINES = (
    b'{"id": "a", "prompt": "x", "seed": 3, "overrides": {"fps": 24}, "tags": ["a"]}\n',
    b'id,prompt,seed,overrides,tags,width,height\nx,"a, b",5,"{""mode"": 1}",a;b,3,4\n',
    b'{"custom_id": "r", "method": "POST", "url": "/v1/videos", "body": {"prompt": "a", "seconds": "4"}}\n',
    b"a||b.mp4\n# c\n",
)
_BITS = (
    b"null", b"[]", b"1e999", b"NaN", b'"', b",", b"\0", b"\xff", b"\r", b"\n", b"9" * 400, b"-1", b"\\ud800",
    b'{"a":' * 30, b'"body": 3', b'"overrides": null', b'"id": null', b'"prompt": 7',
)  # fmt: skip


def test_whatever_a_manifest_holds_it_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    rng, refused = random.Random(5), list[str]()
    for _ in range(1500):
        content = bytearray(rng.choice(_LINES) * rng.randrange(1, 3))
        for _ in range(rng.randrange(5)):
            start = rng.randrange(len(content) + 1)
            content[start : start + rng.randrange(8)] = rng.choice(_BITS)
        path = tmp_path / f"m{rng.choice(('.jsonl', '.csv', '.tsv', '.txt'))}"
        path.write_bytes(content)
        try:
            shots = _shots(path)
        except ConfigError as error:
            refused.append(str(error))
        else:
            assert [make_shot(json.loads(shot.to_line()), "again") for shot in shots] == shots
    assert 0 < len(refused) < 1500 and not any("\n" in said for said in refused)
