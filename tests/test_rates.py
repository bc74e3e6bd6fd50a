"""Frame rates by their names, wherever one is given."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pavdm_dist.checkpoint import Checkpoint, SamplingDefaults
from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.config import SampleConfig
from pavdm_dist.data.buckets import Bucket, parse_buckets
from pavdm_dist.data.prepare import PrepareConfig
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.io.video import export_to_video, read_clip
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.values.fields import made
from pavdm_dist.values.merging import load_config
from pavdm_dist.values.rates import as_rate, rate_text

NTSC, FILM = Fraction(30000, 1001), Fraction(24000, 1001)


@pytest.mark.parametrize(
    ("written", "rate"),
    [
        (29.97, NTSC), ("29.97", NTSC), ("30000/1001", NTSC), ("30000:1001", NTSC), ("NTSC", NTSC), (29.97003, NTSC),
        (Fraction(30000, 1001), NTSC), (30000 / 1001, NTSC),
        (23.976, FILM), (23.98, FILM), (23.97, FILM), ("ntsc-film", FILM), (23.976024, FILM),
        (59.94, Fraction(60000, 1001)), (119.88, Fraction(120000, 1001)), (47.952, Fraction(48000, 1001)),
        (14.985, Fraction(15000, 1001)), (11.988, Fraction(12000, 1001)),
        (24, 24), (25, 25), (30, 30), (60, 60), (12, 12), (15, 15), (12.5, Fraction(25, 2)), (24.5, Fraction(49, 2)),
        ("pal", 25), ("film", 24), ("25/1", 25), (0.5, Fraction(1, 2)), (29.9, Fraction(299, 10)), (1000, 1000),
    ],
)  # fmt: skip
def test_rates_are_what_their_names_mean(written: float | str, rate: Fraction) -> None:
    assert as_rate(written) == rate


@pytest.mark.parametrize(
    "written", [0, -24, 1001, float("nan"), float("inf"), "0", "1/0", "24fps", "", "29,97", "1/9999"]
)
def test_what_is_no_rate_is_refused(written: float | str) -> None:
    with pytest.raises(ConfigError, match=r"fps=.*: must be"):
        as_rate(written)


def test_rates_have_short_names() -> None:
    for fps, text in ((NTSC, "29.97"), (29.97, "29.97"), (23.976, "23.976"), (24, "24"), (12.5, "12.5"), (10, "10")):
        assert rate_text(float(fps)) == text
    assert rate_text(0.0) == "0" and rate_text(1 / 3) == "0.3333333333"


def test_settings_take_names() -> None:
    for cls in (SampleConfig, PrepareConfig):
        for word in ("fps=30000/1001", "fps=ntsc", "fps=29.97"):
            found = load_config(cls, None, [word]).fps  # type: ignore[attr-defined]
            assert isinstance(found, float) and as_rate(found) == NTSC
        for word, rate in (("fps=24:1", 24.0), ("fps=30:1", 30.0), ("fps=030", 30.0)):
            assert load_config(cls, None, [word]).fps == rate  # type: ignore[attr-defined]
        assert load_config(cls, None, ["fps=null"]).fps is None  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match="fps=fast: must be a number"):
            load_config(cls, None, ["fps=fast"])


def test_files_take_names(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("fps: 24000/1001\n")
    assert as_rate(load_config(SampleConfig, tmp_path / "c.yaml").fps or 0) == FILM
    (tmp_path / "c.yaml").write_text("fps: 24:1\n")
    assert load_config(SampleConfig, tmp_path / "c.yaml").fps == 24
    assert as_rate(made(SamplingDefaults, {"fps": "ntsc"}, "model_index.json").fps) == NTSC
    with pytest.raises(CheckpointError, match="fps=fast: must be a number, a fraction such as 30000/1001 or a name"):
        made(SamplingDefaults, {"fps": "fast"}, "model_index.json", error=CheckpointError)


def test_python_takes_names(tmp_path: Path) -> None:
    params = SamplingParams.resolve(Checkpoint.open(), fps="30000/1001")
    assert as_rate(params.fps) == NTSC
    export_to_video(np.zeros((6, 32, 32, 3), np.uint8), tmp_path / "a.mp4", fps="ntsc")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == NTSC
    assert len(read_clip(tmp_path / "a.mp4", fps="30000/1001")) == 6


def test_buckets_take_names() -> None:
    spec = CodecSpec(16, 8)
    for text in ("64x64x9@29.97", "64x64x9@30000/1001", "64x64x9@ntsc"):
        (bucket,) = parse_buckets([text], 24, spec)
        assert bucket.rate == NTSC and str(bucket) == "64x64x9@29.97"
        assert Bucket.parse(str(bucket)).same(bucket)
    with pytest.raises(ConfigError, match="is given twice"):
        parse_buckets(["64x64x9@ntsc", "64x64x9@29.97"], 24, spec)
    with pytest.raises(ConfigError, match=r"bucket '64x64x9@fast': fps=fast: must be a number, a fraction"):
        parse_buckets(["64x64x9@fast"], 24, spec)
