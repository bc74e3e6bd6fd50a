"""The seam between the sampler, the engine and any backbone.

A backbone is ``embed`` -> ``block(0) .. block(n - 1)`` -> ``head`` -> ``to_velocity``. A pipeline stage runs a
contiguous range of blocks; the model does not know that. What travels between stages is the hidden state and
the per-frame modulation (:class:`Activation`); text is projected once per video on every stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from pavdm_dist.models.attention import Attention, attention
from pavdm_dist.models.compiling import Compiler
from pavdm_dist.models.kv_cache import Memory
from pavdm_dist.models.source import Source
from pavdm_dist.models.text_cache import TextCache, TextRun

LevelSupport = Literal["staircase-trained", "mixed-trained", "accepts"]


@dataclass(frozen=True)
class BackboneSpec:
    """Facts about a backbone that the engine and the planner need.

    Attributes:
        block_kinds: a name per indivisible unit a pipeline can be cut between, in order (STDiT3: half-blocks); units of
            one name are alike but for their weights.
        hidden_size: width of a token.
        num_heads: attention heads.
        latent_channels: C of the latents.
        patch: ``(t, h, w)`` latent patch that becomes one token.
        text_dim: width of the text encoder's output.
        text_len: longest text the backbone was built for, tokens.
        activation_copies: tokens-by-width buffers alive at once inside a block, for the planner's memory.
        prediction: what ``to_velocity`` converts from.
        level_support: how the weights met per-frame levels in training; "accepts" means they did not.
        causal_trained: whether they met the chunk-causal mask.
        null_text_as_long: whether of a learned text of no prompt as many rows are read as the prompt beside it has.
    """

    block_kinds: tuple[str, ...]
    hidden_size: int
    num_heads: int
    latent_channels: int
    patch: tuple[int, int, int]
    text_dim: int
    text_len: int
    activation_copies: int
    prediction: Literal["flow", "eps", "v"] = "flow"
    level_support: LevelSupport = "mixed-trained"
    causal_trained: bool = False
    null_text_as_long: bool = False

    @property
    def num_blocks(self) -> int:
        return len(self.block_kinds)


@dataclass(frozen=True)
class Costs:
    """Cost of one micro-batch, in any one unit (FLOP or seconds): of every block, of embedding, and of what follows the
    last block (the head, and what else its device does once a micro-batch)."""

    blocks: tuple[float, ...]
    embed: float = 0.0
    head: float = 0.0

    def stage(self, first: int, last: int) -> float:
        """Cost of the stage that runs blocks ``first .. last - 1``."""
        cost = sum(self.blocks[first:last])
        cost += self.embed if first == 0 else 0.0
        return cost + (self.head if last == len(self.blocks) else 0.0)


@dataclass(frozen=True)
class Grid:
    """Token grid of a window: ``frames`` latent frames of ``height x width`` patches (padding included).

    ``latent_height`` and ``latent_width`` are the unpadded latent size that ``head`` crops back to.
    """

    frames: int
    height: int
    width: int
    latent_height: int
    latent_width: int

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class FrameInfo:
    """What a model is told about the picture besides the latents: pixel ``height`` and ``width``, frames per second."""

    height: int
    width: int
    fps: float


@dataclass(frozen=True)
class WindowSlice:
    """Consecutive latent frames of a window whose other frames are held elsewhere, by other processes in training.

    Attributes:
        first_frame: place of the slice's first frame in the window.
        window_frames: latent frames of the whole window.
        attend: attention that mixes frames, over the whole window.
    """

    first_frame: int
    window_frames: int
    attend: Attention


@dataclass
class Activation:
    """What one stage hands to the next for one micro-batch.

    Attributes:
        hidden: ``[b, F, S, D]`` tokens, S = patches per latent frame; contiguous.
        modulation: ``[b, F, 6 D]`` per-frame shift, scale and gate of all blocks (or as the backbone shapes it).
        time: ``[b, F, D]`` time embedding, read by the head only.
    """

    hidden: Tensor
    modulation: Tensor
    time: Tensor


@dataclass
class BlockContext:
    """Everything a block reads besides the activation; identical on every stage.

    Attributes:
        grid: token grid of this micro-batch.
        text: runs of equal text that cover all frames in order.
        chunk_causal: chunk size in latent frames for the chunk-causal mask, None for full attention.
        text_cache: where cross-attention keys/values are kept between calls, or None.
        first_frame: place of the micro-batch's first frame in the window.
        memory: what chunks leave for each other; None when nothing is left and nothing read.
        window_frames: latent frames that ``attend`` mixes, which the mask is for; None for those of the micro-batch.
        attend: attention that mixes frames.
        steady: the micro-batch has the size of one of a full window; blocks that are compiled run others as they are.
        chunk_frames: latent frames of a chunk, where the micro-batch holds several that read the memory in turn, each
            as if it were alone; None where all of it reads at once.
    """

    grid: Grid
    text: list[TextRun]
    chunk_causal: int | None = None
    text_cache: TextCache | None = field(default=None, repr=False)
    first_frame: int = 0
    memory: Memory | None = field(default=None, repr=False)
    window_frames: int | None = None
    attend: Attention = field(default=attention, repr=False)
    steady: bool = True
    chunk_frames: int | None = None


class Backbone(Protocol):
    """What a model must offer to be sampled, staged and planned: one class, and its line in the catalogue.

    Attributes:
        spec: facts.
        config: its shape as a dataclass, the names being those of ``config.json``.
        null_text_tensor: the checkpoint's tensor that holds the learned text of no prompt; None where the encoding of
            the empty prompt is that.
        optional_tensors: names that a checkpoint may lack.
    """

    spec: BackboneSpec
    config: Any
    null_text_tensor: ClassVar[str | None]
    optional_tensors: ClassVar[tuple[str, ...]]

    # --- how it comes about

    @classmethod
    def of_shape(cls, config: Mapping[str, Any]) -> Self:
        """All but the weights, on the meta device, from what ``config.json`` holds.

        Raises:
            CheckpointError: no such shape.
        """

    @classmethod
    def load(
        cls,
        source: Source,
        blocks: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """With the weights of blocks ``first .. last - 1`` and what a stage of these needs; None loads all.

        Nothing else is read; tensors go straight to the device, as ``dtype`` or what :meth:`keeps_float32` says.

        Raises:
            CheckpointError: a file or tensor is missing, or a tensor has the wrong size (it is named).
        """

    def shortened(self, dtype: torch.dtype, device: torch.device | str) -> Self:
        """One block of each kind in order of ``spec.block_kinds``, with random weights: to measure what they cost."""

    def compile_repeated_blocks(self, compiler: Compiler | None = None) -> None:
        """Runs blocks as compiled functions from now on, versions of which ``compiler`` makes.

        Sampling compiles for steady micro-batches alone (:attr:`BlockContext.steady`).
        """

    # --- what it needs

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by their names in the checkpoint, as of ``torch.nn.Module``."""

    def keys(self, first_block: int, last_block: int, first: bool, last: bool) -> Callable[[str], bool]:
        """Which checkpoint tensors a stage of blocks ``first_block .. last_block - 1`` needs."""

    def keeps_float32(self, name: str) -> bool:
        """Whether a tensor is float32 whatever type the others have."""

    def grid(self, frames: int, latent_height: int, latent_width: int) -> Grid:
        """Token grid of a window of ``frames`` latent frames."""

    def activation_shapes(self, grid: Grid) -> tuple[tuple[int, ...], ...]:
        """Shapes of the :class:`Activation` between two blocks, in order of its fields, for a batch of one."""

    def costs(self, grid: Grid, text_len: int, frames_read: int | None = None) -> Costs:
        """FLOP of a micro-batch; two per multiply-add.

        Args:
            grid: of the micro-batch.
            text_len: tokens of the text.
            frames_read: latent frames that attention over frames reads, those that others left included; None for the
                micro-batch's own.
        """

    def kv_values(self, grid: Grid, block: int) -> int:
        """Numbers in the keys and values that a block keeps of so many frames; 0 where it does not mix frames.

        The last block must keep some: adaptive re-sync of mode displaced watches its keys.
        """

    # --- what it computes

    def project_text(self, text: Tensor) -> Tensor:
        """Encoder output ``[b, L, text_dim]`` -> ``[b, L, D]``."""

    def embed(self, x: Tensor, levels: Tensor, info: FrameInfo) -> Activation:
        """Latents ``[b, C, F, h, w]`` and levels ``[b, F]`` in [0, 1] -> tokens and modulation.

        All that travels between stages has the type the weights were loaded as.
        """

    def block(self, index: int, activation: Activation, context: BlockContext) -> Activation:
        """Runs exactly one indivisible block."""

    def head(self, activation: Activation, grid: Grid) -> Tensor:
        """Tokens -> raw prediction ``[b, C_out, F, h, w]``."""

    def to_velocity(self, out: Tensor, x: Tensor, levels: Tensor) -> Tensor:
        """Raw prediction -> velocity x_0 - eps, ``[b, C, F, h, w]``, float32."""

    # --- what training asks besides: the model is a ``torch.nn.Module``

    def null_text(self) -> Tensor | None:
        """The learned text of no prompt, ``[L, text_dim]``; None where the encoding of the empty prompt is that."""

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes what :meth:`load` reads; ``dtype`` is that of weights that may have any."""

    def __call__(
        self,
        x: Tensor,
        levels: Tensor,
        text: Tensor,
        info: FrameInfo,
        text_mask: Tensor | None = None,
        chunk_causal: int | None = None,
        window: WindowSlice | None = None,
    ) -> Tensor:
        """Raw prediction ``[b, C_out, F, h, w]`` of a whole window, with one text per batch row.

        Args:
            x: latents ``[b, C, F, h, w]``.
            levels: ``[b, F]`` in [0, 1], float32.
            text: ``[b, L, text_dim]``.
            info: picture size and rate.
            text_mask: ``[b, L]`` bool, True = real token; None when all are.
            chunk_causal: chunk size for the chunk-causal mask; None attends over the whole window.
            window: of which window ``x`` and ``levels`` are a slice; None when they are all of it.
        """
