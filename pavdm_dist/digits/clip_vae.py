"""Whole clips for the codec: data, and diffusers' ``AutoencoderKLWan`` (the Wan2.2 variant) run over all frames.

diffusers encodes and decodes chunk by chunk with a feature cache, which is right for streams and slow for
gradients. :func:`encode_clip` and :func:`decode_clip` walk the very same modules over a whole clip at once and
give the same numbers.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pavdm_dist.codecs.wan_config import CURRENT_FRAME_ONLY
from pavdm_dist.digits.handwriting import Split
from pavdm_dist.digits.painting import Painter
from pavdm_dist.digits.settings import GLYPH_CELLS, SHIPPED, DigitWorld
from pavdm_dist.digits.world import Scene, positions, render_pair, sample_scene

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


class FrameConv(nn.Conv2d):
    """A 3x3 convolution of every frame ``[b, c, t, h, w]`` for itself; takes and ignores a feature cache."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, cache: Tensor | None = None) -> Tensor:
        out = super().forward(rearrange(x, "b c t h w -> (b t) c h w"))
        return rearrange(out, "(b t) c h w -> b c t h w", b=x.shape[0])


def build_vae(
    z_dim: int,
    base_dim: int,
    dim_mult: tuple[int, int, int],
    num_res_blocks: int = 1,
    decoder_base_dim: int | None = None,
) -> AutoencoderKLWan:
    """A freshly initialised VAE: 2x2 patches, two halvings of space and of time, identity latent statistics.

    Its 3x3x3 convolutions look at one frame only (3x3 weights): time is mixed by the four temporal resampling
    convolutions alone. All earlier taps at every layer would see some 80 frames back; a model trained on short
    clips then codes relative to the clip's beginning and loses its colours soon after the training length.
    :func:`public_vae` gives the public layout.

    Args:
        z_dim: latent channels.
        base_dim: width of the finest level.
        dim_mult: widths of the three levels, in ``base_dim``.
        num_res_blocks: residual blocks per level (the decoder has one more).
        decoder_base_dim: the decoder's own ``base_dim``; the encoder's when None.
    """
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=base_dim,
        decoder_base_dim=decoder_base_dim,
        z_dim=z_dim,
        dim_mult=list(dim_mult),
        num_res_blocks=num_res_blocks,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )
    for module in list(vae.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv3d) and child.kernel_size == (3, 3, 3):
                setattr(module, name, FrameConv(child.in_channels, child.out_channels))
    return vae


