"""What VBench measures with: how its networks take pictures, and what of what they give are features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pavdm_dist.values.fields import Side, Within

# Of DINO's normalisations; folders that were converted from its files say 1e-12.
_DINO_EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """What is asked of a network's ``config.json``; what it leaves out has the library's defaults, which are these.

    Attributes:
        image_size: of the square pictures that it was trained on, pixels.
        patch_size: pixels of a side.
        num_channels: of a picture.
        hidden_size, num_hidden_layers: its width and depth.
    """

    image_size: Side = 224
    patch_size: Annotated[int, Within(1, 1024)] = 16
    num_channels: Annotated[int, Within(3, 3)] = 3
    hidden_size: Annotated[int, Within(1)] = 768
    num_hidden_layers: Annotated[int, Within(1)] = 12


@dataclass(frozen=True)
class Kind:
    """What VBench measures with.

    Attributes:
        types: ``model_type`` of the folders that hold one.
        example: hub id of VBench's.
        shape: of VBench's; figures of others are not VBench's.
        mean, std: that pictures are normalised by, per channel.
        mode: how pictures are resized.
        crops: whether only the square in the middle is looked at.
        width: what the library's settings call the length of its features.
        load: from transformers, a folder and options to the network and what its loading tells.
        read: from the network and pictures ``[n, 3, h, w]`` to features ``[n, d]``.
    """

    types: tuple[str, ...]
    example: str
    shape: Shape
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: str
    crops: bool
    width: str
    load: Callable[[Any, str, dict[str, Any]], tuple[Any, dict[str, Any]]]
    read: Callable[[Any, Tensor], Tensor]


def resized(picture: Tensor, side: int, mode: str) -> Tensor:
    """``[3, H, W]`` with ``side`` pixels on its shorter side, its shape kept: the longer side is rounded down.

    As torchvision's ``Resize`` makes it of a tensor without antialiasing, which is what VBench has.
    """
    height, width = picture.shape[-2:]
    short, long = min(height, width), max(height, width)
    if short == side:
        return picture
    other = int(side * long / short)
    size = (side, other) if height <= width else (other, side)
    return F.interpolate(picture[None], size, mode=mode, align_corners=False)[0]


def middle(picture: Tensor, side: int) -> Tensor:
    """The square of ``side`` pixels in the middle of ``[3, H, W]``."""
    top, left = (round((length - side) / 2) for length in picture.shape[-2:])
    return picture[:, top : top + side, left : left + side]


def dino_positions(positions: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Position embeddings of a picture of any size, as DINO's own code makes them (``interpolate_pos_encoding`` of
    facebookresearch/dino, which VBench runs): a tenth of a patch is added to the size before the scale is taken of it.
    transformers leaves that out.

    Args:
        positions: ``[1, 1 + n * n, d]``, that of the class first.
        patch: pixels of a patch's side.
        height, width: of the picture, pixels.

    Returns:
        ``[1, 1 + rows * columns, d]``.
    """
    rows, columns = height // patch, width // patch
    side = round((positions.shape[1] - 1) ** 0.5)
    if rows == columns == side and height == width:
        return positions
    grid = positions[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = ((rows + 0.1) / side, (columns + 0.1) / side)
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([positions[:, :1], grid.to(positions.dtype)], 1)


def _load_dino(transformers: Any, folder: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """transformers' ViT with DINO's own habits, which published folders do not tell of."""
    model, told = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False, **options)
    embeddings = model.embeddings
    embeddings.interpolate_pos_encoding = lambda tokens, height, width: dino_positions(
        embeddings.position_embeddings, model.config.patch_size, height, width
    )
    for part in model.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.eps = _DINO_EPS
    return model, told


def _read_dino(model: Any, pictures: Tensor) -> Tensor:
    return model(pictures, interpolate_pos_encoding=True).last_hidden_state[:, 0]


def _load_clip(transformers: Any, folder: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return transformers.CLIPVisionModelWithProjection.from_pretrained(folder, **options)


def _read_clip(model: Any, pictures: Tensor) -> Tensor:
    return model(pictures).image_embeds


DINO = Kind(
    ("vit",), "facebook/dino-vitb16", Shape(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", False,
    "hidden_size", _load_dino, _read_dino,
)  # fmt: skip
_clip = partial(
    Kind, ("clip", "clip_vision_model"), mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711), mode="bicubic", crops=True, width="projection_dim", load=_load_clip,
    read=_read_clip,
)  # fmt: skip
CLIP_B = _clip("openai/clip-vit-base-patch32", Shape(patch_size=32))
CLIP_L = _clip("openai/clip-vit-large-patch14", Shape(patch_size=14, hidden_size=1024, num_hidden_layers=24))
