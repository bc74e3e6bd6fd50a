"""Models with random weights and streams of public shapes, for `gpu.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pavdm_dist.io.shipped import shipped_models
from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.sampler import num_branches
from pavdm_dist.method.schedule import Mode, WindowPlan
from pavdm_dist.method.stream import Conditioning, Stream
from pavdm_dist.method.window import WindowSnapshot
from pavdm_dist.models.base import Backbone, FrameInfo
from pavdm_dist.models.loading import convert
from pavdm_dist.models.source import load_config
from pavdm_dist.models.stdit3 import STDiT3, STDiT3Config
from pavdm_dist.models.wan import Wan, WanConfig

TINY = STDiT3Config(depth=2, hidden_size=64, num_heads=4, caption_channels=32, model_max_length=8, pred_sigma=False)


@dataclass(frozen=True)
class Case:
    """What is sampled.

    Attributes:
        name: of the shape.
        plan: without a length.
        cells: latent height and width.
        fps: frames per second.
        guidance: scale.
        modes: that are measured.
        codec: the shipped shape whose codec decodes it; None = not decoded.
        step, shift: how chunks come to their next level; the time shift of the levels.
    """

    name: str
    plan: WindowPlan
    cells: tuple[int, int]
    fps: float
    guidance: float
    modes: tuple[Mode, ...] = ("window", "causal", "displaced")
    codec: str | None = None
    step: str = "euler"
    shift: float = 1.0

    @property
    def branches(self) -> int:
        return num_branches(self.guidance)

    def stream(
        self, model: Backbone, mode: Mode, chunks: int | None, chunks_per_unit: int = 1, number: int = 0
    ) -> Stream:
        """Of random texts, one of them the null text."""
        generator = torch.Generator().manual_seed(1)
        texts = [torch.randn(model.spec.text_len, model.spec.text_dim, generator=generator) for _ in range(2)]
        return Stream(
            id=number, plan=replace(self.plan, num_chunks=chunks),
            schedule=NoiseSchedule(self.plan.num_inference_steps, self.shift), seed=0,
            latent_shape=(model.spec.latent_channels, *self.cells),
            conditioning=Conditioning.build([(0, texts[0])], texts[1]),
            info=FrameInfo(8 * self.cells[0], 8 * self.cells[1], self.fps), guidance_scale=self.guidance, mode=mode,
            step=self.step, chunks_per_unit=chunks_per_unit,  # type: ignore[arg-type]
        )  # fmt: skip

    def full(self, model: Backbone, mode: Mode, chunks_per_unit: int) -> Stream:
        """An endless stream that goes on at a full window; with cached clean chunks, from its beginning."""
        stream, plan = self.stream(model, mode, None, chunks_per_unit), replace(self.plan, num_chunks=None)
        if plan.context == "cached":
            return stream
        row = plan.row(plan.steps_per_shift * (plan.window_chunks + plan.context_chunks - 1))
        shape = (stream.latent_shape[0], plan.latent_chunk_size, *stream.latent_shape[1:])
        latents = {chunk: torch.randn(shape) for chunk in row.window if chunk not in row.born}
        return replace(stream, resume=ResumePoint(WindowSnapshot(row.index, latents)))


XL = Case("stdit3-xl", WindowPlan(30, 6, 5, 1), (30, 53), 24, 7.0)
CASES = {
    "stdit3-xl": XL,
    "skyreels-v2-df-1.3b-540p": Case(
        "skyreels-v2-df-1.3b-540p", WindowPlan(32, 4, 5, 1), (68, 120), 24, 6.0, ("window", "causal"),
        "skyreels-v2-df-1.3b-540p",
    ),
    "wan2.2-ti2v-5b": Case(
        "wan2.2-ti2v-5b", WindowPlan(50, 5, 5, 1), (44, 80), 24, 5.0, ("window", "causal"), "wan2.2-ti2v-5b"
    ),
    "rolling": Case(
        "rolling", WindowPlan(5, 5, 3, 6, context="cached", anchor_chunks=1), (60, 104), 16, 1.0, ("window",),
        "wan2.1-t2v-1.3b", "renoise", 5.0,
    ),
}  # fmt: skip
QUICK = Case("tiny", WindowPlan(6, 3, 5, 1), (4, 6), 24, 7.0, codec="embedded")


def random_backbone(case: Case, device: torch.device) -> Backbone:
    """Untrained, bfloat16, all on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Backbone
        if case.name == "tiny":
            model = STDiT3(TINY).eval()
        elif case.name == "stdit3-xl":
            model = STDiT3(STDiT3Config(pred_sigma=False)).eval()
        else:
            folder = shipped_models()["wan2.1-t2v-1.3b" if case.name == "rolling" else case.name]
            model = _wan(load_config(folder / "transformer"))
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight", "norm_q.weight", "norm_k.weight")):
            # Attention to random keys is a mean of all values, whichever keys are read: errors would not be seen.
            weight.data.fill_(2.0)
    convert(model, torch.bfloat16, device, model.keeps_float32)
    return model


def _wan(config: dict[str, object]) -> Wan:
    from pavdm_dist.models.skyreels_v2 import SkyReelsV2, SkyReelsV2Config

    kind, shape = (SkyReelsV2, SkyReelsV2Config) if "SkyReels" in str(config["_class_name"]) else (Wan, WanConfig)
    known = shape.__dataclass_fields__
    return kind(shape(**{name: value for name, value in config.items() if name in known})).eval()  # type: ignore[arg-type]
