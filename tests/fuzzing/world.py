"""Whole files for cases to damage, and how a refusal is told from a fault."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from helpers import tiny_checkpoint

from pavdm_dist import cli
from pavdm_dist.commands.sample import render_command
from pavdm_dist.commands.words import run_config
from pavdm_dist.config import SampleConfig
from pavdm_dist.errors import PAVDMError
from pavdm_dist.io.video import export_to_video


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
        config = run_config(SampleConfig, self.words(output="v.mp4")[1:], needs_prompt=True)
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

    def found(self, frames: int) -> None:
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
    """The same of a command line, run in this process: one line that begins ``pavdm: ``, exit status 2 or 101."""
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
    *_, last = said.rstrip("\n").split("\n")
    assert status == 2 or (status == 101 and last.startswith("pavdm: output=")), (status, said)  # a video failed
    assert last.startswith("pavdm: ") and len(last) > 15, said
    assert "Traceback" not in said, said
    return last
