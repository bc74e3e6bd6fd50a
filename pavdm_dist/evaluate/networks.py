"""Pretrained networks of the user's, in Hugging Face layout: checked, loaded, and given pictures."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pavdm_dist.errors import CheckpointError, ConfigError, first_line
from pavdm_dist.evaluate.network_kinds import Kind, Shape, middle, resized
from pavdm_dist.io.checksums import ends_digest
from pavdm_dist.models.source import Source, load_config
from pavdm_dist.values.fields import made, show

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
# The first that is there is loaded, as transformers does; with the files that belong to it.
_WEIGHTS = {
    "model.safetensors": ["model.safetensors"],
    "model.safetensors.index.json": ["model.safetensors.index.json", "model-*.safetensors"],
    "pytorch_model.bin": ["pytorch_model.bin"],
    "pytorch_model.bin.index.json": ["pytorch_model.bin.index.json", "pytorch_model-*.bin"],
}


class Network:
    """One network on its device.

    Attributes:
        width: numbers of a picture's features.
        about: which, for a report: where it lies, what tells its weights from others, device and type.
    """

    def __init__(
        self, kind: Kind, model: Any, side: int, device: torch.device, dtype: torch.dtype, about: dict[str, str]
    ) -> None:
        self._kind, self._side, self._device, self._dtype, self.about = kind, side, device, dtype, about
        self._model = model.to(device).eval()
        self.width = int(getattr(model.config, kind.width))
        self._mean, self._std = (torch.tensor(part, device=device)[:, None, None] for part in (kind.mean, kind.std))

    def prepared(self, frame: NDArray[np.uint8]) -> Tensor:
        """``[H, W, 3]``, RGB, as VBench makes it for this network: ``[3, h, w]``, float32, on the device."""
        picture = torch.from_numpy(np.ascontiguousarray(frame)).to(self._device).permute(2, 0, 1).float()
        picture = resized(picture, self._side, self._kind.mode)
        if self._kind.crops:
            picture = middle(picture, self._side)
        return (picture / 255 - self._mean) / self._std

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Floats:
        """Features ``[n, d]`` of pictures ``[n, 3, h, w]``."""
        return self._kind.read(self._model, pictures.to(self._dtype)).double().cpu().numpy()


def open_network(field: str, given: str, kind: Kind, device: torch.device, dtype: torch.dtype) -> Network:
    """Loads a network; what can be refused before its weights are read, is.

    Args:
        field: the setting that names it, for messages.
        given: a folder, or a hub id, which is fetched as models are.
        kind: what it must be.
        device: where it computes.
        dtype: what it computes in.

    Raises:
        CheckpointError: no such folder, one that holds no such network, or whose weights cannot be loaded.
        ConfigError: transformers is not installed.
    """
    source = Source.of(given, field=field)
    try:
        source = source.pinned("config.json")
        shape = _shape(load_config(source), kind)
        weights = next((name for name in _WEIGHTS if source.has(name)), None)
        if weights is None:
            what = f"has no weights: expected {', '.join(_WEIGHTS)}"
            raise CheckpointError(f"a file of weights is {source.offline}" if source.offline else what)
        try:
            import transformers
        except ImportError:
            raise ConfigError("needs transformers: pip install 'pavdm-dist[text]'") from None
        folder = source.folder(["config.json", *_WEIGHTS[weights]])
        model = _loaded(transformers, folder, kind, dtype)
    except ConfigError as error:
        raise type(error)(f"{field}={given}: {error}") from error
    if shape != kind.shape:
        logger.warning("%s=%s: is not of the shape of %s; its figures are not VBench's", field, given, kind.example)
    files = sorted(file for pattern in _WEIGHTS[weights] for file in folder.glob(pattern))
    about = {"model": str(source), "weights": ends_digest(files)}
    about |= {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    try:
        return Network(kind, model, shape.image_size, device, dtype, about)
    except RuntimeError as error:  # no room on a GPU
        raise ConfigError(f"{field}={given}: cannot be put on device={device}: {first_line(error)}") from error


def _shape(config: dict[str, Any], kind: Kind) -> Shape:
    """Of a network that is of this kind."""
    found = config.get("model_type")
    if found not in kind.types:
        raise CheckpointError(
            f"config.json: model_type={show(found)}: must be {' or '.join(kind.types)}, such as {kind.example}"
        )
    inner = config.get("vision_config")
    values = inner if isinstance(inner, dict) else config
    values = {"patch_size": kind.shape.patch_size, **values}
    shape = made(Shape, values, "config.json", ignore_unknown=True, error=CheckpointError)
    if shape.image_size < shape.patch_size:
        raise CheckpointError(f"config.json: image_size={shape.image_size}: is less than patch_size={shape.patch_size}")
    return shape


def _loaded(transformers: Any, folder: Path, kind: Kind, dtype: torch.dtype) -> Any:
    # No code of the folder's is run: pickles may hold tensors alone, and nothing of its own is imported.
    options = {"dtype": dtype, "weights_only": True, "trust_remote_code": False, "local_files_only": True}
    try:
        with _quiet(transformers.utils.logging):
            model, told = kind.load(transformers, str(folder), options | {"output_loading_info": True})
    except Exception as error:  # whatever the library raises belongs to the folder
        raise CheckpointError(f"cannot be loaded: {first_line(error)}") from error
    if missing := sorted(told["missing_keys"]):
        # The library would fill them with noise.
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"its weights lack {missing[0]}{more}")
    for tensor in (*model.parameters(), *model.buffers()):
        # Out of the mapped file: where a tensor lies in it changes the last bits of some products.
        tensor.data = tensor.data.clone()
    return model


@contextmanager
def _quiet(log: Any) -> Iterator[None]:
    """The library tells of what a file holds besides, and shows bars."""
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
