"""Batches of real video: clips of a prepared data set, each step's a function of (seed, step)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.catalog import encoder_identity
from pavdm_dist.data.dataset import BatchOrder, CachedClips, PixelClips
from pavdm_dist.data.prefetch import Prefetch
from pavdm_dist.data.several import SeveralClips
from pavdm_dist.errors import ConfigError
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.train.batches import Batch, draw_kind, draw_prompts
from pavdm_dist.train.export import Parts
from pavdm_dist.train.loss import noised
from pavdm_dist.train.model import Text, shape_of
from pavdm_dist.train.objective import Objective, draw_levels, draw_window
from pavdm_dist.train.settings import DataConfig, TrainConfig

SHEET_PROMPTS = 4


class VideoBatches:
    """Windows over clips of one bucket a batch.

    A process reads its own samples only. Noise is drawn per sample, so that it does not depend on how many processes
    share the batch. Clips of a single latent frame are pictures: they get one level each, uniform in 0..1.

    Args:
        clips: cached latents, or videos that are encoded as they are read.
        objective: what windows.
        data: batch sizes and how many batches are loaded ahead.
        seed: of the run.
        channels: of the latents.

    Raises:
        ConfigError: a batch size for a bucket that is not there, or clips that hold less than a chunk.
    """

    def __init__(
        self,
        clips: CachedClips | PixelClips | SeveralClips,
        objective: Objective,
        data: DataConfig,
        seed: int,
        channels: int,
    ) -> None:
        self.clips, self.data, self.seed, self.channels = clips, data, seed, channels
        self.identity = {"data_set": {"clips": clips.identity}}
        names = [str(bucket) for bucket in clips.buckets]
        for name in data.batch_sizes:
            if name not in names:
                raise ConfigError(f"data.batch_sizes.{name}: the data has the buckets {', '.join(names)}")
        sizes = [data.batch_sizes.get(name, data.batch_size) for name in names]
        self._order = BatchOrder(clips.counts, sizes, seed)
        self._kinds = [
            [(share, kind.at_size(bucket.height, bucket.width)) for share, kind in objective.kinds()]
            for bucket in clips.buckets
        ]
        for bucket, kinds in zip(clips.buckets, self._kinds, strict=True):
            most = max(kind.latent_chunk_size for _, kind in kinds)
            if 1 < bucket.num_latents < most:
                raise ConfigError(
                    f"objective.latent_chunk_size={most}: clips of bucket {bucket} have {bucket.num_latents} latents; "
                    f"use chunks of at most {bucket.num_latents}, or longer clips"
                )
        self._ahead: Prefetch[Batch] | None = None
        self._next: tuple[int, int, int] | None = None

    def batch(self, step: int, rank: int, size: int) -> Batch:
        """See :class:`~pavdm_dist.train.batches.Batches`; steps in a row are loaded ahead in a thread."""
        if not self.data.prefetch:
            return self._load(step, rank, size)
        if self._ahead is None or self._next != (step, rank, size):
            self.close()
            self._ahead = Prefetch(lambda number: self._load(number, rank, size), step, self.data.prefetch)
        self._next = (step + 1, rank, size)
        return next(self._ahead)

    def close(self) -> None:
        """Ends the loading thread."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _load(self, step: int, rank: int, size: int) -> Batch:
        number, indices = self._order.batch(step)
        bucket, mine = self.clips.buckets[number], slice(rank, None, size)
        rng = np.random.default_rng((self.seed, 13, step))
        objective = draw_kind(self._kinds[number], rng)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        places = list(range(len(indices)))[mine]
        loaded = self.clips.load(number, indices[mine])
        if bucket.num_latents == 1:
            first, causal, context = 0, None, 0
            levels = torch.rand(len(indices), 1, generator=generator)
        else:
            chunk = objective.latent_chunk_size
            window = draw_window(rng, objective, bucket.num_latents // chunk)
            first, context = window.offset * chunk, len(window.row.context) * chunk
            causal = chunk if window.causal else None
            levels = draw_levels(window, objective, len(indices), generator)
        dropped = draw_prompts(rng, objective, len(indices))[mine]
        levels = levels[mine]
        clean = loaded.latents[:, :, first : first + levels.shape[1]]
        x, target = self._noised(clean, levels, context, objective.context_noise, step, places)
        text = Text(loaded.captions, loaded.text, loaded.text_mask)
        info = FrameInfo(bucket.height, bucket.width, bucket.fps)
        return Batch(x, target, levels, text, dropped, context, causal, info, loaded.ids)

    def _noised(
        self, clean: Tensor, levels: Tensor, context: int, context_noise: float, step: int, places: list[int]
    ) -> tuple[Tensor, Tensor]:
        pairs = []
        for row, place in enumerate(places):
            seed = np.random.default_rng((self.seed, 14, step, place)).integers(2**62)
            generator = torch.Generator().manual_seed(int(seed))
            one = slice(row, row + 1)
            pairs.append(noised(clean[one], levels[one], context, context_noise, generator))
        return torch.cat([x for x, _ in pairs]), torch.cat([target for _, target in pairs])


def video_data(config: TrainConfig) -> tuple[VideoBatches, Parts]:
    """The prepared data sets of ``data.folder`` as one, and the codec and text encoder it was made with.

    Raises:
        ConfigError: no complete data set, one made with another model, or latents and text that do not fit.
    """
    d = config.data
    source = Checkpoint.open(d.model or config.model.pretrained or "embedded")
    channels = source.codec_spec.latent_channels
    shape = shape_of(config, channels)
    if source.text_encoder.text_dim != shape.caption_channels:
        raise ConfigError(
            f"model.caption_channels={shape.caption_channels}: the text encoder of {source.source} gives "
            f"{source.text_encoder.text_dim}"
        )
    clips = SeveralClips(
        [
            PixelClips(folder, source.codec, source.text_encoder) if d.pixels else CachedClips(folder, source)
            for folder in d.folder
        ]
    )
    batches = VideoBatches(clips, config.objective, d, config.seed, channels)
    batches.identity["data_set"] |= {
        "codec": encoder_identity(source.vae),
        "text_encoder": source.text_encoder.identity,
    }
    biggest = max(range(len(clips.counts)), key=lambda n: (clips.counts[n] > 0, clips.buckets[n].num_latents))
    bucket, few = clips.buckets[biggest], list(range(min(SHEET_PROMPTS, clips.counts[biggest])))
    prompts = tuple(clips.load(biggest, few).captions)
    info = FrameInfo(bucket.height, bucket.width, bucket.fps)
    return batches, Parts(source.vae.folder(), source.source.part("text_encoder").folder(), info, prompts)
