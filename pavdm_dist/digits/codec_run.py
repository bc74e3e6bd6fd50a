"""A run of codec training: a folder that is gone on with in slices, its reports, and the codec that comes out."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from pavdm_dist.digits.clip_vae import decode_clip, encode_clip, foreground_psnr, grown, public_vae, sample_clips
from pavdm_dist.digits.codec_training import STATE, CodecTrainer, CodecTraining, network, read_run_state
from pavdm_dist.digits.settings import SHIPPED, DigitWorld
from pavdm_dist.errors import CheckpointError
from pavdm_dist.io.folders import whole_folder
from pavdm_dist.models.devices import tell_of_slow_bfloat16
from pavdm_dist.train.endings import heard

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

log = logging.getLogger(__name__)

SHEET = "reconstruction.png"
HISTORY = "history.jsonl"


@torch.no_grad()
def evaluate(
    vae: AutoencoderKLWan, clips: int = 16, num_frames: int = 17, world: DigitWorld = SHIPPED
) -> tuple[float, Tensor, Tensor]:
    """PSNR (dB) over held-out digits grown by two pixels; the clips and their reconstructions ``[b, 3, t, H, W]``."""
    x, mask = sample_clips(np.random.default_rng(1), "heldout", clips, num_frames, world=world)
    x, mask = x.to(vae.device), mask.to(vae.device)
    out = torch.cat([decode_clip(vae, encode_clip(vae, part).chunk(2, dim=1)[0]) for part in x.split(4)])
    return foreground_psnr(out, x, grown(mask)), x, out


def write_sheet(path: Path, x: Tensor, out: Tensor, rows: int = 6, columns: int = 6) -> None:
    """PNG: for each of ``rows`` clips its frames, and under them the reconstructions."""
    from PIL import Image

    steps = torch.linspace(0, x.shape[2] - 1, columns).long()
    pairs = torch.stack([x[:rows, :, steps], out[:rows, :, steps].clamp(-1, 1)], dim=1)
    sheet = rearrange(((pairs + 1) * 127.5).round().byte(), "b two c t h w -> (b two h) (t w) c")
    image = Image.fromarray(sheet.cpu().numpy())
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)


def train_codec(
    config: CodecTraining,
    run_dir: str | Path,
    max_seconds: float = math.inf,
    world: DigitWorld = SHIPPED,
    device: torch.device | str = "cpu",
) -> float | None:
    """Train until both phases' time is spent, or for a slice of ``max_seconds``, continuing what ``run_dir`` holds.

    Writes ``state.pt``, ``history.jsonl`` (losses) and ``reconstruction.png`` (held-out digits) there. A signal that
    ends the run is heeded after the step, whose state is saved first; a second Ctrl-C does not wait for that.

    Returns:
        Foreground PSNR in dB on held-out digits once the time is spent, None before.

    Raises:
        CheckpointError: ``run_dir`` holds another network or another world.
        KeyboardInterrupt: after a signal, saying where the state is.
    """
    run = Path(run_dir)
    run.mkdir(parents=True, exist_ok=True)
    if config.bfloat16:
        tell_of_slow_bfloat16("codec.bfloat16=true", torch.device(device))
    trainer = CodecTrainer(config, world, device)
    if (run / STATE).exists():
        trainer.load(run)
    started = reported = last = time.monotonic()
    psnr = 0.0
    budget = config.budget_seconds + config.decoder_seconds
    told: list[int] = []

    def tell(number: int) -> None:
        if told:
            raise KeyboardInterrupt
        told.append(number)

    with heard(tell):  # in the middle of a step some weights are new and some are old: nothing to go on from
        while trainer.elapsed < budget and time.monotonic() - started < max_seconds and not told:
            losses = trainer.step()
            now = time.monotonic()
            trainer.elapsed += now - last
            last = now
            if trainer.steps % 20 == 0:
                with (run / HISTORY).open("a") as history:
                    history.write(json.dumps({"step": trainer.steps, "elapsed": trainer.elapsed, **losses}) + "\n")
            if now - reported > config.report_every and not told:
                psnr = _report(trainer, run, losses["reconstruction"])
                reported = last = time.monotonic()
        if told:
            trainer.save(run)
    if told:
        _end(told[0], f"codec saved at step {trainer.steps} in {run / STATE}; run again to go on")
    psnr = _report(trainer, run, math.nan)
    return psnr if trainer.elapsed >= budget else None


def _end(number: int, left: str) -> NoReturn:
    """Ends as whoever heard signals before would have at this one, saying what is left."""
    cause = None
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt as interrupt:
        cause = interrupt
    raise KeyboardInterrupt(left) from cause


def _report(trainer: CodecTrainer, run: Path, loss: float) -> float:
    trainer.save(run)
    psnr, x, out = evaluate(trainer.averaged(), world=trainer.world)
    write_sheet(run / SHEET, x, out)
    log.info(
        "codec: step %d, %.0f of %.0f s, loss %.4f, held-out foreground PSNR %.2f dB",
        trainer.steps,
        trainer.elapsed,
        trainer.config.budget_seconds + trainer.config.decoder_seconds,
        loss,
        psnr,
    )
    return psnr


def load_codec(run_dir: str | Path) -> AutoencoderKLWan:
    """The averaged codec of a run, finished or not, on the CPU.

    Raises:
        CheckpointError: there is no run in ``run_dir``.
    """
    path = Path(run_dir) / STATE
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: train the codec first.")
    saved = read_run_state(path)
    vae = network(CodecTraining(**saved["config"]))
    vae.load_state_dict(saved["average"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def export_codec(run_dir: str | Path, folder: str | Path, clips: int = 128, world: DigitWorld = SHIPPED) -> None:
    """Write the averaged codec to ``folder`` (config.json and fp16 safetensors), which appears whole or not at all.

    ``latents_mean`` and ``latents_std`` are measured per channel on ``clips`` training clips of 17 frames,
    posterior means, so that normalised latents have mean 0 and deviation 1.

    Raises:
        CheckpointError: there is no run in ``run_dir``.
    """
    vae = load_codec(run_dir)
    public = public_vae(vae)
    rng = np.random.default_rng(2)
    means = []
    for _ in range(0, clips, 8):
        x, _ = sample_clips(rng, "train", 8, 17, world=world)
        means.append(encode_clip(vae, x).chunk(2, dim=1)[0])
    latents = rearrange(torch.cat(means), "b c t h w -> c (b t h w)")
    public.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())
    with whole_folder(folder, replaces=True) as partial:
        public.half().save_pretrained(partial)
