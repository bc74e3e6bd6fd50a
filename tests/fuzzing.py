"""Bad input as Hypothesis makes it: settings, prompts, clips, model folders and what interrupted videos leave.

A *case* is plain data that a strategy draws; a category's function does it to real files and gives it to the code that
has to judge it. What comes back is ``taken`` or the sentence of a refusal; everything else is a fault.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import string
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from helpers import tiny_checkpoint
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pavdm_dist import cli
from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.sample import check_videos, render_command
from pavdm_dist.commands.videos import words_to_resume
from pavdm_dist.config import SampleConfig, validate_sample
from pavdm_dist.data.prepare import PrepareConfig
from pavdm_dist.errors import PAVDMError
from pavdm_dist.io.video import export_to_video, probe, read_clip
from pavdm_dist.merging import load_config
from pavdm_dist.train.settings import TrainConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"

# --- values --------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 1000, 2**31, 2**63, 10**30]),
    st.sampled_from([0.5, -1.0, 1e-30, 1e308, float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(["", "fast", "two", "3", "null", "STDiT3", "ü", "a\0b", "../../etc/passwd", "x" * 5000]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "0", "é"]), inner, max_size=2),
    max_leaves=6,
)
TEXTS = st.one_of(
    SCALARS.map(str),
    st.text(max_size=12),
    st.sampled_from(
        [
            "[", "{", "[1", "{a: b}", "[1, 2]", "[x]", "1e999", ".nan", ".inf", "-.inf", "9" * 30, "9" * 5000, "~",
            "1_0", "0x" + "f" * 5000, "2001-99-99", "&a [*a]", "*a", "!!python/object:os.system {}", "[" * 3000,
            "{from_chunk: 1}", "[{from_chunk: 99, prompt: y}]", "[{from_chunk: -1, prompt: y}]", "- 1", "a: b: c",
            "\t", "${x}", "\\",
        ]
    ),
)  # fmt: skip
# Ten anchors, each ten times the one before.
BOMB = b"a0: &a0 [x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 11)
)
RAW = st.binary(max_size=200) | st.sampled_from(
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b"1" * 6000, b"&a [*a]", BOMB]
)


@dataclass(frozen=True)
class Damage:
    """What is done to a file's bytes: ``cut`` to ``at``, a bit ``flip``, eight bytes (``length``), or ``noise``."""

    kind: str
    at: float
    value: int

    def __call__(self, content: bytes, header: int | None = None) -> bytes:
        """``header``: damage falls within so many first bytes."""
        place = int(self.at * max(1, min(len(content), header or len(content)) - 1))
        if self.kind == "cut":
            return content[:place]
        if self.kind == "flip" and content:
            return content[:place] + bytes([content[place] ^ (1 << self.value % 8)]) + content[place + 1 :]
        if self.kind == "length":
            return struct.pack("<Q", self.value) + content[8:]
        return content[:place] + np.random.default_rng(self.value).bytes(64) + content[place + 64 :]


DAMAGE = st.builds(
    Damage,
    st.sampled_from(["cut", "flip", "flip", "length", "noise"]),
    st.floats(0, 1, width=32),
    st.sampled_from([0, 1, 7, 100, 2**31, 2**40, 2**63]) | st.integers(0, 10**6),
)

