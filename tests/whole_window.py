"""A second, tiny backbone: attention over all tokens of a window, whole blocks, no learned text of no prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pavdm_dist.models.attention import attention
from pavdm_dist.models.base import Activation, BackboneSpec, BlockContext, Costs, FrameInfo, Grid
from pavdm_dist.models.layers import sinusoid, turned
from pavdm_dist.models.loading import convert, load_module
from pavdm_dist.models.saving import save_module
from pavdm_dist.models.source import Source, load_config
from pavdm_dist.models.text_cache import TextRun


@dataclass(frozen=True)
class WholeWindowConfig:
    depth: int = 3
    dim: int = 16
    heads: int = 2
    channels: int = 4
    text_dim: int = 12
    text_len: int = 5


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.text_q, self.text_kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.table = nn.Parameter(torch.zeros(6, dim))


class WholeWindow(nn.Module):
    """Keeps its modulation tables in float32."""

    null_text_tensor: ClassVar[str | None] = None
    optional_tensors: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: WholeWindowConfig) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.patch = nn.Linear(4 * config.channels, dim)
        self.time, self.modulate = nn.Linear(32, dim), nn.Linear(dim, 6 * dim)
        self.text = nn.Linear(config.text_dim, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(config.depth))
        self.last = nn.Linear(dim, 4 * config.channels)
        self.spec = BackboneSpec(
            block_kinds=("block",) * config.depth, hidden_size=dim, num_heads=config.heads,
            latent_channels=config.channels, patch=(1, 2, 2), text_dim=config.text_dim, text_len=config.text_len,
            activation_copies=12, causal_trained=True,
        )  # fmt: skip

    @classmethod
    def of_shape(cls, config: Mapping[str, Any]) -> WholeWindow:
        with torch.device("meta"):
            return cls(WholeWindowConfig(**{k: v for k, v in config.items() if not k.startswith("_")})).eval()

    @classmethod
    def load(
        cls,
        source: Source,
        blocks: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> WholeWindow:
        model = cls.of_shape(load_config(source))
        want = None
        if blocks is not None:
            want = model.keys(*blocks, first=blocks[0] == 0, last=blocks[1] == model.spec.num_blocks)
        load_module(model, source, want, None, dtype, device, model.keeps_float32)
        return model

    def save_pretrained(self, folder: Path) -> None:
        save_module(self, folder, {"_class_name": "WholeWindow", **asdict(self.config)}, None)

    def shortened(self, dtype: torch.dtype, device: torch.device | str) -> WholeWindow:
        model = WholeWindow(replace(self.config, depth=1)).eval()
        convert(model, dtype, device, model.keeps_float32)
        return model

    def compile_repeated_blocks(self, compiler: object = None) -> None:
        raise NotImplementedError

    def keys(self, first_block: int, last_block: int, first: bool, last: bool) -> Callable[[str], bool]:
        prefixes = ["text.", *(f"blocks.{index}." for index in range(first_block, last_block))]
        prefixes += ["patch.", "time.", "modulate."] * first + ["last."] * last
        return lambda key: key.startswith(tuple(prefixes))

    def keeps_float32(self, name: str) -> bool:
        return name.endswith(".table")

    def grid(self, frames: int, latent_height: int, latent_width: int) -> Grid:
        return Grid(frames, latent_height // 2, latent_width // 2, latent_height, latent_width)

    def activation_shapes(self, grid: Grid) -> tuple[tuple[int, ...], ...]:
        dim = self.config.dim
        return (1, grid.frames, grid.tokens_per_frame, dim), (1, grid.frames, 6, dim), (1, grid.frames, dim)

    def costs(self, grid: Grid, text_len: int, frames_read: int | None = None) -> Costs:
        tokens, dim = grid.frames * grid.tokens_per_frame, self.config.dim
        read = (frames_read or grid.frames) * grid.tokens_per_frame
        block = tokens * dim * (2 * 10 * dim + 4 * read + 4 * text_len)
        ends = 8 * tokens * dim * self.config.channels
        return Costs((float(block),) * self.config.depth, ends, ends)

    def kv_values(self, grid: Grid, block: int) -> int:
        return 2 * grid.frames * grid.tokens_per_frame * self.config.dim

    def project_text(self, text: Tensor) -> Tensor:
        return self.text(text.to(self.text.weight.dtype))

    def embed(self, x: Tensor, levels: Tensor, info: FrameInfo) -> Activation:
        tokens = self.patch(
            rearrange(x, "b c f (h p) (w q) -> b f (h w) (c p q)", p=2, q=2).to(self.patch.weight.dtype)
        )
        waves = sinusoid(1000 * levels.flatten(), 32).unflatten(0, levels.shape)
        time = self.time(waves.to(self.time.weight.dtype))
        return Activation(tokens.contiguous(), self.modulate(F.silu(time)).unflatten(-1, (6, -1)), time)

    def block(self, index: int, activation: Activation, context: BlockContext) -> Activation:
        block, x, frame = self._block(index), activation.hidden, context.grid.tokens_per_frame
        parts = (activation.modulation + block.table).to(x.dtype).unsqueeze(3).unbind(dim=2)
        q, k, v = self._heads(block.qkv(F.layer_norm(x, x.shape[-1:]) * (1 + parts[0]) + parts[1]), 3)
        first = context.first_frame * frame

        def turn(tensor: Tensor, place: int) -> Tensor:
            """By the frame and by the place in it, each a pair of the head's four."""
            places = torch.arange(place, place + tensor.shape[-2], device=tensor.device)
            angles = torch.stack([places // frame, places % frame], dim=-1).float().repeat(1, tensor.shape[-1] // 4)
            return turned(tensor, angles.cos(), angles.sin())

        q = turn(q, first)
        if context.memory is None:
            k = turn(k, first)
        else:
            k, v = context.memory.attend(index, k, v, first, turn, frame)
        mask = None
        if context.chunk_causal is not None:
            chunk = torch.arange(q.shape[-2], device=q.device) // (context.chunk_causal * frame)
            mask = chunk[:, None] >= chunk[None, :]
        mixed = rearrange(
            attention(q[:, None], k[:, None], v[:, None], mask)[:, 0], "b n (f s) d -> b f s (n d)", s=frame
        )
        x = x + parts[2] * block.out(mixed)
        x = torch.cat([self._read(index, x[:, run.start : run.stop], run, context) for run in context.text], dim=1)
        x = x + parts[5] * block.mlp(F.layer_norm(x, x.shape[-1:]) * (1 + parts[3]) + parts[4])
        return Activation(x.contiguous(), activation.modulation, activation.time)

    def _read(self, index: int, x: Tensor, run: TextRun, context: BlockContext) -> Tensor:
        block = self._block(index)

        def made() -> tuple[Tensor, Tensor]:
            keys, values = self._heads(block.text_kv(run.tokens)[:, None], 2)
            return keys, values

        assert context.text_cache is not None and run.key is not None
        k, v = context.text_cache.pair(run.key, index, made)
        (q,) = self._heads(block.text_q(x), 1)
        return x + rearrange(F.scaled_dot_product_attention(q, k, v), "b n (f s) d -> b f s (n d)", f=x.shape[1])

    def _block(self, index: int) -> Block:
        block = self.blocks[index]
        assert isinstance(block, Block)
        return block

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return rearrange(x, "b f s (p n d) -> p b n (f s) d", p=parts, n=self.config.heads).unbind(0)

    def head(self, activation: Activation, grid: Grid) -> Tensor:
        out = self.last(activation.hidden + activation.time.unsqueeze(2))
        return rearrange(out, "b f (h w) (c p q) -> b c f (h p) (w q)", h=grid.height, p=2, q=2)

    def to_velocity(self, out: Tensor, x: Tensor, levels: Tensor) -> Tensor:
        return out.float()


def whole_window(depth: int = 3) -> WholeWindow:
    """All weights random."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = WholeWindow(WholeWindowConfig(depth)).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)
