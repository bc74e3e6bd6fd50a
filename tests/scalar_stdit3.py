"""STDiT3 with one timestep for the whole clip, as published, in float64 and without any of the package's layers.

Explicit loops, explicit softmax, rotation as a complex product: a second derivation to compare the model with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.stdit3 import STDiT3


class ScalarTimeSTDiT3:
    """Reads the weights of ``model``; everything is computed in float64 for one clip ``[C, F, h, w]``, h and w even."""

    def __init__(self, model: STDiT3) -> None:
        self.w = {name: value.double() for name, value in model.state_dict().items()}
        self.config = model.config

    def __call__(self, x: Tensor, t: float, text: Tensor, info: FrameInfo) -> Tensor:
        """Raw prediction ``[C_out, F, h, w]`` at the one timestep ``1000 t``; ``text [L, caption_channels]``."""
        x, dim, heads = x.double(), self.config.hidden_size, self.config.num_heads
        channels, frames, height, width = x.shape
        rows, columns = height // 2, width // 2
        patches = x.reshape(channels, frames, rows, 2, columns, 2)
        tokens = torch.einsum("cfhpwq,dcpq->fhwd", patches, self.w["x_embedder.proj.weight"].squeeze(2))
        tokens = tokens + self.w["x_embedder.proj.bias"] + self.positions(rows, columns, info)
        tokens = tokens.reshape(frames, rows * columns, dim)

        time = self.embed_scalar("t_embedder", 1000 * t) + self.embed_scalar("fps_embedder", info.fps)
        modulation = self.linear("t_block.1", silu(time)).reshape(6, dim)
        caption = self.mlp("y_embedder.y_proj", text.double())
        for index in range(self.config.depth):
            for kind in ("spatial", "temporal"):
                name = f"{kind}_blocks.{index}"
                parts = self.w[f"{name}.scale_shift_table"] + modulation
                y = layer_norm(tokens) * (1 + parts[1]) + parts[0]
                if kind == "spatial":
                    y = torch.stack([self.self_attention(f"{name}.attn", frame, heads, False) for frame in y])
                else:
                    places = [self.self_attention(f"{name}.attn", place, heads, True) for place in y.unbind(1)]
                    y = torch.stack(places, dim=1)
                tokens = tokens + parts[2] * y
                tokens = tokens + self.cross_attention(f"{name}.cross_attn", tokens, caption, heads)
                y = layer_norm(tokens) * (1 + parts[4]) + parts[3]
                tokens = tokens + parts[5] * self.mlp(f"{name}.mlp", y)

        shift, scale = self.w["final_layer.scale_shift_table"] + time
        out = self.linear("final_layer.linear", layer_norm(tokens) * (1 + scale) + shift)
        out = out.reshape(frames, rows, columns, 2, 2, -1)
        return out.permute(5, 0, 1, 3, 2, 4).reshape(-1, frames, height, width)

    def linear(self, name: str, z: Tensor) -> Tensor:
        return z @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def mlp(self, name: str, z: Tensor) -> Tensor:
        z = self.linear(f"{name}.fc1", z)
        z = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        return self.linear(f"{name}.fc2", z)

    def embed_scalar(self, name: str, value: float) -> Tensor:
        angles = [value * 10000 ** (-i / 128) for i in range(128)]
        wave = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
        return self.linear(f"{name}.mlp.2", silu(self.linear(f"{name}.mlp.0", wave)))

    def positions(self, rows: int, columns: int, info: FrameInfo) -> Tensor:
        """``[rows, columns, D]``: the column's half, then the row's; sines, then cosines."""
        dim, base = self.config.hidden_size, round(math.sqrt(rows * columns))
        scale = math.sqrt(info.height * info.width) / 512

        def wave(place: int, count: int) -> list[float]:
            position = place / scale * base / count
            angles = [position * 10000 ** (-2 * i / (dim / 2)) for i in range(dim // 4)]
            return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

        grid = [[wave(c, columns) + wave(r, rows) for c in range(columns)] for r in range(rows)]
        return torch.tensor(grid, dtype=torch.float64)

    def self_attention(self, name: str, x: Tensor, heads: int, rotary: bool) -> Tensor:
        """``x [n, D]``; the n tokens see each other."""
        q, k, v = self.linear(f"{name}.qkv", x).chunk(3, dim=-1)
        outs = []
        for q1, k1, v1 in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            q2 = rms_norm(q1) * self.w[f"{name}.q_norm.weight"]
            k2 = rms_norm(k1) * self.w[f"{name}.k_norm.weight"]
            outs.append(attend(rotate(q2), rotate(k2), v1) if rotary else attend(q2, k2, v1))
        return self.linear(f"{name}.proj", torch.cat(outs, dim=-1))

    def cross_attention(self, name: str, x: Tensor, caption: Tensor, heads: int) -> Tensor:
        q = self.linear(f"{name}.q_linear", x)
        k, v = self.linear(f"{name}.kv_linear", caption).chunk(2, dim=-1)
        parts = zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True)
        return self.linear(f"{name}.proj", torch.cat([attend(*part) for part in parts], dim=-1))


def silu(z: Tensor) -> Tensor:
    return z / (1 + torch.exp(-z))


def layer_norm(z: Tensor) -> Tensor:
    centred = z - z.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rms_norm(z: Tensor) -> Tensor:
    return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rotate(z: Tensor) -> Tensor:
    """Pair i of token n turns by n * 10000^(-2i / d)."""
    pairs = torch.view_as_complex(z.reshape(len(z), -1, 2).contiguous())
    turn = [[n * 10000 ** (-2 * i / z.shape[-1]) for i in range(pairs.shape[1])] for n in range(len(z))]
    angles = torch.tensor(turn, dtype=torch.float64)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.T / math.sqrt(q.shape[-1])).exp()
    return scores / scores.sum(-1, keepdim=True) @ v
