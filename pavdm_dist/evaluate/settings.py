"""What ``pavdm eval`` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pavdm_dist.values.fields import Within

Wanted = Literal["auto", "on", "off"]


@dataclass
class EvalConfig:
    """Everything ``pavdm eval`` knows. ``auto`` measures what is installed and what fits the video."""

    videos: list[str] = field(default_factory=list)  # files, and folders of them
    groups: Literal["method", "folder"] = (
        "method"  # what is compared: how they were sampled, or what folder they are in
    )
    shown: Annotated[int, Within(0)] = 8  # prompts whose frames the report shows, all groups side by side
    output: str | None = None  # new folder for report.json, report.html and plots; None = printed only
    # seconds of a stretch that is measured as one; None = a chunk, as the video's sidecar has it, else a second
    chunk_seconds: Annotated[float, Within(0, above=True)] | None = None
    prompt: str | None = None  # of videos without a sidecar that says theirs
    digits: Wanted = "auto"  # read the shipped world's digits back from the pixels
    features: Wanted = "auto"  # EfficientNet-Lite features: subject consistency, distance to a reference
    scenes: Wanted = "auto"  # count scenes
    motion: Wanted = "auto"  # optical flow: dynamic degree
    # networks that VBench measures with: folders in Hugging Face layout, or hub ids (needs the extra `text`)
    dino: str | None = None  # facebook/dino-vitb16: dino_subject_consistency
    clip: str | None = None  # openai/clip-vit-base-patch32: clip_background_consistency
    aesthetic: str | None = None  # file of LAION's linear head: clip_aesthetic_quality, together with ...
    aesthetic_clip: str | None = None  # ... the CLIP that it reads, openai/clip-vit-large-patch14
    # frames a second that these networks look at; None = every frame, as VBench
    pictures_per_second: Annotated[float, Within(0, above=True)] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of these networks
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # that they compute in
    reference: list[str] = field(default_factory=list)  # real videos that the features' distance is taken to
    resamples: Annotated[int, Within(100, 1_000_000)] = 2000  # of the bootstrap
    seed: Annotated[int, Within(0)] = 0  # of the bootstrap
