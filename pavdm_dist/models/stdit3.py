"""STDiT3, the paper's backbone (Open-Sora v1.2), with one noise level per latent frame (paper App. E.1).

Written for one device. ``depth`` spatial-temporal pairs make ``2 * depth`` half-blocks: half-block ``2 i`` is
spatial block i, ``2 i + 1`` is temporal block i. Only temporal attention mixes latent frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.models.attention import chunk_mask
from pavdm_dist.models.base import (
    Activation,
    BackboneSpec,
    BlockContext,
    Costs,
    FrameInfo,
    Grid,
    LevelSupport,
    WindowSlice,
)
from pavdm_dist.models.compiling import Compiler
from pavdm_dist.models.layers import (
    Caption,
    FinalLayer,
    PatchEmbedding,
    RotaryTable,
    ScalarEmbedder,
    position_embedding_2d,
)
from pavdm_dist.models.loading import convert, load_module
from pavdm_dist.models.saving import save_module
from pavdm_dist.models.source import Source, load_config
from pavdm_dist.models.stdit3_block import STDiT3Block
from pavdm_dist.models.text_cache import TextRun
from pavdm_dist.values.fields import Within, made

NULL_TEXT = "y_embedder.y_embedding"
# Tables that a checkpoint may lack, because they can be computed.
OPTIONAL_TENSORS = ("rope.freqs",)
# Rounded angles would move every position, and the null text stands beside texts that are not rounded.
FLOAT32_TENSORS = frozenset({"rope.freqs", NULL_TEXT})
# Positions are measured in units of a 512-pixel picture.
INPUT_SIZE = 512
# Tokens-by-width buffers alive at once inside a block: around attention (input, modulated copy, queries, keys and
# values, their normed and turned copies, attention's output), or around the MLP beside its inner width, twice (before
# and after GELU). Counted in running stages: 13.6 to 14.6 with an MLP of ratio 4.
_AROUND_ATTENTION, _AROUND_MLP = 12, 6
# Kinds of picture whose constants are kept: more than a run of training has buckets.
_GIVEN = 64


_Patch = Annotated[int, Within(1, 64)]


@dataclass(frozen=True)
class STDiT3Config:
    """Shape of the model; names and defaults are those of the public checkpoint's ``config.json`` (STDiT3-XL/2)."""

    depth: Annotated[int, Within(1, 256)] = 28
    hidden_size: Annotated[int, Within(4, 65_536)] = 1152
    num_heads: Annotated[int, Within(1, 1024)] = 16
    mlp_ratio: Annotated[float, Within(0.25, 64)] = 4.0
    in_channels: Annotated[int, Within(1, 1024)] = 4
    patch_size: tuple[_Patch, _Patch, _Patch] = (1, 2, 2)
    caption_channels: Annotated[int, Within(1, 65_536)] = 4096
    model_max_length: Annotated[int, Within(1, 65_536)] = 300
    qk_norm: bool = True
    pred_sigma: bool = True
    level_support: LevelSupport = "mixed-trained"
    causal_trained: bool = False  # whether the weights met the chunk-causal mask in training
    # Whether of the learned text of no prompt as many rows are read as the prompt beside it has: Open-Sora's programs
    # mask both branches of guidance, and dropped prompts in training, by the prompt's tokens.
    null_text_as_long: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise CheckpointError(
                f"hidden_size={self.hidden_size} must be an even multiple of num_heads={self.num_heads}"
            )
        if self.hidden_size % 4:
            raise CheckpointError(
                f"hidden_size={self.hidden_size} must be a multiple of 4 (two axes of sine and cosine)"
            )
        if self.patch_size[0] != 1:
            raise CheckpointError(f"patch_size={list(self.patch_size)}: the time patch must be 1")

    @property
    def inner_size(self) -> int:
        """Width inside a block's MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> STDiT3Config:
        """Keeps the keys this model knows; the public file also has training-time switches that do not matter here, and
        lacks ``_class_name`` as well as what this package adds."""
        values = {"null_text_as_long": "_class_name" not in values, **values}
        return made(cls, values, "an STDiT3's config.json", ignore_unknown=True, error=CheckpointError)


class STDiT3(nn.Module):
    """Spatial-temporal diffusion transformer; a :class:`~pavdm_dist.models.base.Backbone`, where methods are described.

    Args:
        config: shape of the model.
    """

    null_text_tensor: ClassVar[str | None] = NULL_TEXT
    optional_tensors: ClassVar[tuple[str, ...]] = OPTIONAL_TENSORS

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_size
        out_channels = config.in_channels * (2 if config.pred_sigma else 1)
        patch = config.patch_size
        self.x_embedder = PatchEmbedding(config.in_channels, dim, patch)
        self.t_embedder = ScalarEmbedder(dim)
        self.fps_embedder = ScalarEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = Caption(config.caption_channels, dim, config.model_max_length)
        self.rope = RotaryTable(dim // config.num_heads)
        self._given: dict[Any, tuple[Tensor, Tensor]] = {}

        def blocks(temporal: bool) -> nn.ModuleList:
            make = (config.hidden_size, config.num_heads, config.mlp_ratio, config.qk_norm, temporal)
            return nn.ModuleList(STDiT3Block(*make) for _ in range(config.depth))

        self.spatial_blocks = blocks(temporal=False)
        self.temporal_blocks = blocks(temporal=True)
        self.final_layer = FinalLayer(dim, patch[0] * patch[1] * patch[2], out_channels)
        self.spec = BackboneSpec(
            block_kinds=("spatial", "temporal") * config.depth,
            hidden_size=dim,
            num_heads=config.num_heads,
            latent_channels=config.in_channels,
            patch=config.patch_size,
            text_dim=config.caption_channels,
            text_len=config.model_max_length,
            activation_copies=max(_AROUND_ATTENTION, _AROUND_MLP + -(-2 * config.inner_size // dim)),
            level_support=config.level_support,
            causal_trained=config.causal_trained,
            null_text_as_long=config.null_text_as_long,
        )

    def compile_repeated_blocks(self, compiler: Compiler | None = None) -> None:
        """Runs blocks as compiled functions from now on (diffusers' name for it): fewer passes over memory, other bits.

        One block of each kind is compiled for a shape, at its first call, so that it takes as long for any depth.
        """
        compiler = compiler or Compiler()
        for module in self.modules():
            if isinstance(module, STDiT3Block):
                module.compiler = compiler

    # --- the backbone contract -------------------------------------------------------------------------

    def grid(self, frames: int, latent_height: int, latent_width: int) -> Grid:
        """Token grid; a latent size the patch does not divide is padded at the right and bottom."""
        _, ph, pw = self.config.patch_size
        return Grid(frames, -(-latent_height // ph), -(-latent_width // pw), latent_height, latent_width)

    def project_text(self, text: Tensor) -> Tensor:
        """``[b, L, caption_channels]`` -> ``[b, L, D]``."""
        return self.y_embedder.y_proj(text.to(self.y_embedder.y_proj.fc1.weight.dtype))

    def null_text(self) -> Tensor:
        """The learned null text of classifier-free guidance, ``[model_max_length, caption_channels]``."""
        return self.y_embedder.y_embedding

    def embed(self, x: Tensor, levels: Tensor, info: FrameInfo) -> Activation:
        """Latents ``[b, C, F, h, w]`` and levels ``[b, F]`` (float32, 1 = noise) -> tokens and modulation."""
        b, _, frames, h, w = x.shape
        grid = self.grid(frames, h, w)
        _, ph, pw = self.config.patch_size
        x = F.pad(x, (0, grid.width * pw - w, 0, grid.height * ph - h))
        tokens = rearrange(self.x_embedder.proj(x.to(self.x_embedder.proj.weight.dtype)), "b d f h w -> b f (h w) d")
        position, fps = self._constants(grid, info, x.device)
        # The backbone's own unit of time is thousandths; levels stay float32 up to here (METHOD: bf16 merges levels).
        time = self.t_embedder(levels.reshape(-1) * 1000).unflatten(0, (b, frames))
        time = time + self.fps_embedder(fps)
        return Activation((tokens + position.to(tokens.dtype)).contiguous(), self.t_block(time), time)

    def _constants(self, grid: Grid, info: FrameInfo, device: torch.device) -> tuple[Tensor, Tensor]:
        """Position embedding and frame rate, which a device is given once."""
        key = (grid.height, grid.width, info, device)
        if key not in self._given:
            if len(self._given) == _GIVEN:
                self._given.clear()
            with torch.inference_mode(False):  # also training reads them, whoever made them
                scale = (info.height * info.width) ** 0.5 / INPUT_SIZE
                position = position_embedding_2d(grid.height, grid.width, self.config.hidden_size, scale, device)
                self._given[key] = position, torch.tensor([info.fps], dtype=torch.float32, device=device)
        return self._given[key]

    def block(self, index: int, activation: Activation, context: BlockContext) -> Activation:
        """Half-block ``index`` in 0 .. 2 * depth - 1: even spatial, odd temporal."""
        modulation = activation.modulation.unflatten(-1, (6, -1))
        blocks = self.temporal_blocks if index % 2 else self.spatial_blocks
        mask = _chunk_causal_mask(context, activation.hidden.device) if index % 2 else None
        hidden = blocks[index // 2](activation.hidden, modulation, index, context, self.rope, mask)
        return Activation(hidden, activation.modulation, activation.time)

    def head(self, activation: Activation, grid: Grid) -> Tensor:
        """Raw prediction ``[b, C_out, F, h, w]`` with the padding cropped."""
        _, ph, pw = self.config.patch_size
        out = self.final_layer(activation.hidden, activation.time)
        out = rearrange(out, "b f (h w) (p q c) -> b c f (h p) (w q)", h=grid.height, p=ph, q=pw)
        return out[..., : grid.latent_height, : grid.latent_width]

    def to_velocity(self, out: Tensor, x: Tensor, levels: Tensor) -> Tensor:
        """First half of the channels, float32; the second ("sigma") half is unused by flow matching."""
        return out[:, : self.config.in_channels].float()

    def keys(self, first_block: int, last_block: int, first: bool, last: bool) -> Callable[[str], bool]:
        """Checkpoint tensors of a stage that runs half-blocks ``first_block .. last_block - 1``."""
        prefixes = ["y_embedder.y_proj.", "rope."]
        prefixes += [f"{'temporal' if i % 2 else 'spatial'}_blocks.{i // 2}." for i in range(first_block, last_block)]
        if first:
            prefixes += ["x_embedder.", "t_embedder.", "fps_embedder.", "t_block."]
        if last:
            prefixes += ["final_layer."]
        return lambda key: key.startswith(tuple(prefixes))

    def keeps_float32(self, name: str) -> bool:
        return name in FLOAT32_TENSORS

    def activation_shapes(self, grid: Grid) -> tuple[tuple[int, ...], ...]:
        dim = self.config.hidden_size
        return (1, grid.frames, grid.tokens_per_frame, dim), (1, grid.frames, 6 * dim), (1, grid.frames, dim)

    def costs(self, grid: Grid, text_len: int, frames_read: int | None = None) -> Costs:
        dim, frames, patches = self.config.hidden_size, grid.frames, grid.tokens_per_frame
        tokens = frames * patches
        # Self-attention, cross-attention (q, out), MLP.
        dense = tokens * dim * (dim * (8 + 4) + 4 * self.config.inner_size)
        cross = 4 * tokens * text_len * dim
        spatial, temporal = (dense + cross + 4 * tokens * span * dim for span in (patches, frames_read or frames))
        patch_values = self.config.in_channels * self.config.patch_size[1] * self.config.patch_size[2]
        embed = 2 * tokens * patch_values * dim + 2 * frames * dim * (256 + 7 * dim)
        head = 2 * tokens * dim * 2 * patch_values
        return Costs((spatial, temporal) * self.config.depth, embed, head)

    def kv_values(self, grid: Grid, block: int) -> int:
        return 2 * grid.frames * grid.tokens_per_frame * self.config.hidden_size if block % 2 else 0

    # --- one whole forward -----------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        levels: Tensor,
        text: Tensor,
        info: FrameInfo,
        text_mask: Tensor | None = None,
        chunk_causal: int | None = None,
        window: WindowSlice | None = None,
    ) -> Tensor:
        """As :class:`~pavdm_dist.models.base.Backbone` says; padding of texts is masked."""
        grid = self.grid(*x.shape[2:])
        run = TextRun(0, grid.frames, self.project_text(text), text_mask)
        context = BlockContext(grid, [run], chunk_causal)
        if window is not None:
            context = replace(
                context, first_frame=window.first_frame, window_frames=window.window_frames, attend=window.attend
            )
        activation = self.embed(x, levels, info)
        for index in range(self.spec.num_blocks):
            activation = self.block(index, activation, context)
        return self.head(activation, grid)

    # --- weights ---------------------------------------------------------------------------------------

    @classmethod
    def of_shape(cls, config: Mapping[str, Any]) -> STDiT3:
        with torch.device("meta"):
            return cls(STDiT3Config.from_dict(config)).eval()

    @classmethod
    def load(
        cls,
        source: str | Path | Source,
        blocks: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> STDiT3:
        """From a component in the Hugging Face layout (one file or sharded safetensors).

        Args:
            source: folder with ``config.json``, hub id, or :class:`Source`.
            blocks: half-block range ``(first, last)`` of a pipeline stage; only its tensors are read and the
                others stay on the meta device. None loads everything.
            dtype, device: of the weights.

        Raises:
            CheckpointError: a file or tensor is missing, or a tensor has the wrong size (it is named).
        """
        model = cls.of_shape(load_config(source))
        want: Callable[[str], bool] | None = None
        if blocks is not None:
            if not 0 <= blocks[0] < blocks[1] <= model.spec.num_blocks:
                raise ConfigError(f"blocks={blocks}: the model has half-blocks 0 to {model.spec.num_blocks - 1}")
            want = model.keys(*blocks, first=blocks[0] == 0, last=blocks[1] == model.spec.num_blocks)
        rope = RotaryTable(model.config.hidden_size // model.config.num_heads)
        load_module(model, source, want, {"rope.freqs": rope.freqs}, dtype, device, model.keeps_float32)
        return model

    def shortened(self, dtype: torch.dtype, device: torch.device | str) -> STDiT3:
        model = STDiT3(replace(self.config, depth=1)).eval()
        convert(model, dtype, device, model.keeps_float32)
        return model

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes ``config.json`` and ``diffusion_pytorch_model.safetensors``; ``dtype`` converts on the way."""
        config = {"_class_name": "STDiT3", **asdict(self.config)}
        save_module(self, folder, config, dtype)


def _chunk_causal_mask(context: BlockContext, device: torch.device) -> Tensor | None:
    """``[F, F]``, F all frames of the window; True where a frame (row) may read a frame (column): its own chunk and
    cleaner ones."""
    if context.chunk_causal is None:
        return None
    return chunk_mask(0, context.window_frames or context.grid.frames, context.chunk_causal, device)
