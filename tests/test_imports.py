"""What a process pays for: the rooms that must stay light are imported in fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

HEAVY = ("ray", "deepspeed", "diffusers", "av")
# What a stage does when it comes up: torch's compiler is a second of CPU more.
STAGE = """
from pavdm_dist.models.catalog import backbone_shape, load_backbone
from pavdm_dist.models.source import Source
from pavdm_dist.io.shipped import shipped_models
source = Source.of(shipped_models()["embedded"]).part("transformer")
backbone_shape(source), load_backbone(source, (0, 2))
"""


def loaded_after(code: str) -> set[str]:
    """Names in ``sys.modules`` after ``code`` ran in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import pavdm_dist", (*HEAVY, "torch", "omegaconf")),
        ("import pavdm_dist.method.schedule", (*HEAVY, "torch", "omegaconf", "numpy")),
        (
            "import pavdm_dist.method.sampler, pavdm_dist.method.window, pavdm_dist.models, pavdm_dist.engine",
            (*HEAVY, "omegaconf"),
        ),
        ("import pavdm_dist.config", (*HEAVY, "torch", "omegaconf", "numpy")),
        ("import pavdm_dist.values.merging", (*HEAVY, "torch")),
        ("import pavdm_dist.commands.train", HEAVY),
        ("import pavdm_dist.cli", (*HEAVY, "torch", "omegaconf", "tqdm")),
        ("import contextlib, pavdm_dist.cli as c\nwith contextlib.suppress(SystemExit): c.main(['--help'])", HEAVY),
        ("import pavdm_dist.cli as c; c.main(['sample'])", (*HEAVY, "torch")),
        ("import pavdm_dist.cli as c; c.main(['sample', 'run_dir=x'])", (*HEAVY, "torch", "numpy")),
        (STAGE, (*HEAVY, "torch._dynamo")),
    ],
)
def test_light_imports(code: str, absent: tuple[str, ...]) -> None:
    assert loaded_after(code).isdisjoint(absent)


def test_help_answers_at_once() -> None:
    command = [sys.executable, "-m", "pavdm_dist", "--help"]
    # A bytecode cache may be cold and other work may hold the cores: the best of five is what the program needs.
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=os.environ, timeout=60)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.5


def test_public_names_are_listed_once_and_load() -> None:
    import pavdm_dist

    assert pavdm_dist.__all__ == [
        "NoiseSchedule",
        "PAVDMPipeline",
        "SamplingParams",
        "VideoRequest",
        "WindowPlan",
        "__version__",
    ]
    for name in pavdm_dist.__all__:
        assert getattr(pavdm_dist, name) is not None
    from pavdm_dist import request

    assert request.VideoRequest is pavdm_dist.VideoRequest and request.SamplingParams is pavdm_dist.SamplingParams
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        _ = pavdm_dist.Pipeline
