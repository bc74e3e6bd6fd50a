"""How the embedded model's video codec is trained on the synthetic world: settings, loss, a step, its saves."""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pavdm_dist.digits.clip_vae import (
    build_vae,
    decode_clip,
    encode_clip,
    foreground_psnr,
    grown,
    paint_clips,
    sample_clips,
)
from pavdm_dist.digits.painting import Painter
from pavdm_dist.digits.settings import SHIPPED, DigitWorld
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.io.storage import atomic_write
from pavdm_dist.train.optimizer import MuonAdamW

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

STATE = "state.pt"


@dataclass(frozen=True)
class CodecTraining:
    """Shape and training of the codec; 8x8 pixels and four frames become one latent position.

    Args:
        z_dim: latent channels.
        base_dim: width of the encoder's finest level (at half resolution, after the 2x2 patching).
        decoder_base_dim: the same of the decoder, which limits how sharp edges become.
        dim_mult: widths of the three levels, in the finest one's.
        num_res_blocks: residual blocks per level (the decoder has one more).
        budget_seconds: training time of encoder and decoder together; the learning rate ends at zero.
        decoder_seconds: further time for the decoder alone. The encoder is final after the first phase, so
            latents can be cached meanwhile.
        num_frames: frames per clip, 4n + 1.
        moments: of so many moments of a scene of the most digits, the one at which they are closest is trained on.
        crop: side of the training crops, px, a multiple of 8; whole frames from ``whole_from`` of a phase on.
        whole_from: share of a phase's time, 0..1.
        batch_size: clips per step while cropping; whole frames come in smaller batches of as many pixels.
        learning_rate: peak rate of AdamW, after ``warmup_steps``; the convolutions follow Muon at twice that.
        warmup_steps: steps of linear increase.
        weight_decay: decoupled, of both.
        ema_decay: of the averaged weights, which are the ones exported.
        foreground_weight: extra weight of pixels on or next to a digit.
        edge_weight: weight of the error of neighbour differences.
        kl_weight: weight of the mean KL divergence per latent number.
        latent_noise: noise added to latents before decoding, in their own standard deviations: a diffusion
            model's small errors must not be amplified.
        bfloat16: run convolutions in bfloat16.
        seed: of weights and data.
        report_every: seconds between checkpoints, each with a reconstruction sheet.

    Raises:
        ConfigError: no such network, clips or crops.
    """

    z_dim: int = 16
    base_dim: int = 16
    decoder_base_dim: int = 24
    dim_mult: tuple[int, int, int] = (1, 4, 4)
    num_res_blocks: int = 1
    budget_seconds: float = 5400.0
    decoder_seconds: float = 1500.0
    num_frames: int = 17
    moments: int = 4
    crop: int = 32
    whole_from: float = 0.75
    batch_size: int = 4
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    ema_decay: float = 0.998
    foreground_weight: float = 6.0
    edge_weight: float = 0.5
    kl_weight: float = 2e-4
    latent_noise: float = 0.03
    bfloat16: bool = True
    seed: int = 0
    report_every: float = 120.0

    def __post_init__(self) -> None:
        if self.num_frames % 4 != 1:
            raise ConfigError(f"num_frames={self.num_frames} is not 4n + 1: use {self.num_frames // 4 * 4 + 1}.")
        if self.crop % 8 or self.crop < 8:
            raise ConfigError(f"crop={self.crop} is not a multiple of 8 from 8 on.")
        for name in ("z_dim", "base_dim", "decoder_base_dim", "num_res_blocks", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"codec.{name}={value}: must be 1 or more")
        if len(self.dim_mult) != 3 or min(self.dim_mult) < 1:
            raise ConfigError(
                f"codec.dim_mult={list(self.dim_mult)}: must be three numbers from 1 on, such as [1, 4, 4]"
            )


def network(config: CodecTraining) -> AutoencoderKLWan:
    """An untrained codec of that shape."""
    return build_vae(config.z_dim, config.base_dim, config.dim_mult, config.num_res_blocks, config.decoder_base_dim)


def _is_matrix(name: str, value: Tensor) -> bool:
    """Convolutions between hidden layers; not those that read or write pixels, nor gains and biases."""
    outer = name.startswith(("encoder.conv_in", "decoder.conv_out"))
    return value.ndim >= 4 and min(value.flatten(1).shape) >= 8 and not outer


