"""Progressive autoregressive sampling without this package's savings, on the same STDiT3 weights.

What one writes first: attention as two products around a softmax, the text projected and turned into keys and
values at every call, the window copied at every call and rebuilt at every step, and every frame's shift, scale and
gate spread over all its tokens before use. Each of the four can be switched to the package's way alone, which is how
``single_process.py`` attributes the difference. Linear layers, layer norm, RMS norm and GELU are PyTorch's own in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import chunk_noise
from pavdm_dist.models.attention import attention
from pavdm_dist.models.layers import NORM_EPS, CrossAttention, turned
from pavdm_dist.models.stdit3 import STDiT3
from pavdm_dist.models.stdit3_block import STDiT3Block


@dataclass(frozen=True)
class Savings:
    """Which of the package's savings are switched on; none is the straightforward loop.

    Attributes:
        attention: one fused attention call instead of product, softmax, product.
        text: keys and values of the text are kept between calls.
        window: latents are updated in place and copied when the window moves only.
        modulation: shift, scale and gate stay one vector a frame and are applied in fused multiply-adds.
    """

    attention: bool = False
    text: bool = False
    window: bool = False
    modulation: bool = False


class StraightforwardLoop:
    """Samples one stream with one prompt, whose window is full from the first row (``start="clip"``).

    Args:
        model: the weights.
        stream: with ``start="clip"``.
        savings: what to do in the package's way.
    """

    def __init__(self, model: STDiT3, stream: Stream, savings: Savings = Savings()) -> None:
        if stream.plan.start != "clip" or len(stream.conditioning.prompts) != 1:
            raise ValueError("the straightforward loop starts from a full window and knows one prompt")
        self._model, self._stream, self._savings = model, stream, savings
        self._levels = stream.schedule.levels
        self._row = 0
        self._kept_pairs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        plan = stream.plan
        noisy = []
        for index in range(plan.window_chunks):
            level = self._levels[(index + 1) * plan.steps_per_shift]
            noise = self._noise(index)
            noisy.append(noise if index == plan.given_clip else (1 - level) * stream.given[index] + level * noise)
        context = [stream.given[index] for index in range(-plan.given_context, 0)]
        self.window = torch.cat([*context, *noisy], dim=1).unsqueeze(0)

    @torch.inference_mode()
    def step(self) -> Tensor | None:
        """One row: a model call per guidance branch and an Euler step; the chunk ``[C, c, h, w]`` that became clean."""
        plan = self._stream.plan
        size, shift = plan.latent_chunk_size, plan.steps_per_shift
        head = plan.given_context * size
        left = [(slot + 1) * shift - self._row % shift for slot in range(plan.window_chunks)]
        levels = torch.tensor([0.0] * plan.given_context + [self._levels[j] for j in left])
        levels = levels.repeat_interleave(size).unsqueeze(0)
        drops = torch.tensor([self._levels[j] - self._levels[j - 1] for j in left]).repeat_interleave(size)
        velocity = self._guided(levels)[:, :, head:] * drops[:, None, None]
        if self._savings.window:
            self.window[:, :, head:] += velocity
        else:
            self.window = torch.cat([self.window[:, :, :head], self.window[:, :, head:] + velocity], dim=2)
        self._row += 1
        if self._row % shift:
            return None
        clean = self.window[0, :, head : head + size].clone()
        born = self._noise(plan.given_clip + self._row // shift).unsqueeze(0)
        self.window = torch.cat([self.window[:, :, size:], born], dim=2)
        return clean

    def _guided(self, levels: Tensor) -> Tensor:
        conditioning = self._stream.conditioning
        assert conditioning.null is not None
        keys = (conditioning.prompts[0][1], conditioning.null)
        conditional, unconditional = (self._call(conditioning.texts[key], levels, b) for b, key in enumerate(keys))
        return unconditional + self._stream.guidance_scale * (conditional - unconditional)

    def _call(self, text: Tensor, levels: Tensor, branch: int) -> Tensor:
        model = self._model
        x = self.window if self._savings.window else self.window.clone()
        grid = model.grid(*x.shape[2:])
        start = model.embed(x, levels, self._stream.info)
        hidden, modulation = start.hidden, start.modulation
        tokens = None if self._savings.text else model.project_text(text.unsqueeze(0))
        for index in range(model.spec.num_blocks):
            block = (model.temporal_blocks if index % 2 else model.spatial_blocks)[index // 2]
            assert isinstance(block, STDiT3Block) and isinstance(block.cross_attn, CrossAttention)
            key, value = self._text_pair(block.cross_attn, index, branch, text, tokens)
            hidden = self._block(block, hidden, modulation, key, value)
        start.hidden = hidden
        return model.to_velocity(model.head(start, grid), x, levels)

    def _block(self, block: STDiT3Block, x: Tensor, modulation: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = (block.scale_shift_table + modulation.unflatten(-1, (6, -1))).unsqueeze(-2)
        if not self._savings.modulation:
            parts = repeat(parts, "b f six 1 d -> b f six s d", s=x.shape[2]).contiguous()
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts.unbind(dim=2)
        y = self._self_attention(block, self._modulate(x, shift_attn, scale_attn))
        x = self._add(x, gate_attn, y)
        x = x + self._cross_attention(block.cross_attn, x, key, value)
        return self._add(x, gate_mlp, block.mlp(self._modulate(x, shift_mlp, scale_mlp)))

    def _modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
        return torch.addcmul(shift, normed, 1 + scale) if self._savings.modulation else normed * (1 + scale) + shift

    def _add(self, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        return torch.addcmul(x, gate, y) if self._savings.modulation else x + gate * y

    def _self_attention(self, block: STDiT3Block, x: Tensor) -> Tensor:
        attn = block.attn
        places = "b s n f d" if block.temporal else "b f n s d"
        q, k, v = rearrange(attn.qkv(x), f"b f s (three n d) -> three {places}", three=3, n=attn.num_heads)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if block.temporal:
            rotary = self._model.rope(x.shape[1])
            q, k = turned(q, *rotary), turned(k, *rotary)
        return attn.proj(rearrange(self._attend(q, k, v), f"{places} -> b f s (n d)"))

    def _cross_attention(self, cross: CrossAttention, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q = rearrange(cross.q_linear(x), "b f s (n d) -> b n (f s) d", n=cross.num_heads)
        return cross.proj(rearrange(self._attend(q, key, value), "b n (f s) d -> b f s (n d)", f=x.shape[1]))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._savings.attention:
            return attention(q, k, v)
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v

    def _text_pair(
        self, cross: CrossAttention, index: int, branch: int, text: Tensor, tokens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        pair = self._kept_pairs.get((index, branch))
        if pair is None:
            tokens = self._model.project_text(text.unsqueeze(0)) if tokens is None else tokens
            key, value = rearrange(cross.kv_linear(tokens), "b l (two n d) -> two b n l d", two=2, n=cross.num_heads)
            pair = key, value
            if self._savings.text:
                self._kept_pairs[index, branch] = pair
        return pair

    def _noise(self, index: int) -> Tensor:
        stream = self._stream
        channels, height, width = stream.latent_shape
        return chunk_noise(stream.seed, index, (channels, stream.plan.latent_chunk_size, height, width))
