"""Wan (2.1, and 2.2's TI2V-5B) with one noise level per latent frame; attention mixes all tokens of a window.

Weights, their names and their modules are diffusers' ``WanTransformer3DModel``; blocks are run one by one by
:mod:`pavdm_dist.models.wan_layers`. The few-step models that were distilled from the 1.3B one (Rolling Forcing,
Causal-Forcing, Self-Forcing) are this model with other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pavdm_dist.errors import CheckpointError, ConfigError
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
from pavdm_dist.models.loading import convert, load_module
from pavdm_dist.models.saving import save_module
from pavdm_dist.models.source import Source, load_config
from pavdm_dist.models.text_cache import TextRun
from pavdm_dist.models.wan_layers import RotaryGrid, modulate, run_block
from pavdm_dist.values.fields import Within, made

# The levels a model was given in training, where nothing else is said: TI2V-5B's first latent was often clean, which
# its 48 latent channels tell; all others had one level a window.
TI2V_CHANNELS = 48
# Tokens-by-width buffers alive at once inside a block: around self-attention (input, its norm, queries, keys, values,
# those turned), or around the MLP beside its inner width, twice (before and after GELU). Counted in running stages.
_AROUND_ATTENTION, _AROUND_MLP = 11, 5

Width = Annotated[int, Within(1, 65_536)]
Heads = Annotated[int, Within(1, 1024)]
Layers = Annotated[int, Within(1, 256)]
_Patch = Annotated[int, Within(1, 64)]


@dataclass(frozen=True)
class WanConfig:
    """Shape of the model; names and defaults are diffusers', those after ``eps`` are this package's own.

    Attributes:
        text_len: tokens that every text is padded to with zeros, which are read as well.
        level_support: as of :class:`~pavdm_dist.models.base.BackboneSpec`; None is what the public weights of this
            shape met.
        causal_trained: likewise.
    """

    patch_size: tuple[_Patch, _Patch, _Patch] = (1, 2, 2)
    num_attention_heads: Heads = 40
    attention_head_dim: Annotated[int, Within(6, 4096)] = 128
    in_channels: Annotated[int, Within(1, 1024)] = 16
    out_channels: Annotated[int, Within(1, 1024)] | None = None
    text_dim: Width = 4096
    freq_dim: Annotated[int, Within(2, 65_536)] = 256
    ffn_dim: Width = 13824
    num_layers: Layers = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: Annotated[float, Within(0, 1, above=True)] = 1e-6
    image_dim: Width | None = None
    added_kv_proj_dim: Width | None = None
    text_len: Annotated[int, Within(1, 65_536)] = 512
    level_support: LevelSupport | None = None
    causal_trained: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if self.patch_size[0] != 1:
            raise CheckpointError(f"patch_size={list(self.patch_size)}: the time patch must be 1")
        if self.attention_head_dim % 2 or self.freq_dim % 2:
            raise CheckpointError(
                f"attention_head_dim={self.attention_head_dim}, freq_dim={self.freq_dim}: both must be even"
            )
        if self.qk_norm != "rms_norm_across_heads":
            raise CheckpointError(f"qk_norm={self.qk_norm}: only rms_norm_across_heads is known")
        if self.image_dim or self.added_kv_proj_dim or self.out_channels not in (None, self.in_channels):
            raise CheckpointError(
                f"in_channels={self.in_channels}, out_channels={self.out_channels}, image_dim={self.image_dim}: these"
                " weights want an image beside the text; those that start from text alone can be run"
            )

    @property
    def width(self) -> int:
        """Of a token."""
        return self.num_attention_heads * self.attention_head_dim


class Wan(nn.Module):
    """A :class:`~pavdm_dist.models.base.Backbone`, where methods are described.

    Args:
        config: shape of the model.
    """

    null_text_tensor: ClassVar[str | None] = None
    optional_tensors: ClassVar[tuple[str, ...]] = ()
    config_class: ClassVar[type[WanConfig]] = WanConfig
    class_name: ClassVar[str] = "WanTransformer3DModel"

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self._take(self.of_diffusers())
        self.rope = RotaryGrid(config.attention_head_dim)
        self.compiler: Compiler | None = None
        support, causal = self._training()
        self.spec = BackboneSpec(
            block_kinds=("block",) * config.num_layers,
            hidden_size=config.width,
            num_heads=config.num_attention_heads,
            latent_channels=config.in_channels,
            patch=config.patch_size,
            text_dim=config.text_dim,
            text_len=config.text_len,
            activation_copies=max(_AROUND_ATTENTION, _AROUND_MLP + -(-2 * config.ffn_dim // config.width)),
            level_support=config.level_support or support,
            causal_trained=causal if config.causal_trained is None else config.causal_trained,
        )

    def of_diffusers(self) -> Any:
        """Diffusers' model of this shape, made where torch makes tensors now."""
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel(**diffusers_arguments(self.config))

    def _take(self, model: Any) -> None:
        """The modules of diffusers' model."""
        self._float32 = frozenset(model._keep_in_fp32_modules)
        self.patch_embedding, self.condition_embedder = model.patch_embedding, model.condition_embedder
        self.blocks, self.norm_out, self.proj_out = model.blocks, model.norm_out, model.proj_out
        self.scale_shift_table = model.scale_shift_table

    def _training(self) -> tuple[LevelSupport, bool]:
        """What public weights of this shape met in training: levels, and whether the chunk-causal mask."""
        return ("mixed-trained" if self.config.in_channels == TI2V_CHANNELS else "accepts"), False

    def compile_repeated_blocks(self, compiler: Compiler | None = None) -> None:
        self.compiler = compiler or Compiler()

    # --- the backbone contract -------------------------------------------------------------------------

    def grid(self, frames: int, latent_height: int, latent_width: int) -> Grid:
        """Token grid.

        Raises:
            ConfigError: a latent size that the patch does not divide.
        """
        _, ph, pw = self.config.patch_size
        if latent_height % ph or latent_width % pw:
            raise ConfigError(
                f"{latent_height}x{latent_width} latent cells (height x width): the model takes multiples of {ph}x{pw}"
            )
        return Grid(frames, latent_height // ph, latent_width // pw, latent_height, latent_width)

    def project_text(self, text: Tensor) -> Tensor:
        """``[b, L, text_dim]`` -> ``[b, text_len, D]``; rows behind the text's end are zero before the projection.

        Raises:
            ConfigError: a longer text.
        """
        projection, room = self.condition_embedder.text_embedder, self.config.text_len - text.shape[1]
        if room < 0:
            raise ConfigError(f"a text of {text.shape[1]} tokens: the model reads {self.config.text_len}")
        return projection(F.pad(text.to(projection.linear_1.weight.dtype), (0, 0, 0, room)))

    def embed(self, x: Tensor, levels: Tensor, info: FrameInfo) -> Activation:
        """Latents ``[b, C, F, h, w]`` and levels ``[b, F]`` (float32, 1 = noise) -> tokens and modulation."""
        dtype = self.patch_embedding.weight.dtype
        tokens = rearrange(self.patch_embedding(x.to(dtype)), "b d f h w -> b f (h w) d").contiguous()
        condition = self.condition_embedder
        waves = self._waves(levels).to(condition.time_embedder.linear_1.weight.dtype)
        time = condition.time_embedder(waves).to(dtype)
        modulation = condition.time_proj(condition.act_fn(time))
        return Activation(tokens, self._with_info(modulation, info), time)

    def _waves(self, levels: Tensor) -> Tensor:
        """Sinusoids of the levels in thousandths, ``[b, F, freq_dim]``, float64 as the model was trained with.

        Diffusers computes Wan's in float32, and SkyReels-V2's so.
        """
        from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid

        thousandths = levels.float() * 1000
        return get_1d_sincos_pos_embed_from_grid(self.config.freq_dim, thousandths, flip_sin_to_cos=True).unflatten(
            0, levels.shape
        )

    def _with_info(self, modulation: Tensor, info: FrameInfo) -> Tensor:
        """Modulation that knows of the picture; these models are not told of it."""
        return modulation

    def block(self, index: int, activation: Activation, context: BlockContext) -> Activation:
        modulation = activation.modulation.unflatten(-1, (6, -1))
        hidden = run_block(self.blocks[index], activation.hidden, modulation, index, context, self.rope, self.compiler)
        return Activation(hidden, activation.modulation, activation.time)

    def head(self, activation: Activation, grid: Grid) -> Tensor:
        shift, scale = (self.scale_shift_table.unsqueeze(1) + activation.time.unsqueeze(2)).unsqueeze(3).unbind(dim=2)
        out = self.proj_out(modulate(self.norm_out, activation.hidden, shift, scale).flatten(1, 2))
        _, ph, pw = self.config.patch_size
        return rearrange(out, "b (f h w) (p q c) -> b c f (h p) (w q)", h=grid.height, w=grid.width, p=ph, q=pw)

    def to_velocity(self, out: Tensor, x: Tensor, levels: Tensor) -> Tensor:
        """The model predicts eps - x_0."""
        return -out.float()

    def null_text(self) -> Tensor | None:
        return None

    def keys(self, first_block: int, last_block: int, first: bool, last: bool) -> Callable[[str], bool]:
        prefixes = ["condition_embedder.text_embedder.", *(f"blocks.{i}." for i in range(first_block, last_block))]
        if first:
            prefixes += ["patch_embedding.", "condition_embedder.time_embedder.", "condition_embedder.time_proj."]
            prefixes += ["fps_embedding.", "fps_projection."]
        if last:
            prefixes += ["proj_out."]
        # Every block has a table of the head's name, too.
        return lambda key: key.startswith(tuple(prefixes)) or (last and key == "scale_shift_table")

    def keeps_float32(self, name: str) -> bool:
        """As diffusers decides it."""
        return not self._float32.isdisjoint(name.split("."))

    def activation_shapes(self, grid: Grid) -> tuple[tuple[int, ...], ...]:
        dim = self.config.width
        return (1, grid.frames, grid.tokens_per_frame, dim), (1, grid.frames, 6 * dim), (1, grid.frames, dim)

    def costs(self, grid: Grid, text_len: int, frames_read: int | None = None) -> Costs:
        dim, tokens = self.config.width, grid.frames * grid.tokens_per_frame
        read = (frames_read or grid.frames) * grid.tokens_per_frame
        dense = tokens * dim * (12 * dim + 4 * self.config.ffn_dim)  # self- and cross-attention (q, out), MLP
        block = float(dense + 4 * tokens * (read + text_len) * dim)
        values = self.config.in_channels * self.config.patch_size[1] * self.config.patch_size[2]
        embed = 2.0 * tokens * values * dim + 2 * grid.frames * dim * (self.config.freq_dim + 7 * dim)
        return Costs((block,) * self.config.num_layers, embed, 2.0 * tokens * values * dim)

    def kv_values(self, grid: Grid, block: int) -> int:
        return 2 * grid.frames * grid.tokens_per_frame * self.config.width

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
        """As :class:`~pavdm_dist.models.base.Backbone` says; padding of texts is read, as zeros."""
        grid = self.grid(*x.shape[2:])
        if text_mask is not None:
            text = text * text_mask.unsqueeze(-1)
        context = BlockContext(grid, [TextRun(0, grid.frames, self.project_text(text))], chunk_causal)
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
    def of_shape(cls, config: Mapping[str, Any]) -> Self:
        where = f"a {cls.class_name}'s config.json"
        with torch.device("meta"):
            return cls(made(cls.config_class, config, where, ignore_unknown=True, error=CheckpointError)).eval()

    @classmethod
    def load(
        cls,
        source: str | Path | Source,
        blocks: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        model = cls.of_shape(load_config(source))
        want: Callable[[str], bool] | None = None
        if blocks is not None:
            if not 0 <= blocks[0] < blocks[1] <= model.spec.num_blocks:
                raise ConfigError(f"blocks={blocks}: the model has blocks 0 to {model.spec.num_blocks - 1}")
            want = model.keys(*blocks, first=blocks[0] == 0, last=blocks[1] == model.spec.num_blocks)
        load_module(model, source, want, None, dtype, device, model.keeps_float32)
        return model

    def shortened(self, dtype: torch.dtype, device: torch.device | str) -> Self:
        model = type(self)(replace(self.config, num_layers=1)).eval()
        convert(model, dtype, device, model.keeps_float32)
        return model

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes ``config.json`` and ``diffusion_pytorch_model.safetensors``; ``dtype`` converts on the way what
        diffusers does not keep in float32."""
        config = {name: value for name, value in asdict(self.config).items() if value is not None}
        save_module(self, folder, {"_class_name": self.class_name, **config}, dtype, keeps_float32=self.keeps_float32)


def diffusers_arguments(config: WanConfig) -> dict[str, Any]:
    """What diffusers' constructor takes; it has no word for the rest."""
    own = {"text_len", "level_support", "causal_trained"}
    return {name: value for name, value in asdict(config).items() if name not in own}