def reconstruction_loss(config: CodecTraining, out: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Error with digits (grown by two pixels) weighted up, plus the error of neighbour differences."""
    weight = 1 + config.foreground_weight * grown(mask)
    error = out - x
    loss = (weight * _penalty(error)).mean()
    for dim in (2, 3, 4):
        edges = _penalty(error.diff(dim=dim)) * weight.narrow(dim, 1, weight.shape[dim] - 1)
        loss = loss + config.edge_weight / 3 * edges.mean()
    return loss


def _penalty(error: Tensor) -> Tensor:
    """Squares, which few large errors at moving edges dominate, with enough of the magnitude to keep flats clean."""
    return 0.3 * error.abs() + 4 * error.square()


class CodecTrainer:
    """Weights, optimiser and averaged weights of one run; a step depends on nothing but them and its number.

    Args:
        config: shape and training.
        world: what is shown to it.
        device: where it is trained; on a GPU clips are drawn there, too.

    Raises:
        ConfigError: crops that are larger than the world's pictures.
    """

    def __init__(self, config: CodecTraining, world: DigitWorld = SHIPPED, device: torch.device | str = "cpu") -> None:
        if config.crop > world.size:
            raise ConfigError(f"crop={config.crop}: the world's pictures have {world.size} pixels; use that at most")
        torch.manual_seed(config.seed)
        self.config, self.world, self.device = config, world, torch.device(device)
        self._painter = None if self.device.type == "cpu" else Painter(world, self.device)
        self.vae = network(config).train().to(self.device)
        self.average = {name: value.detach().clone() for name, value in self.vae.state_dict().items()}
        matrices = {name: value for name, value in self.vae.named_parameters() if _is_matrix(name, value)}
        others = [value for name, value in self.vae.named_parameters() if name not in matrices]
        self.optimizer = MuonAdamW(matrices.values(), others, config.learning_rate, weight_decay=config.weight_decay)
        self.steps = 0
        self.elapsed = 0.0
        self.frozen = False

    def freeze_encoder(self) -> None:
        """Enter the second phase: the averaged weights become the weights, and the encoder learns no more."""
        self.vae.load_state_dict(self.average)
        self._freeze()

    def _freeze(self) -> None:
        self.frozen = True
        for module in (self.vae.encoder, self.vae.quant_conv):
            module.requires_grad_(False)
            for parameter in module.parameters():
                self.optimizer.state.pop(parameter, None)

    @property
    def progress(self) -> float:
        """Share of the phase's time that is spent, 0..1."""
        if self.frozen:
            return min((self.elapsed - self.config.budget_seconds) / max(self.config.decoder_seconds, 1e-9), 1.0)
        return min(self.elapsed / self.config.budget_seconds, 1.0)

    def step(self) -> dict[str, float]:
        """One update; returns its losses.

        Raises:
            ConfigError: its gradient is not finite; the weights stay as they were.
        """
        config = self.config
        if not self.frozen and self.elapsed >= config.budget_seconds:
            self.freeze_encoder()
        progress = self.progress
        warmup = min(1.0, (self.steps + 1) / config.warmup_steps)
        peak = config.learning_rate * (0.5 if self.frozen else warmup)
        rate = peak * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        crop = config.crop if progress < config.whole_from else self.world.size
        batch = max(1, config.batch_size * config.crop**2 // crop**2)
        rng = np.random.default_rng([config.seed, self.steps])
        generator = torch.Generator(self.device).manual_seed(int(rng.integers(2**62)))
        # Where digits cover each other lies most of the error, on a twentieth of the pixels.
        about = (batch, config.num_frames, crop, self.world.most_digits, config.moments)
        if self._painter is None:
            x, mask = sample_clips(rng, "train", *about, self.world)
        else:
            x, mask = paint_clips(self._painter, rng, "train", *about)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bfloat16):
            mean, logvar = encode_clip(self.vae, x).float().chunk(2, dim=1)
            logvar = logvar.clamp(-30, 20)
            spread = config.latent_noise * mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
            noise = torch.randn(mean.shape, generator=generator, device=self.device)
            out = decode_clip(self.vae, mean + torch.sqrt(logvar.exp() + spread**2) * noise).float()
        reconstruction = reconstruction_loss(config, out, x, mask)
        divergence = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
        self.optimizer.zero_grad(set_to_none=True)
        (reconstruction + config.kl_weight * divergence).backward()
        norm = nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        if not math.isfinite(norm):
            raise ConfigError(
                f"the codec's gradient is not finite in step {self.steps}: lower codec.learning_rate (now"
                f" {config.learning_rate:g}); the run folder goes on from what it saved last"
            )
        self.optimizer.step()
        self.steps += 1
        decay = min(config.ema_decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for name, value in self.vae.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)
        return {
            "reconstruction": reconstruction.item(),
            "kl": divergence.item(),
            "psnr": foreground_psnr(out.detach(), x, grown(mask)),
            "gradient_norm": norm.item(),
            "learning_rate": rate,
        }

    def averaged(self) -> AutoencoderKLWan:
        """A VAE holding the averaged weights."""
        vae = network(self.config).to(self.device)
        vae.load_state_dict(self.average)
        return vae.eval().requires_grad_(False)

    def save(self, run_dir: Path) -> None:
        """Write everything needed to go on, all or nothing."""
        state = {
            "config": asdict(self.config),
            "world": self.world.settings,
            "vae": self.vae.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "elapsed": self.elapsed,
            "frozen": self.frozen,
        }
        content = io.BytesIO()  # torch says of a full disk what nobody could tell from a fault of its own
        torch.save(state, content)
        with atomic_write(run_dir / STATE, "wb") as file:
            file.write(content.getbuffer())

    def load(self, run_dir: Path) -> None:
        """Continue from :meth:`save`.

        Raises:
            CheckpointError: the run was started with another network shape, or in another world; or it is damaged.
        """
        state = read_run_state(run_dir / STATE)
        if state["world"] != self.world.settings:
            raise CheckpointError(f"{run_dir / STATE} was trained on other world settings: start a new run folder.")
        try:
            self.vae.load_state_dict(state["vae"])
        except RuntimeError:
            raise CheckpointError(
                f"{run_dir / STATE} holds another network, z_dim={state['config']['z_dim']}, "
                f"base_dim={state['config']['base_dim']}, "
                f"decoder_base_dim={state['config']['decoder_base_dim']}, "
                f"dim_mult={state['config']['dim_mult']}: use those."
            ) from None
        self.average = {name: value.to(self.device) for name, value in state["average"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        if state["frozen"]:
            self._freeze()
        self.steps, self.elapsed = state["steps"], state["elapsed"]


def read_run_state(path: Path) -> dict[str, Any]:
    """What :meth:`CodecTrainer.save` wrote.

    Raises:
        CheckpointError: it is torn, or would run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged or not a state of this program: start a new run folder") from error