# --- the ground they stand on ---------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Whole files, made once, and a folder for the damaged ones."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def clips(self) -> list[Path]:
        return sorted((self.root / "clips").iterdir())

    @property
    def begun(self) -> Path:
        """An output with ``.parts`` of an interrupted recording."""
        return self.root / "begun" / "v.mp4"

    def fresh(self) -> Path:
        folder = self.root / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def model_copy(self) -> Path:
        folder = self.fresh() / "model"
        shutil.copytree(self.model, folder)
        return folder

    @classmethod
    def made(cls, root: Path) -> World:
        world = cls(root)
        tiny_checkpoint(world.model)
        frames = np.random.default_rng(0).integers(0, 256, (30, 32, 48, 3), np.uint8)
        (root / "clips").mkdir()
        export_to_video(frames, root / "clips" / "a.mp4", 24)
        for name, codec, pixels in (
            ("b.mkv", "mpeg4", "yuv420p"),
            ("c.avi", "mjpeg", "yuvj420p"),
            ("d.gif", "gif", "rgb8"),
        ):
            with av.open(str(root / "clips" / name), "w") as container:
                stream = container.add_stream(codec, rate=24)
                stream.height, stream.width, stream.pix_fmt = 32, 48, pixels
                for frame in frames:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame).reformat(format=pixels)))
                container.mux(stream.encode(None))
        with av.open(str(root / "clips" / "e.wav"), "w") as container:
            sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            for part in np.zeros((4, 1, 1024), np.int16):
                piece = av.AudioFrame.from_ndarray(part, format="s16", layout="mono")
                piece.rate = 8000
                container.mux(sound.encode(piece))
        world._begin()
        return world

    def words(self, prompt: str | None = "a red three", output: str = "o.mp4") -> list[str]:
        """A command that makes a short video in the folder of a case."""
        place = self.root / "case" / output
        given = "num_frames=37 num_inference_steps=3 window_chunks=3 guidance_scale=1 chunks_per_segment=2"
        rest = [*given.split(), "save_latents=true", f"model={self.model}", f"output={place}"]
        return ["sample", *([] if prompt is None else [prompt]), *rest]

    def _begin(self) -> None:
        """A video that is made whole, and one that was interrupted."""
        config = cli.run_config(SampleConfig, self.words(output="v.mp4")[1:], needs_prompt=True)
        render_command(config, False, Silent)
        (self.root / "case").rename(self.root / "whole")
        with contextlib.suppress(KeyboardInterrupt):
            render_command(config, False, Interrupting)
        (self.root / "case").rename(self.begun.parent)
        assert (self.begun.parent / "v.mp4.parts" / "state.previous.safetensors").exists()


class Silent:
    """Progress that nobody sees."""

    def __init__(self, *_: object) -> None:
        pass

    def chunk(self, stream: int, index: int, frames: int) -> None:
        pass

    def close(self) -> None:
        pass


class Interrupting(Silent):
    """Ctrl-C after the fourth chunk."""

    def chunk(self, stream: int, index: int, frames: int) -> None:
        if index == 3:
            raise KeyboardInterrupt


# --- categories -----------------------------------------------------------------------------------------


def taken(judge: Callable[[], object], also: tuple[type[Exception], ...] = ()) -> str:
    """``taken``, or the sentence of a refusal; anything else that is raised is a fault and goes on.

    ``also``: what whoever calls it turns into a sentence.
    """
    try:
        judge()
    except (PAVDMError, *also) as error:
        text = str(error)
        assert text.strip(), "a refusal without a word"
        assert "Traceback" not in text
        return text
    return "taken"