def public_vae(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The same function as ``vae`` in diffusers' own modules: 3x3 kernels become 3x3x3, zero at earlier frames."""
    from diffusers import AutoencoderKLWan

    tensors = vae.state_dict()
    for name, module in vae.named_modules():
        if isinstance(module, FrameConv):
            tensors[f"{name}.weight"] = F.pad(module.weight.detach()[:, :, None], (0, 0, 0, 0, 2, 0))
    public = AutoencoderKLWan.from_config({**vae.config, CURRENT_FRAME_ONLY: True})
    public.load_state_dict(tensors)
    return public.eval().requires_grad_(False)


def _resample(layer: Any, x: Tensor) -> Tensor:
    """``WanResample`` over a whole clip: the first frame skips the temporal step."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        pairs = rearrange(layer.time_conv(x[:, :, 1:]), "b (two c) t h w -> b c (t two) h w", two=2)
        x = torch.cat([x[:, :, :1], pairs], dim=2)
    batch = x.shape[0]
    x = rearrange(layer.resample(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", b=batch)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def _level(layer: Any, x: Tensor, sampler: Any) -> Tensor:
    for resnet in layer.resnets:
        x = resnet(x)
    return x if sampler is None else _resample(sampler, x)


def encode_clip(vae: AutoencoderKLWan, x: Tensor) -> Tensor:
    """Posterior moments of whole clips, equal to ``vae.encode(x).latent_dist.parameters``.

    Args:
        vae: in the layout of :func:`build_vae`.
        x: ``[b, 3, 4n+1, H, W]`` in -1..1.

    Returns:
        ``[b, 2 z_dim, n+1, H/8, W/8]``: mean and log-variance.
    """
    net, patch = vae.encoder, vae.config.patch_size
    x = rearrange(x, "b c t (h p) (w q) -> b (c q p) t h w", p=patch, q=patch)
    x = net.conv_in(x.contiguous(memory_format=torch.channels_last_3d))
    for layer in net.down_blocks:
        x = _level(layer, x, layer.downsampler) + layer.avg_shortcut(x)
    x = net.nonlinearity(net.norm_out(net.mid_block(x)))
    return vae.quant_conv(net.conv_out(x))


def decode_clip(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """Frames of whole clips, equal to ``vae.decode(z).sample`` before its clamp.

    Args:
        vae: in the layout of :func:`build_vae`.
        z: raw latents ``[b, z_dim, n, h, w]``.

    Returns:
        ``[b, 3, 4n-3, 8h, 8w]``, about -1..1.
    """
    net, patch = vae.decoder, vae.config.patch_size
    x = vae.post_quant_conv(z.contiguous(memory_format=torch.channels_last_3d))
    x = net.mid_block(net.conv_in(x))
    for layer in net.up_blocks:
        start = x
        x = _level(layer, x, layer.upsampler)
        if layer.avg_shortcut is not None:
            x = x + layer.avg_shortcut(start, first_chunk=True)
    x = net.conv_out(net.nonlinearity(net.norm_out(x)))
    return rearrange(x, "b (c q p) t h w -> b c t (h p) (w q)", p=patch, q=patch)


def sample_clips(
    rng: np.random.Generator,
    split: Split,
    batch: int,
    num_frames: int,
    crop: int | None = None,
    num_digits: int | None = None,
    moments: int = 1,
    world: DigitWorld = SHIPPED,
) -> tuple[Tensor, Tensor]:
    """Clips ``[b, 3, t, crop, crop]`` in -1..1 and their foreground ``[b, 1, t, crop, crop]`` (0 or 1).

    Args:
        rng: of scenes, moments and crops.
        split: whose handwriting.
        batch: b.
        num_frames: t.
        crop: side of the squares cut out, around some pixel of a digit; None = whole frames.
        num_digits: in every scene; as the world draws them when None.
        moments: that many are drawn per scene, and the one at which its digits are closest is taken.
        world: whose scenes.
    """
    size = world.size
    crop = size if crop is None else crop
    frames = np.empty((batch, num_frames, crop, crop, 3), np.uint8)
    masks = np.empty((batch, num_frames, crop, crop), np.float32)
    for i in range(batch):
        scene = sample_scene(rng, split, num_digits, world)
        starts = rng.integers(24 * 60, size=moments)
        clip, mask = render_pair(scene, min(starts.tolist(), key=partial(_gap, scene, num_frames)), num_frames)
        top = left = 0
        if crop < size:  # around some pixel of a digit, since most of the frame is background
            spots = np.argwhere(mask[num_frames // 2])
            centre = spots[rng.integers(len(spots))] - rng.integers(crop // 4, crop - crop // 4, size=2)
            top, left = np.clip(centre, 0, size - crop)
        window = np.s_[:, top : top + crop, left : left + crop]
        frames[i], masks[i] = clip[window], mask[window]
    x = rearrange(torch.from_numpy(frames), "b t h w c -> b c t h w").float() / 127.5 - 1
    return x.contiguous(), torch.from_numpy(masks)[:, None]


def paint_clips(
    painter: Painter,
    rng: np.random.Generator,
    split: Split,
    batch: int,
    num_frames: int,
    crop: int | None = None,
    num_digits: int | None = None,
    moments: int = 1,
) -> tuple[Tensor, Tensor]:
    """As :func:`sample_clips`, on the painter's device; squares lie around some place inside a digit's glyph."""
    world, reach = painter.world, GLYPH_CELLS * painter.world.cell
    scenes = [sample_scene(rng, split, num_digits, world) for _ in range(batch)]
    starts = [
        min(rng.integers(24 * 60, size=moments).tolist(), key=partial(_gap, scene, num_frames)) for scene in scenes
    ]
    frames, mask = painter.paint(scenes, starts, num_frames)
    if crop is not None and crop < world.size:
        corners = []
        for scene, start in zip(scenes, starts, strict=True):
            digit = scene.digits[rng.integers(len(scene.digits))]
            centre = positions(digit, start + num_frames // 2, 1, world)[0] + rng.uniform(0, reach, size=2)
            corners.append(np.clip(centre % world.size - crop / 2, 0, world.size - crop).astype(int))
        windows = [np.s_[row, :, top : top + crop, left : left + crop] for row, (top, left) in enumerate(corners)]
        frames = torch.stack([frames[window] for window in windows])
        mask = torch.stack([mask[window] for window in windows])
    x = rearrange(frames, "b t h w c -> b c t h w").float() / 127.5 - 1
    return x.contiguous(), mask.float()[:, None]


def _gap(scene: Scene, num_frames: int, start: int) -> float:
    """Least distance of two digits of ``scene`` in the middle of a clip, px."""
    size = scene.world.size
    places = [positions(digit, start + num_frames // 2, 1, scene.world)[0] for digit in scene.digits]
    gaps = [np.abs((a - b + size / 2) % size - size / 2) for i, a in enumerate(places) for b in places[:i]]
    return min((float(np.hypot(*gap)) for gap in gaps), default=0.0)


def grown(mask: Tensor) -> Tensor:
    """``mask [b, 1, t, H, W]`` with every set pixel grown by two in space."""
    return F.max_pool3d(mask, (1, 5, 5), stride=1, padding=(0, 2, 2))


def foreground_psnr(out: Tensor, x: Tensor, mask: Tensor) -> float:
    """PSNR in dB over the pixels of ``mask``, values in -1..1."""
    error = (out.clamp(-1, 1) - x).pow(2).mean(1, keepdim=True)
    return 10 * math.log10(4 / max(float((error * mask).sum() / mask.sum()), 1e-12))
