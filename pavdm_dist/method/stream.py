"""One video to sample, as plain data: the same object drives the in-process sampler and every stage actor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.microbatches import Displaced, MicroBatches
from pavdm_dist.method.recovery import Recovery
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.sampler import UNCONDITIONAL, num_branches
from pavdm_dist.method.schedule import Mode, PlanRow, WindowPlan
from pavdm_dist.method.window import Held, Step, Window, WindowSnapshot, chunk_noise
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.devices import to_device


def text_key(text: Tensor) -> str:
    """Identity of an encoded text: equal embeddings share projections and keys/values on every stage."""
    data = text.detach().cpu().contiguous()
    return hashlib.sha256(f"{data.dtype}{tuple(data.shape)}".encode() + data.numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Conditioning:
    """Which text every chunk is denoised under. A chunk keeps its prompt for life, also as context.

    Attributes:
        texts: text key -> encoder output ``[L, text_dim]``.
        prompts: ``(first chunk, text key)`` in rising order; the first entry starts at chunk 0.
        null: text key of the unconditional branch, the same for all chunks; None without guidance.
        null_as_long: of that text a chunk reads as many rows as its prompt has, which is another text for each length.
    """

    texts: Mapping[str, Tensor]
    prompts: tuple[tuple[int, str], ...]
    null: str | None = None
    null_as_long: bool = False

    @classmethod
    def build(
        cls, prompts: Sequence[tuple[int, Tensor]], null: Tensor | None, null_as_long: bool = False
    ) -> Conditioning:
        """From ``(first chunk, encoded prompt)`` pairs and the encoded null or negative prompt.

        Args:
            prompts: texts ``[L, text_dim]``.
            null: ``[L, text_dim]``; None without guidance.
            null_as_long: see above.
        """
        texts = {text_key(text): text for _, text in prompts}
        if null is not None:
            texts[text_key(null)] = null
        keys = tuple((start, text_key(text)) for start, text in prompts)
        return cls(texts, keys, None if null is None else text_key(null), null_as_long)._with_nulls()

    def key(self, chunk: int, branch: int) -> str:
        """Text key of a chunk; given (negative) chunks carry the first prompt.

        Raises:
            ValueError: the chunk's text was dropped (:meth:`since`).
        """
        first, current = self.prompts[0]
        if max(chunk, 0) < first:
            raise ValueError(f"the text of chunk {chunk} is gone: texts are held from chunk {first} on")
        for start, key in self.prompts:
            if start <= chunk:
                current = key
        return self._null_beside(current) if branch == UNCONDITIONAL else current

    def _null_beside(self, prompt: str) -> str:
        """Key of the unconditional branch's text beside a prompt's."""
        if self.null is None:
            raise ValueError("guidance needs a null text")
        rows = len(self.texts[prompt]) if self.null_as_long else len(self.texts[self.null])
        return self.null if rows >= len(self.texts[self.null]) else f"{self.null}:{rows}"

    def _read_with(self, prompts: Iterable[str]) -> set[str]:
        """Keys of prompts, and of all that is read or cut beside them."""
        found = set(prompts)
        return found if self.null is None else found | {self.null} | {self._null_beside(key) for key in found}

    def _with_nulls(self) -> Conditioning:
        """With the cut texts of the unconditional branch that its prompts ask for."""
        if self.null is None or not self.null_as_long:
            return self
        null = self.texts[self.null]
        beside = {self._null_beside(key): null[: len(self.texts[key])].clone() for _, key in self.prompts}
        return replace(self, texts={**beside, **self.texts})

    def with_prompt(self, from_chunk: int, text: Tensor) -> Conditioning:
        """From chunk ``from_chunk`` on another text, ``[L, text_dim]``, up to where a later one begins already."""
        key = text_key(text)
        kept = [entry for entry in self.prompts if entry[0] != from_chunk]
        prompts = tuple(sorted([*kept, (from_chunk, key)]))
        return replace(self, texts={**self.texts, key: text}, prompts=prompts)._with_nulls()

    def since(self, chunk: int) -> Conditioning:
        """Without the texts that no chunk from ``chunk`` on follows."""
        first = max((start for start, _ in self.prompts if start <= chunk), default=self.prompts[0][0])
        prompts = tuple(entry for entry in self.prompts if entry[0] >= first)
        keys = self._read_with(key for _, key in prompts)
        return replace(self, texts={key: text for key, text in self.texts.items() if key in keys}, prompts=prompts)

    def expired(self, row: PlanRow) -> set[str]:
        """Texts whose last chunk has left the window before ``row``, or that others have replaced."""
        alive = {self.key(chunk, branch=0) for chunk in row.window}
        alive |= {key for start, key in self.prompts if start >= row.window[0]}
        return self.texts.keys() - self._read_with(alive)


@dataclass(frozen=True, eq=False)
class NewPrompt:
    """Another prompt for a video that is running.

    Attributes:
        from_chunk: the first chunk that follows it; where that is born already, the next one that is born.
        prompt: in words, for the record.
        text: encoded, ``[L, text_dim]``.
        oldest: the first chunk whose text is still read when it is told: it is in the window, or its call is run again.
    """

    from_chunk: int
    prompt: str
    text: Tensor = field(repr=False)
    oldest: int = 0

    def at(self, plan: WindowPlan, row: int) -> NewPrompt | None:
        """As it is in force when it is told before ``row``; None where no chunk is left that could follow it."""
        if plan.is_over(row):
            return None
        now = plan.row(row)
        first = max(self.from_chunk, now.born[0] if now.born else now.chunks[-1] + 1)
        if plan.num_chunks is not None and first >= plan.num_born:
            return None
        return replace(self, from_chunk=first, oldest=now.window[0])


@dataclass(frozen=True)
class Stream:
    """Everything that determines one video's latents.

    Attributes:
        id: name of the stream within a run; no number depends on it.
        plan, schedule: the rows and the levels.
        seed: noise of chunk k is a function of (seed, k).
        latent_shape: ``(C, h, w)``.
        conditioning: texts per chunk.
        info: picture size and rate the model is told.
        guidance_scale: g; 1 = no unconditional branch.
        given: input latents by chunk index (see :class:`~pavdm_dist.method.window.Window`).
        warm: latents ``[C, n, h, w]`` that come before chunk 0, which the decoder is warmed on; never sampled.
        resume: where to go on instead of at row 0.
        mode: ``window``: chunks of a row see each other; ``causal``: each sees itself and cleaner ones; ``displaced``:
            noisier ones too, as they were a step ago.
        displaced: of mode displaced.
        image: latents ``[C, n, h, w]`` that chunk 0 begins with, which are clean from the start and stay as they are.
        context_noise: level to which clean context is noised again, and which the model is told; 0 = it is clean.
        context_follows: clean context is noised to the row's own level instead.
        step: how a chunk comes to its next level.
        chunks_per_unit: of modes causal and displaced, noisy chunks of a micro-batch; other last bits.
        recovery: with cached context, what is kept for going on.
        settings: what it was asked for with, by name, for its resume points; nothing is computed from them.
    """

    id: int
    plan: WindowPlan
    schedule: NoiseSchedule
    seed: int
    latent_shape: tuple[int, int, int]
    conditioning: Conditioning
    info: FrameInfo
    guidance_scale: float = 1.0
    given: Mapping[int, Tensor] = field(default_factory=dict)
    warm: Tensor | None = None
    resume: ResumePoint | None = None
    mode: Mode = "window"
    displaced: Displaced = field(default_factory=Displaced)
    image: Tensor | None = None
    context_noise: float = 0.0
    step: Step = "euler"
    context_follows: bool = False
    chunks_per_unit: int = 1
    recovery: Recovery = field(default_factory=Recovery)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def branches(self) -> int:
        """Guidance branches, 1 or 2."""
        return num_branches(self.guidance_scale)

    @property
    def first_row(self) -> int:
        return 0 if self.resume is None else self.resume.snapshot.row

    @property
    def replayed(self) -> tuple[int, ...]:
        """Clean chunks whose own calls are run again before the first row, in that order."""
        snapshot = None if self.resume is None else self.resume.snapshot
        return () if snapshot is None or snapshot.left else tuple(sorted(snapshot.clean))

    @property
    def decoder_warm(self) -> Tensor | None:
        """Latents ``[C, n, h, w]`` that a decoder must have seen before this stream's first chunk; None = none."""
        return self.warm if self.resume is None else self.resume.warm

    @property
    def is_sampled(self) -> bool:
        """Whether no row is left to run: it was resumed behind its last one."""
        return self.plan.is_over(self.first_row)

    @cached_property
    def batches(self) -> MicroBatches:
        """How its rows are cut into micro-batches."""
        exact = frozenset[int]() if self.resume is None else self.resume.snapshot.exact_rows
        return MicroBatches(self.plan, self.mode, self.first_row, self.displaced, exact, self.chunks_per_unit)

    def changed(self, new: NewPrompt) -> Stream:
        """With another prompt."""
        return replace(self, conditioning=self.conditioning.with_prompt(new.from_chunk, new.text))

    @property
    def held(self) -> Held:
        """Which latents are not what they would be otherwise."""
        return Held(0 if self.image is None else self.image.shape[1], self.context_noise, self.context_follows)

    def noise(self, index: int, device: torch.device | str = "cpu") -> Tensor:
        """Noise ``[C, c, h, w]`` that chunk ``index`` is born from; the image in front of it, if there is one."""
        noise = self._unit_noise(index)
        if index == 0 and self.image is not None:
            noise = torch.cat([self.image.float().cpu(), noise[:, self.image.shape[1] :]], dim=1)
        return to_device(noise, device)

    def _unit_noise(self, index: int, use: str = "") -> Tensor:
        channels, height, width = self.latent_shape
        return chunk_noise(self.seed, index, (channels, self.plan.latent_chunk_size, height, width), use)

    def window(self, device: torch.device | str = "cpu") -> Window:
        """The stream's window before its first row, with the chunks whose calls are run again then."""

        def noise(index: int) -> Tensor:
            return self.noise(index, device)

        def again(index: int, use: str) -> Tensor:
            return to_device(self._unit_noise(index, use), device)

        if self.resume is not None:
            snapshot = self.resume.snapshot
            held = {**{chunk: snapshot.clean[chunk] for chunk in self.replayed}, **snapshot.latents}
            latents = {index: value.to(device) for index, value in held.items()}
            return Window.restore(
                WindowSnapshot(snapshot.row, latents), self.plan, self.schedule, noise, self.held, again, self.step
            )
        given = {index: value.to(device) for index, value in self.given.items()}
        return Window(self.plan, self.schedule, noise, given, self.held, again, self.step)
