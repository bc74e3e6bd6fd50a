"""``pavdm train``: codec, cached latents, then the model with its text encoder, in slices that resume.

One or more processes under the DeepSpeed engine, data-parallel. Every batch is a function of (seed, step), so a
resumed run sees the data an unbroken one would, whatever the number of processes.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pavdm_dist.codecs.text import WordTextEncoder
from pavdm_dist.config import TrainConfig, to_dict
from pavdm_dist.errors import ConfigError
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.stdit3 import STDiT3, STDiT3Config
from pavdm_dist.train import checkpoint
from pavdm_dist.train.backend import World, join_world, start_engine
from pavdm_dist.train.batches import still_batch, window_batch
from pavdm_dist.train.codec import CodecTraining, export_codec, train_codec
from pavdm_dist.train.data import LatentClips, cache_clips
from pavdm_dist.train.loss import Objective, velocity_loss
from pavdm_dist.train.world import FPS, SIZE, VOCABULARY, WORLD_SETTINGS

logger = logging.getLogger(__name__)

INFO = FrameInfo(SIZE, SIZE, FPS)


class TextToVideo(nn.Module):
    """The two modules that are trained together."""

    def __init__(self, transformer: STDiT3, text_encoder: WordTextEncoder) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder

    def forward(
        self, x: Tensor, levels: Tensor, prompts: list[str], dropped: list[bool], chunk_causal: int | None
    ) -> Tensor:
        """Velocity ``[b, C, F, h, w]``, float32; ``dropped`` prompts are replaced by the model's null text."""
        ids, mask = self.text_encoder.collate(prompts)
        text = self.text_encoder(ids, mask)
        null = self.transformer.null_text()
        grow = null.shape[0] - text.shape[1]
        text = nn.functional.pad(text, (0, 0, 0, grow))
        mask = nn.functional.pad(mask, (0, grow))
        rows = torch.tensor(dropped)
        text = torch.where(rows[:, None, None], null, text)
        out = self.transformer(x, levels, text, INFO, mask | rows[:, None], chunk_causal)
        return self.transformer.to_velocity(out, x, levels)


def train_command(config: TrainConfig) -> None:
    """Runs one slice of ``config.max_seconds``; call again until it says that all steps are done.

    Raises:
        ConfigError: the run folder was made with other settings (named), or missing extras.
    """
    torch.set_num_threads(config.threads)
    run, end = Path(config.run_dir), time.monotonic() + config.max_seconds
    world = join_world()
    for name in ("batch_size", "still_batch_size"):
        if getattr(config.data, name) % world.size:
            raise ConfigError(
                f"data.{name}={getattr(config.data, name)} does not divide among {world.size} processes:"
                f" use a multiple of {world.size}."
            )
    if not world.agree(world.first and _prepare(config, run, end)):
        return
    trainer = Trainer(config, _codec_folder(config, run), LatentClips(run / "clips"), world)
    finished = trainer.run(end)
    if world.first:
        target = Path(config.export or run / "model")
        trainer.export(target)
        logger.info("%s; averaged weights in %s", "all steps done" if finished else "slice over, run again", target)


def _prepare(config: TrainConfig, run: Path, end: float) -> bool:
    """Trains the codec and caches the clips where they are missing; False when the slice was over before."""
    run.mkdir(parents=True, exist_ok=True)
    codec, data = _codec_folder(config, run), config.data
    if not _train_codec(config, run, end):
        logger.info("slice over while training the codec; run again to go on")
    elif not cache_clips(codec, run / "clips", data.clips, data.num_latents, end - time.monotonic()):
        logger.info("slice over while caching clips; run again to go on")
    else:
        return True
    return False


