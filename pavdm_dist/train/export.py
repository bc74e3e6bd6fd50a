"""The trained model as a folder that ``pavdm sample model=FOLDER`` takes at once."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.errors import ConfigError
from pavdm_dist.io.folders import check_no_link, whole_folder
from pavdm_dist.io.storage import remove_staged
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.train.model import filled
from pavdm_dist.train.settings import TrainConfig


@dataclass(frozen=True)
class Parts:
    """What a whole model needs besides the trained modules.

    Attributes:
        vae: folder of the codec.
        text_encoder: folder of the frozen text encoder; None when it is trained along.
        info: size and rate of the videos, the defaults for sampling.
        prompts: of contact sheets.
        vocabulary: words of the text encoder that is trained along; None where none is trained.
        world_settings: of the made world that the videos show, kept with the model; empty for real video.
    """

    vae: Path
    text_encoder: Path | None
    info: FrameInfo
    prompts: tuple[str, ...]
    vocabulary: tuple[str, ...] | None = None
    world_settings: dict[str, Any] = field(default_factory=dict)


def check_target(folder: Path) -> None:
    """Refuses to replace what is no earlier export.

    Raises:
        ConfigError: a file, a link, or a folder that holds something else.
    """
    check_no_link(folder, "export")
    if folder.is_file():
        raise ConfigError(f"export={folder}: is a file; name a new folder, or one that holds an exported model")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "model_index.json").exists():
        raise ConfigError(f"export={folder}: holds {next(folder.iterdir()).name} and no model; name a new folder")


def export_model(
    config: TrainConfig, weights: dict[str, Tensor], channels: int, parts: Parts, folder: Path, step: int
) -> None:
    """Writes the folder; it appears whole or not at all.

    Args:
        config: of the run.
        weights: state dict of the trained modules.
        channels: of the latents.
        parts: the other components.
        folder: where; an earlier export there is replaced.
        step: number of optimizer steps done.

    Raises:
        ConfigError: see :func:`check_target`.
        OSError: it cannot be written.
    """
    check_target(folder)
    model, o = filled(config, channels, parts.vocabulary, weights), config.objective
    sampling = {
        "num_inference_steps": o.num_inference_steps,
        "window_chunks": o.window_chunks,
        "latent_chunk_size": o.latent_chunk_size,
        "context_chunks": o.context_chunks,
        "time_shift": o.time_shift,
        "guidance_scale": 3.0,
        **asdict(parts.info),
        **config.sampling,
    }
    index = {
        "_class_name": "PAVDMPipeline",
        "transformer": ["pavdm_dist", "STDiT3"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["pavdm_dist", "WordTextEncoder"],
        "sampling": sampling,
        "training": {"steps": step, "world": parts.world_settings},
    }
    with whole_folder(folder) as partial:
        model.transformer.save_pretrained(partial / "transformer", torch.float16)
        if model.text_encoder is not None:
            model.text_encoder.save_pretrained(partial / "text_encoder", torch.float16)
        else:
            assert parts.text_encoder is not None
            shutil.copytree(parts.text_encoder, partial / "text_encoder")
        shutil.copytree(parts.vae, partial / "vae")
        (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if Path(config.run_dir).absolute() in folder.absolute().parents:  # nobody else writes there
        remove_staged(folder)  # of processes that were killed in an export
