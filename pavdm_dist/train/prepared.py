"""Batches of real video: clips of a prepared data set, each step's a function of (seed, step)."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.catalog import encoder_identity
from pavdm_dist.codecs.pretrained_text import PretrainedTextEncoder, TextOptions
from pavdm_dist.data.dataset import BatchOrder, CachedClips, Clips, PixelClips
from pavdm_dist.data.prefetch import Prefetch
from pavdm_dist.data.several import SeveralClips, SomeClips
from pavdm_dist.data.shards import pad_texts, read_index
from pavdm_dist.errors import ConfigError
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.train.batch import Batch, Batches, draw_kind, draw_prompts
from pavdm_dist.train.checks import bucket_size, check_lengths, check_pictures
from pavdm_dist.train.export import Parts
from pavdm_dist.train.loss import noised
from pavdm_dist.train.model import Text, shape_of
from pavdm_dist.train.objective import Objective, draw_levels, draw_window
from pavdm_dist.train.ranks import World
from pavdm_dist.train.train_settings import DataConfig, TrainConfig

SHEET_PROMPTS = 4
# Captions that are named when they are cut.
CUT_SAID = 5
# Of all clips; so many may be left out with held-out ones without a warning.
LEFT_OUT_SHARE = 0.1

logger = logging.getLogger(__name__)


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
        null_text: ``[L, D]``, what stands for a dropped prompt; None where the model has learned its own.
        text_len: tokens of a text that the model reads; what is longer is cut, and said.

    Raises:
        ConfigError: a batch size for a bucket that is not there, or clips that are too short for the objective.
    """

    def __init__(
        self,
        clips: CachedClips | PixelClips | SeveralClips | SomeClips,
        objective: Objective,
        data: DataConfig,
        seed: int,
        channels: int,
        null_text: Tensor | None = None,
        text_len: int | None = None,
    ) -> None:
        self.clips, self.data, self.seed, self.channels = clips, data, seed, channels
        self._null_text, self._text_len = null_text, text_len
        self._cut: set[str] = set()
        self.identity: dict[str, Any] = {"data_set": {"clips": clips.identity}}
        self.held_out: Batches | None = None
        names = [str(bucket) for bucket in clips.buckets]
        for name, size in data.batch_sizes.items():
            if name not in names:
                raise ConfigError(f"{bucket_size(name, size)}: the data has the buckets {', '.join(names)}")
        sizes = [data.batch_sizes.get(name, data.batch_size) for name in names]
        self._order = BatchOrder(clips.counts, sizes, seed)
        self._kinds = [
            [(share, kind.at_size(bucket.height, bucket.width)) for share, kind in objective.kinds()]
            for bucket in clips.buckets
        ]
        check_lengths(objective, [b for b, count in zip(clips.buckets, clips.counts, strict=True) if count])
        self._ahead: Prefetch[Batch] | None = None
        self._next: tuple[int, int, int] | None = None

    def batch(self, step: int, rank: int, size: int) -> Batch:
        """See :class:`~pavdm_dist.train.batch.Batches`; steps in a row are loaded ahead in a thread."""
        if not self.data.prefetch:
            return self._load(step, rank, size)
        if self._ahead is None or self._next != (step, rank, size):
            self.close()

            def load(number: int) -> Batch:
                batch = self._load(number, rank, size)
                return batch.pinned() if torch.cuda.is_available() else batch

            self._ahead = Prefetch(load, step, self.data.prefetch)
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
            first, causal, context, kind = 0, None, 0, "picture"
            levels = torch.rand(len(indices), 1, generator=generator)
        else:
            chunk = objective.latent_chunk_size
            window = draw_window(rng, objective, bucket.num_latents // chunk)
            first, context = window.offset * chunk, len(window.row.context) * chunk
            causal, kind = (chunk if window.causal else None), window.kind
            levels = draw_levels(window, objective, len(indices), generator)
        dropped = draw_prompts(rng, objective, len(indices))[mine]
        levels = levels[mine]
        clean = loaded.latents[:, :, first : first + levels.shape[1]]
        x, target = self._noised(clean, levels, context, objective.noise_of_context, step, places)
        text = self._text(loaded, dropped)
        info = FrameInfo(bucket.height, bucket.width, bucket.fps)
        return Batch(x, target, levels, text, dropped, context, causal, info, loaded.ids, kind=kind)

    def _text(self, loaded: Clips, dropped: list[bool]) -> Text:
        """What the model reads: no more than it takes, and no words where a prompt is dropped."""
        if loaded.text is None or loaded.text_mask is None:
            return Text(loaded.captions)
        texts = [tokens[mask] for tokens, mask in zip(loaded.text, loaded.text_mask, strict=True)]
        if self._null_text is not None:
            texts = [self._null_text if drop else text for text, drop in zip(texts, dropped, strict=True)]
        if self._text_len is not None:
            for caption, text in zip(loaded.captions, texts, strict=True):
                self._say_if_cut(caption, len(text), self._text_len)
        return Text(loaded.captions, *pad_texts([text[: self._text_len] for text in texts]))

    def _say_if_cut(self, caption: str, tokens: int, limit: int) -> None:
        if tokens <= limit or caption in self._cut or len(self._cut) > CUT_SAID:
            return
        self._cut.add(caption)
        if len(self._cut) > CUT_SAID:
            logger.warning("more captions are longer than the model's %d tokens; they are not named", limit)
        else:
            logger.warning("caption %r has %d tokens, the model reads the first %d", caption[:120], tokens, limit)

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


def data_model(config: TrainConfig) -> Checkpoint:
    """The model whose codec and text encoder the data is of; reads configuration files only.

    Raises:
        CheckpointError: not a model this package runs.
        ConfigError: settings of a pretrained text encoder that it does not have.
    """
    found = Checkpoint.open(config.data.model or config.model.pretrained or "embedded")
    found = replace(found, text=TextOptions.of(config.data))
    found.check_text("data.")
    return found


def video_data(config: TrainConfig, world: World | None = None) -> tuple[VideoBatches, Parts]:
    """The prepared data sets of ``data.folder`` as one, and the codec and text encoder it was made with.

    Args:
        config: settings.
        world: all processes, which must all call it; None = this one.

    Raises:
        ConfigError: no complete data set, one made with another model or that lacks a file, or latents, text or sizes
            that do not fit.
    """
    d, m, o = config.data, config.model, config.objective
    for folder in d.folder:
        _check_set(folder, d.pixels)
    source = data_model(config)
    channels = source.codec_spec.latent_channels
    shape = shape_of(config, channels)
    text_dim = source.text_encoder.text_dim
    if text_dim != shape.spec.text_dim:
        field = f"model.pretrained={m.pretrained}" if m.pretrained else f"model.caption_channels={m.caption_channels}"
        raise ConfigError(
            f"{field}: the text encoder of {source.source} gives texts of width {text_dim}, the model reads"
            f" {shape.spec.text_dim}"
        )
    for _, kind in o.kinds():
        source.codec_spec.check_chunk(kind.latent_chunk_size)
    clips = SeveralClips(
        [
            PixelClips(folder, source.codec, source.text_encoder) if d.pixels else CachedClips(folder, source)
            for folder in d.folder
        ]
    )
    with_clips = [bucket for bucket, count in zip(clips.buckets, clips.counts, strict=True) if count]
    check_pictures(config, 1 if world is None else world.size, with_clips)
    if m.pretrained is not None:
        for bucket in clips.buckets:
            Checkpoint.open(m.pretrained).check_size(bucket.height, bucket.width)
    null_text = None
    if o.prompt_dropout and shape.null_text_tensor is None:
        null_text = _null_text(source, world)
    used, held_out, split = _held_out(clips, config.validation.clips)
    if world is None or world.first:
        _say_counts(clips, used, held_out)
    about = (config.seed, channels, null_text, shape.spec.text_len)
    batches = VideoBatches(used, o, d, *about)
    if held_out is not None:
        batches.held_out = VideoBatches(held_out, o, replace(d, prefetch=0), *about)
    batches.identity["data_set"] |= {
        "held_out": config.validation.clips,
        "split": split,
        "codec": encoder_identity(source.vae),
        **({"text_dtype": source.text.dtype} if isinstance(source.text_encoder, PretrainedTextEncoder) else {}),
        "text_encoder": source.text_encoder.identity,
    }
    biggest = max(range(len(clips.counts)), key=lambda n: (clips.counts[n] > 0, clips.buckets[n].num_latents))
    bucket, few = clips.buckets[biggest], list(range(min(SHEET_PROMPTS, clips.counts[biggest])))
    prompts = tuple(clips.load(biggest, few).captions)
    info = FrameInfo(bucket.height, bucket.width, bucket.fps)
    return batches, Parts(source.vae.folder(), source.source, info, prompts, text=source.text)


def _check_set(folder: str, pixels: bool) -> None:
    """Refuses what is no set, before a model is asked for, which may have to come from a hub; and, unless its videos
    are read, one that lacks files: training might ask for the first of them after days."""
    names = [name for bucket in read_index(folder)["buckets"] for name in bucket["shards"]]
    if lacking := [name for name in names if not pixels and not (Path(folder) / name).is_file()]:
        raise ConfigError(
            f"data.folder={folder}: {len(lacking)} of {len(names)} shards are missing, the first is {lacking[0]}; run"
            " `pavdm data prepare` again to make them"
        )


def _held_out(clips: SeveralClips, count: int) -> tuple[SeveralClips | SomeClips, SomeClips | None, str]:
    """What is trained on, the last clips of every bucket that has more than ``count``, and how both were told apart.

    Nothing of a film that a held-out clip is of is trained on, in whichever bucket and set: clips of one film look
    alike. Older runs left out the held-out clips alone ("clips"), or took a film of two sets for two ("films"); what
    is left out names the oldest of the three ("places") that leaves out as much, so that these runs go on.
    """
    if not count:
        return clips, None, "clips"
    held = [range(whole - count if whole > count else whole, whole) for whole in clips.counts]
    if not any(held):
        most = max(clips.counts)
        raise ConfigError(f"validation.clips={count}: no bucket has more clips, the largest has {most}; use fewer")
    videos = [clips.videos(bucket) for bucket in range(len(clips.counts))]
    places = {video: clips.place(video) for video in {video for names in videos for video in names}}
    films = [[places[video] for video in names] for names in videos]
    rest = _rest(films, held)
    if not any(rest):
        several = len({film for names, some in zip(films, held, strict=True) for film in names[some.start :]})
        raise ConfigError(
            f"validation.clips={count}: these clips are of all {several} films, and of none of these is trained on;"
            " use fewer, or prepare more films"
        )
    if sum(map(len, rest)) == sum(clips.counts) - sum(map(len, held)):
        split = "clips"
    else:
        split = "films" if rest == _rest(videos, held) else "places"
    return SomeClips(clips, rest), SomeClips(clips, held), split


def _rest(films: Sequence[Sequence[Hashable]], held: Sequence[range]) -> list[list[int]]:
    """Of each bucket, the clips of films that no held-out clip is of; ``films``: of every clip."""
    out = {names[number] for names, some in zip(films, held, strict=True) for number in some}
    return [[number for number, film in enumerate(names) if film not in out] for names in films]


def _say_counts(clips: SeveralClips, used: SeveralClips | SomeClips, held_out: SomeClips | None) -> None:
    """How many clips of each bucket are trained on; a warning where many are left out that are not looked at, either:
    films are left out whole, and a long one may be nearly all there is."""
    lost = 0
    for number, bucket in enumerate(clips.buckets):
        held = 0 if held_out is None else held_out.counts[number]
        left = clips.counts[number] - used.counts[number] - held
        lost += left
        about = (bucket, used.counts[number], held, left)
        logger.info("bucket %s: %d clips are trained on, %d held out, %d left out as of the same films", *about)
    if lost > LEFT_OUT_SHARE * sum(clips.counts):
        logger.warning(
            "held-out clips leave out %d of %d other clips, all else of their films: prepare more films, or use a"
            " smaller validation.clips",
            lost,
            lost + sum(used.counts),
        )


def _null_text(source: Checkpoint, world: World | None) -> Tensor:
    """The encoding of no words; a large encoder is loaded by one process alone."""
    return source.text_encoder.encode("") if world is None else world.of_first(lambda: source.text_encoder.encode(""))
