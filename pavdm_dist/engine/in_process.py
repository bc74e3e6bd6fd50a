"""Where one process samples and decodes, and in which types: what ``EngineOptions`` is to stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pavdm_dist.codecs.catalog import FrameMaker
from pavdm_dist.engine.inline import InlineEngine
from pavdm_dist.engine.options import bits_depend_on
from pavdm_dist.models.catalog import load_backbone
from pavdm_dist.models.devices import DTYPES, check_dtype, choose_device, choose_dtype
from pavdm_dist.models.source import Source


@dataclass(frozen=True)
class InProcess:
    """What was chosen for a process without stages.

    Attributes:
        device: that samples.
        dtype: of the weights.
        decoder_device: that decodes.
        decoder_dtype: what the codec computes in.
        threads: intra-op threads while this process computes.
    """

    device: torch.device
    dtype: torch.dtype
    decoder_device: torch.device
    decoder_dtype: torch.dtype
    threads: int

    @classmethod
    def chosen(
        cls,
        source: Source,
        device: str | torch.device,
        dtype: str | torch.dtype,
        decoder: str,
        decoder_dtype: str,
        threads: int,
    ) -> InProcess:
        """Settles what ``auto`` means, and refuses what cannot be; nothing is loaded.

        Args:
            source: of the backbone: what its files hold is its ``auto`` type on a GPU.
            device, dtype: of the pipeline.
            decoder: a device; ``shared`` and ``auto`` are the one that samples.
            decoder_dtype: a name.
            threads: of this process.

        Raises:
            ConfigError: a device that is not there, or a type that it cannot compute in.
        """
        samples = choose_device(device)
        weights = choose_dtype(dtype, samples, source)
        decodes = samples if decoder in ("auto", "shared") else choose_device(decoder, "decoder")
        check_dtype("decoder_dtype", decoder_dtype, decodes)
        return cls(samples, weights, decodes, DTYPES[decoder_dtype], threads)

    @property
    def computed_on(self) -> dict[str, str | int]:
        """As :func:`~pavdm_dist.engine.options.bits_depend_on`."""
        return bits_depend_on(self.device.type, self.decoder_device.type, self.threads)

    def load(self, source: Source, frames: FrameMaker) -> InlineEngine:
        """The engine, with the whole backbone and what makes frames.

        Raises:
            CheckpointError: files that cannot be read.
        """
        model = load_backbone(source, None, self.dtype, self.device)
        codec = frames.load(self.decoder_device, self.decoder_dtype)
        return InlineEngine(model, codec, self.device, self.threads, codec_device=self.decoder_device)