def command(words: list[str]) -> str:
    """The same of a command line, run in this process: one line that begins ``pavdm: ``, exit status 2."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(words)
        except SystemExit as stop:  # argparse, for words that begin with a dash
            if stop.code != 2 or "usage: pavdm" not in err.getvalue():
                raise
            return err.getvalue()
    return "taken" if status == 0 else refusal(status, err.getvalue())


def refusal(status: int, said: str) -> str:
    """The sentence, behind what may have been logged before it."""
    assert status == 2, (status, said)
    *_, last = said.rstrip("\n").split("\n")
    assert last.startswith("pavdm: ") and len(last) > 15, said
    assert "Traceback" not in said, said
    return last


_KEYS = [field.name for field in fields(SampleConfig) if field.name not in ("model", "balance")]
_SECTIONS = [f"displaced.{name}" for name in ("resync_every_steps", "adaptive")] + ["cluster.devices", "cluster.tflops"]
OVERRIDES = st.lists(
    st.tuples(st.sampled_from([*_KEYS, *_SECTIONS, "num_frame", "seed.x", "", "displaced"]), TEXTS).map("=".join)
    | st.text(string.printable, max_size=10),
    min_size=1,
    max_size=4,
)
SETTINGS = st.tuples(st.sampled_from([["plan"], ["sample", "a three", "--dry-run"], ["simulate"]]), OVERRIDES)


def settings(case: tuple[list[str], list[str]], world: World) -> list[str]:
    """Overrides of a verb that computes no video."""
    verb, overrides = case
    model = [] if verb == ["simulate"] else [f"model={world.model}"]
    return [*verb, *model, *overrides]


def judge_command(words: list[str], case: Any, world: World) -> str:
    return command(words)


FILES = st.tuples(
    st.sampled_from([SampleConfig, TrainConfig, PrepareConfig]),
    st.one_of(
        st.dictionaries(st.sampled_from([*_KEYS, "optimizer", "model", "source", "data"]), JSON, max_size=4).map(
            lambda values: json.dumps(values).encode()
        ),
        RAW,
        st.lists(TEXTS, max_size=4).map(lambda lines: "\n".join(lines).encode(errors="surrogatepass")),
    ),
)


def files(case: tuple[type, bytes], world: World) -> list[str]:
    """Config files."""
    path = world.fresh() / "c.yaml"
    path.write_bytes(case[1])
    return [*world.words(), str(path), "num_stages=0"]


def judge_file(words: list[str], case: tuple[type, bytes], world: World) -> str:
    cls, path = case[0], world.root / "case" / "c.yaml"

    def judge() -> None:
        config = load_config(cls, path)
        if isinstance(config, SampleConfig):
            config.prompt = "a three"
            validate_sample(config)

    return taken(judge)


PROMPTS = st.tuples(
    st.one_of(
        st.text(st.characters(), max_size=60),
        st.sampled_from(["a " * 100, "\ud800", "a\0b", "", " ", "${x}", "../..", "$(rm x)", "a\nb", "ÄÖÜ" * 200]),
    ),
    st.sampled_from(["prompt", "negative_prompt", "schedule", "file"]),
    st.integers(-1, 6),
)


def prompts(case: tuple[str, str, int], world: World) -> list[str]:
    """Texts, alone, from a file, or from a later chunk on."""
    text, where, start = case
    first, *rest = world.words(prompt=None, output="out")
    rest.append("guidance_scale=2")
    if where == "file":
        path = world.fresh() / "prompts.txt"
        path.write_bytes(text.encode(errors="surrogatepass"))
        return [first, *rest, f"prompts={path}"]
    if where == "schedule":
        word = json.dumps([{"from_chunk": start, "prompt": text}])
        return [first, "a three", *rest, f"prompt_schedule={word}"]
    return [first, *([] if where == "prompt" else ["a three"]), *rest, f"{where}={text}"]


def judge_prompts(words: list[str], case: Any, world: World) -> str:
    def judge() -> None:
        config = cli.run_config(SampleConfig, words[1:], needs_prompt=True)
        for video in check_videos(config, overwrite=False).all:
            name = os.path.relpath(video.output, config.output)
            assert os.sep not in name and name.endswith(".mp4"), f"{video.output} is not in {config.output}"

    return taken(judge)


CLIPS = st.tuples(st.integers(0, 4), st.lists(DAMAGE, max_size=2), st.sampled_from([None, 64, 400]), st.booleans())


def clips(case: tuple[int, list[Damage], int | None, bool], world: World) -> list[str]:
    """Conditioning clips: truncated, flipped, of other codecs, of sound only, empty, with lies in their headers."""
    number, damages, header, renamed = case
    whole = world.clips[number]
    content = whole.read_bytes()
    for damage in damages:
        content = damage(content, header)
    path = world.fresh() / ("clip.mp4" if renamed else f"clip{whole.suffix}")
    path.write_bytes(content)
    return [*world.words(), "start=chunk", f"video={path}"]


def judge_clip(words: list[str], case: Any, world: World) -> str:
    path = words[-1].partition("=")[2]

    def judge() -> None:
        probe(path)
        frames = read_clip(path, None, 32, 48, 24, "last", 4)
        assert frames.dtype == np.uint8 and frames.shape[1:] == (32, 48, 3) and len(frames) % 4 == 1

    return taken(judge)


_CONFIGS = ["model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json"]
_WEIGHTS = [f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"]
CONFIGS = st.tuples(
    st.sampled_from(_CONFIGS),
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 200), JSON),
        st.tuples(st.just("drop"), st.integers(0, 200), st.none()),
        st.tuples(st.just("raw"), st.just(0), RAW | JSON.map(lambda value: json.dumps(value).encode())),
        st.tuples(st.just("damage"), st.just(0), DAMAGE),
    ),
)


def configs(case: tuple[str, tuple[str, int, Any]], world: World) -> list[str]:
    """JSON files of a model folder."""
    name, (what, number, value) = case
    folder = world.model_copy()
    path = folder / name
    if what in ("set", "drop"):
        content = json.loads(path.read_text())
        places = list(_places(content))
        holder, key = places[number % len(places)]
        if what == "set":
            holder[key] = value
        else:
            del holder[key]
        path.write_text(json.dumps(content))
    else:
        path.write_bytes(value if what == "raw" else value(path.read_bytes()))
    return [*world.words(), f"model={folder}"]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(pairs):
        yield value, key
        yield from _places(entry)


def judge_model(words: list[str], case: Any, world: World) -> str:
    def judge() -> None:
        checkpoint = Checkpoint.open(words[-1].partition("=")[2])
        checkpoint.require_weights()
        _ = checkpoint.backbone, checkpoint.codec, checkpoint.text_encoder, checkpoint.null_text, checkpoint.identity

    return taken(judge)


SHARDS = st.tuples(
    st.sampled_from(_WEIGHTS),
    st.booleans(),
    st.one_of(
        st.tuples(st.just("damage"), st.integers(0, 1000), DAMAGE),
        st.tuples(st.just("header"), st.integers(0, 1000), DAMAGE),
        st.tuples(st.just("lose a shard"), st.integers(0, 1000), st.none()),
        st.tuples(st.just("lose a tensor"), st.integers(0, 1000), st.none()),
        st.tuples(st.just("shape"), st.integers(0, 1000), st.sampled_from([[], [0], [1], [2, 3], [1] * 6])),
        st.tuples(st.just("dtype"), st.integers(0, 1000), st.sampled_from(["int64", "bool", "float64", "bfloat16"])),
        st.tuples(st.just("index"), st.integers(0, 1000), JSON),
        st.tuples(st.just("misplace"), st.integers(0, 1000), st.sampled_from(["no.safetensors", "../x", "/x"])),
        st.tuples(st.just("raw index"), st.just(0), RAW),
    ),
)  # fmt: skip


def shards(case: tuple[str, bool, tuple[str, int, Any]], world: World) -> list[str]:
    """Weights of a model folder, in one file or in shards with an index."""
    name, sharded, (what, number, value) = case
    folder = world.model_copy()
    path = folder / name
    names = sorted(load_file(path))
    name = names[number % len(names)]
    if what in ("lose a tensor", "shape", "dtype"):
        tensors = load_file(path)
        if what == "lose a tensor":
            del tensors[name]
        else:
            tensors[name] = torch.ones(value) if what == "shape" else tensors[name].to(getattr(torch, value))
        save_file(tensors, path)
    index = path.with_name(f"{path.name}.index.json")
    damaged = path
    if sharded or "index" in what or "shard" in what or what == "misplace":
        tensors = load_file(path)
        path.unlink()
        halves = {key: f"part-{position % 2}.safetensors" for position, key in enumerate(sorted(tensors))}
        for part in set(halves.values()):
            save_file({key: tensors[key] for key in tensors if halves[key] == part}, path.with_name(part))
        damaged = path.with_name(f"part-{number % 2}.safetensors")
        content: Any = {"weight_map": halves}
        if what == "index":
            content = {"weight_map": value} if number % 2 else {"weight_map": {**halves, name: value}}
        elif what == "misplace":
            halves[name] = value
        elif what == "lose a shard":
            damaged.unlink()
        index.write_bytes(value if what == "raw index" else json.dumps(content).encode())
    if what in ("damage", "header"):
        content = damaged.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        damaged.write_bytes(value(content, header if what == "header" else None))
    return [*world.words(), f"model={folder}"]


_PARTS = [
    "state.safetensors", "state.previous.safetensors", "settings.yaml", "segment-000000-000001.mp4",
    "segment-000002-000003.mp4", "latents-000000-000001.safetensors", "playlist.ffconcat",
]  # fmt: skip
STATES = st.tuples(
    st.lists(
        st.tuples(st.sampled_from(_PARTS), st.one_of(DAMAGE, RAW, st.none(), st.just("folder"))),
        min_size=1,
        max_size=3,
        unique_by=lambda one: one[0],
    ),
    st.none() | JSON | RAW,
)


def states(case: tuple[list[tuple[str, Any]], Any], world: World) -> list[str]:
    """What an interrupted video left: state, settings, segments, latents; and a sidecar that is not one."""
    damages, sidecar = case
    folder = world.fresh()
    shutil.copytree(world.begun.parent, folder, dirs_exist_ok=True)
    output = folder / "v.mp4"
    parts = Path(f"{output}.parts")
    for name, damage in damages:
        path = parts / name
        content = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
        if damage == "folder":
            path.mkdir()
        elif damage is not None:
            path.write_bytes(damage(content) if isinstance(damage, Damage) else damage)
    if sidecar is not None:
        content = sidecar if isinstance(sidecar, bytes) else json.dumps(sidecar).encode()
        output.with_suffix(".json").write_bytes(content)
    return world.words(output="v.mp4")


def judge_state(words: list[str], case: Any, world: World) -> str:
    output = world.root / "case" / "v.mp4"
    taken(lambda: words_to_resume(f"{output}.parts"))
    whole = json.loads((world.root / "whole" / "v.json").read_text())

    def judge() -> None:
        (made,) = render_command(cli.run_config(SampleConfig, words[1:], needs_prompt=True), False, Silent)["videos"]
        assert (made["num_frames"], made["latents_sha256"]) == (whole["num_frames"], whole["latents_sha256"])

    said = taken(judge)
    assert output.exists() == (said == "taken"), "the final file of a video that is not finished"
    return said


@dataclass(frozen=True)
class Category:
    """A strategy of cases, what makes files and the words of a command of one, what judges it here, and how many the
    full run draws."""

    cases: st.SearchStrategy[Any]
    prepare: Callable[[Any, World], list[str]]
    judge: Callable[[list[str], Any, World], str]
    full: int


CATEGORIES = {
    "settings": Category(SETTINGS, settings, judge_command, 250),
    "files": Category(FILES, files, judge_file, 150),
    "prompts": Category(PROMPTS, prompts, judge_prompts, 120),
    "clips": Category(CLIPS, clips, judge_clip, 200),
    "configs": Category(CONFIGS, configs, judge_model, 250),
    "shards": Category(SHARDS, shards, judge_model, 200),
    "states": Category(STATES, states, judge_state, 150),
}
ANY = st.sampled_from([*CATEGORIES]).flatmap(lambda name: st.tuples(st.just(name), CATEGORIES[name].cases))


def as_process(name: str, case: Any, world: World) -> str:
    """The same as a command of its own: ends in time, with the status and the sentence, and no final file is there
    that is not complete."""
    folder = world.fresh()
    words = CATEGORIES[name].prepare(case, world)
    try:
        [word.encode() for word in words]
        assert not any("\0" in word for word in words)
    except (UnicodeEncodeError, AssertionError):
        return "not for a command line"
    done = subprocess.run(
        [sys.executable, "-m", "pavdm_dist", *words], capture_output=True, timeout=90, cwd=folder, check=False
    )
    said = done.stderr.decode(errors="replace")
    assert "Traceback" not in said, said
    for path in folder.glob("*.mp4"):
        assert path.with_suffix(".json").exists() or path.name.startswith("clip"), f"{path} is not complete"
    assert not list(folder.glob(".*.tmp")), "a staged file was left"
    if done.returncode == 0:
        return "taken"
    return said if "usage: pavdm" in said else refusal(done.returncode, said)