class Trainer:
    """The model's training run.

    Args:
        config: settings.
        codec: folder of the trained codec.
        clips: cached latents.
        world: the processes that share every batch.
    """

    def __init__(self, config: TrainConfig, codec: Path, clips: LatentClips, world: World | None = None) -> None:
        self.config, self.codec, self.clips = config, codec, clips
        self.world = world or join_world()
        self.run_dir = Path(config.run_dir)
        self.objective = Objective(**asdict(config.objective))
        torch.manual_seed(config.seed)
        self.engine = start_engine(_build(config, clips.latents.shape[1]), config, self.world)
        self.average = checkpoint.Average(self.engine.module, config.optimizer.ema_decay)
        self.step = 0
        state = checkpoint.load(self.engine, self.run_dir / "checkpoints", self._identity(), config.resume)
        if state is not None:
            self.step = state["step"]
            self.average.restore(state["average"])
            logger.info("going on at step %d", self.step)

    def run(self, end: float) -> bool:
        """Trains until ``end`` (monotonic clock) or the last step; True when all steps are done."""
        config = self.config
        saved = drawn = time.monotonic()
        while self.step < config.optimizer.total_steps and self.world.agree(time.monotonic() < end):
            metrics = self.train_step()
            if self.step % config.log_every_steps == 0 and self.world.first:
                self._log(metrics)
            if self.world.agree(time.monotonic() - saved > config.checkpoint_every_seconds):
                self.save()
                saved = time.monotonic()
            if self.world.first and time.monotonic() - drawn > config.sheet_every_seconds:
                self.sheet()
                drawn = time.monotonic()
        self.save()
        return self.step >= config.optimizer.total_steps

    def train_step(self) -> dict[str, Any]:
        """One optimizer step on one batch of stills or of one kind of window."""
        config = self.config
        started = time.monotonic()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = config.optimizer.lr * self._rate()
        seed = (config.seed, 11, self.step)
        still = self.step < config.data.still_steps
        if still or np.random.default_rng((config.seed, 12, self.step)).random() < config.data.still_share:
            batch = still_batch(self.clips, self.objective, config.data.still_batch_size, seed)
        else:
            batch = window_batch(self.clips, self.objective, config.data.batch_size, seed)
        batch = batch.share(self.world.rank, self.world.size)
        # At a few dozen tokens the plain products beat the fused kernel, whose backward pass alone took a fifth.
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", torch.bfloat16, enabled=config.optimizer.bfloat16):
                velocity = self.engine(batch.x, batch.levels, batch.prompts, batch.dropped, batch.chunk_causal)
            loss, per_level = velocity_loss(velocity.float(), batch.target, batch.levels, batch.context)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"loss is {loss.item()} at step {self.step}; the last checkpoint is kept")
            self.engine.backward(loss)
        self.engine.step()
        self.average.update(self.engine.module)
        self.step += 1
        return {
            "loss": loss.item(),
            "per_level": [None if math.isnan(value) else value for value in per_level.tolist()],
            "causal": batch.chunk_causal is not None,
            "frames": batch.levels.shape[1],
            "grad_norm": self.engine.get_global_grad_norm(),
            "lr": self.engine.optimizer.param_groups[0]["lr"],
            "samples_per_second": self.world.size * len(batch.prompts) / (time.monotonic() - started),
        }

    def save(self) -> None:
        """Writes a checkpoint."""
        state = {"step": self.step, "average": self.average.state()}
        checkpoint.save(self.engine, self.run_dir / "checkpoints", self.step, self._identity(), state)

    def averaged(self) -> TextToVideo:
        """A copy of the model with averaged weights."""
        model = _build(self.config, self.clips.latents.shape[1])
        model.load_state_dict(checkpoint.averaged(self.engine.module, self.average))
        return model.eval().requires_grad_(False)

    def export(self, folder: Path) -> None:
        """Writes a whole model folder with averaged weights in fp16, readable by ``pavdm sample model=FOLDER``."""
        import shutil

        model, o = self.averaged(), self.objective
        model.transformer.save_pretrained(folder / "transformer", torch.float16)
        model.text_encoder.save_pretrained(folder / "text_encoder", torch.float16)
        if self.codec.resolve() != (folder / "vae").resolve():
            shutil.copytree(self.codec, folder / "vae", dirs_exist_ok=True)
        sampling = {
            "num_inference_steps": o.num_inference_steps,
            "window_chunks": o.window_chunks,
            "latent_chunk_size": o.latent_chunk_size,
            "context_chunks": o.context_chunks,
            "time_shift": o.time_shift,
            "guidance_scale": 3.0,
            "height": SIZE,
            "width": SIZE,
            "fps": FPS,
            **self.config.sampling,
        }
        index = {
            "_class_name": "PAVDMPipeline",
            "transformer": ["pavdm_dist", "STDiT3"],
            "vae": ["diffusers", "AutoencoderKLWan"],
            "text_encoder": ["pavdm_dist", "WordTextEncoder"],
            "sampling": sampling,
            "training": {"steps": self.step, "world": WORLD_SETTINGS},
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    def sheet(self) -> None:
        """Draws a contact sheet of sampled videos with the averaged weights."""
        from pavdm_dist.train.sheets import draw_sheet

        path = self.run_dir / "sheets" / f"step{self.step:07d}.png"
        draw_sheet(self.averaged(), self.codec, self.objective, path)

    def _log(self, metrics: dict[str, Any]) -> None:
        line = {"step": self.step, **metrics}
        with open(self.run_dir / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        logger.info("step %d: loss %.4f, %.1f clips/s", self.step, metrics["loss"], metrics["samples_per_second"])

    def _rate(self) -> float:
        """Linear warm-up, then cosine to ``final_ratio``."""
        o = self.config.optimizer
        if self.step < o.warmup_steps:
            return (self.step + 1) / o.warmup_steps
        share = (self.step - o.warmup_steps) / max(o.total_steps - o.warmup_steps, 1)
        return o.final_ratio + (1 - o.final_ratio) * 0.5 * (1 + math.cos(math.pi * min(share, 1)))

    def _identity(self) -> dict[str, Any]:
        settings = to_dict(self.config)
        return {"world": WORLD_SETTINGS, "model": settings["model"], "objective": settings["objective"]}


def _train_codec(config: TrainConfig, run: Path, end: float) -> bool:
    """Trains a codec for the rest of the slice when there is none; whether there is one now."""
    folder = _codec_folder(config, run)
    if config.codec.folder is not None or (folder / "config.json").exists():
        return True
    settings = {name: value for name, value in asdict(config.codec).items() if name != "folder"}
    settings["dim_mult"] = tuple(settings["dim_mult"])
    training = CodecTraining(seed=config.seed, **settings)
    if train_codec(training, run / "codec", end - time.monotonic()) is None:
        return False
    export_codec(run / "codec", folder)
    return True


def _codec_folder(config: TrainConfig, run: Path) -> Path:
    return run / "vae" if config.codec.folder is None else Path(config.codec.folder)


def _build(config: TrainConfig, channels: int) -> TextToVideo:
    m = config.model
    shape = STDiT3Config(
        depth=m.depth,
        hidden_size=m.hidden_size,
        num_heads=m.num_heads,
        in_channels=channels,
        patch_size=(m.patch_size[0], m.patch_size[1], m.patch_size[2]),
        caption_channels=m.caption_channels,
        model_max_length=m.model_max_length,
        pred_sigma=False,
        level_support="staircase-trained",
        causal_trained=config.objective.causal_share > 0,
    )
    transformer = STDiT3(shape)
    transformer.init_weights()
    encoder = WordTextEncoder(VOCABULARY, m.caption_channels, m.text_depth, 4, m.model_max_length)
    return TextToVideo(transformer, encoder)
