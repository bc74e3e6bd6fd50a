"""The state of one stream: the latents in flight, moved by a :class:`~pavdm_dist.method.schedule.WindowPlan`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pavdm_dist.errors import ConfigError, VideoError
from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.schedule import PlanRow, WindowPlan

NoiseSource = Callable[[int], Tensor]
# The use of noise that context is noised with again.
CONTEXT = "context"
# How a chunk comes to its next level: along the velocity, or its clean latents are predicted and noised again.
Step = Literal["euler", "renoise"]


def chunk_noise(seed: int, index: int, shape: tuple[int, ...], use: str = "") -> Tensor:
    """Unit-variance float32 noise of one chunk, a function of (seed, chunk index) alone.

    Drawn by a CPU generator, so that it is the same on every device, engine and restart.

    Args:
        seed: any integer.
        index: chunk index, 0 and up.
        shape: ``[channels, latent frames, height, width]``.
        use: what it is for, where that is not the chunk's birth: other noise.
    """
    digest = hashlib.sha256(f"{seed}:{index}{use and f':{use}'}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


@dataclass(frozen=True)
class Held:
    """Latents whose level is not that of their chunk.

    Attributes:
        image: so many leading latents of chunk 0 are given: clean from its birth on, and never changed.
        context: level that clean context is noised to whenever it is read; 0 = none.
        follows: clean context is noised to the level of the row's cleanest chunk instead.
    """

    image: int = 0
    context: float = 0.0
    follows: bool = False

    def context_level(self, row: PlanRow, levels: Sequence[float]) -> float:
        """Level of clean context at ``row``; ``levels[j]`` is the level at j steps left."""
        return levels[row.steps_left[0]] if self.follows else self.context


NOTHING_HELD = Held()


@dataclass(frozen=True)
class CleanChunk:
    """A finished chunk: ``latents`` is ``[channels, latent frames, height, width]``, float32, normalised."""

    index: int
    latents: Tensor


def not_finite_error(chunk: int, row: int) -> VideoError:
    """What ends a video in whose ``chunk`` values were found after ``row`` that are no finite numbers."""
    return VideoError(
        f"chunk {chunk} holds values that are not finite after step {row}: the weights, the precision or "
        "guidance_scale drive the model out of its range"
    )


@dataclass(frozen=True)
class WindowSnapshot:
    """All that is needed to go on.

    Attributes:
        row: the next one.
        latents: noisy ones and context, by chunk index.
        exact_rows: of mode displaced, rows from ``row`` on that adaptive re-sync has already made exact.
        left: with cached context, keys and values that clean chunks left (:mod:`pavdm_dist.method.saved_keys`): those
            that are read from ``row`` on, or in what a stage tells of a shift the new ones.
        clean: instead of these, latents of the chunks whose own calls are run again
            (:func:`pavdm_dist.method.recovery.replayed`).
    """

    row: int
    latents: dict[int, Tensor]
    exact_rows: frozenset[int] = frozenset()
    left: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    clean: Mapping[int, Tensor] = field(default_factory=dict, repr=False)


class Window:
    """Latents of the chunks in flight and of the clean context, float32.

    Args:
        plan: the rows to follow.
        schedule: levels by steps left; its T must be the plan's.
        noise: chunk index -> ``[C, c, h, w]`` unit noise (:func:`chunk_noise` with seed and shape bound).
        given: latents of the input: context chunks under -1, -2, ..., and with ``start="clip"`` the clean
            latents of chunks 0 .. W-2, which are noised to their slot's level here.
        held: latents with levels of their own.
        again: noise of a chunk that is noised again, by index and use: :data:`CONTEXT`, or the number of steps that it
            has taken, 1 to T - 1.
        step: how chunks come to their next level.

    Raises:
        ConfigError: ``given`` does not hold what the plan's start needs.
    """

    def __init__(
        self,
        plan: WindowPlan,
        schedule: NoiseSchedule,
        noise: NoiseSource,
        given: Mapping[int, Tensor] | None = None,
        held: Held = NOTHING_HELD,
        again: Callable[[int, str], Tensor] | None = None,
        step: Step = "euler",
    ) -> None:
        if schedule.num_inference_steps != plan.num_inference_steps:
            raise ConfigError(
                f"num_inference_steps={schedule.num_inference_steps} of the levels differs from "
                f"{plan.num_inference_steps} of the plan"
            )
        self.plan = plan
        self.row = 0
        self._levels = schedule.levels
        self._noise, self._again, self._held, self._step = noise, again, held, step
        self._latents: dict[int, Tensor] = {}
        given = dict(given or {})
        needed = set(range(-plan.given_context, plan.given_clip))
        if set(given) != needed:
            raise ConfigError(f"start={plan.start} needs latents of chunks {sorted(needed)}, got {sorted(given)}")
        for index, latents in given.items():
            if latents.dim() != 4 or latents.shape[1] != plan.latent_chunk_size:
                raise ConfigError(
                    f"latents of chunk {index} are {list(latents.shape)}: a chunk is [channels, "
                    f"{plan.latent_chunk_size}, height, width]"
                )
            if index < 0:
                self._latents[index] = latents.float()
            elif plan.num_chunks is None or index < plan.num_born:
                # Flow matching's forward process, x_t = (1 - t) x_0 + t eps.
                t = self._levels[plan.chunk(index).entry_steps]
                self._latents[index] = (1 - t) * latents.float() + t * noise(index)

    @classmethod
    def restore(
        cls,
        snapshot: WindowSnapshot,
        plan: WindowPlan,
        schedule: NoiseSchedule,
        noise: NoiseSource,
        held: Held = NOTHING_HELD,
        again: Callable[[int, str], Tensor] | None = None,
        step: Step = "euler",
    ) -> Window:
        """The window as it was when ``snapshot`` was taken; the same arguments must be given otherwise."""
        window = cls.__new__(cls)
        window.plan, window.row = plan, snapshot.row
        window._levels, window._noise, window._again, window._held = schedule.levels, noise, again, held
        window._step = step
        window._latents = {index: latents.clone() for index, latents in snapshot.latents.items()}
        return window

    def snapshot(self) -> WindowSnapshot:
        """A copy of the state between two rows, in main memory (kilobytes to a few megabytes)."""
        return WindowSnapshot(self.row, {index: held.to("cpu", copy=True) for index, held in self._latents.items()})

    def not_finite(self, clean: Sequence[CleanChunk] = ()) -> int | None:
        """The first chunk with a value that is no finite number, of ``clean`` and those held; None where there is none.

        Nothing sound comes out of a window again once it holds one: every chunk reads the others.
        """
        return first_not_finite(self._latents, clean)

    @property
    def latents(self) -> dict[int, Tensor]:
        """What is held now, ``[C, c, h, w]`` by chunk; no tensor is ever changed in place."""
        return dict(self._latents)

    def inputs(self, row: PlanRow) -> tuple[Tensor, Tensor]:
        """What the model sees at ``row``: latents ``[1, C, F, h, w]`` and levels ``[1, F]``, both float32.

        Chunks born at this row get their noise here.
        """
        return self.joined(row, row.window), self.levels(row).unsqueeze(0)

    def joined(self, row: PlanRow, chunks: Sequence[int]) -> Tensor:
        """Latents ``[1, C, F, h, w]`` of some of a row's chunks, one behind the other."""
        return torch.cat([self.input(index, row) for index in chunks], dim=2)

    def levels(self, row: PlanRow) -> Tensor:
        """Noise level of every latent frame at ``row``: float32 ``[F]``, zeros for clean context."""
        return row_levels(row, self._levels, self.plan.latent_chunk_size, self._held)

    def update(self, row: PlanRow, velocity: Tensor) -> tuple[CleanChunk, ...]:
        """One step of every noisy chunk; the context's velocity is never read.

        Args:
            row: the row whose :meth:`inputs` the velocity was computed from; must be the window's next row.
            velocity: ``[1, C, F, h, w]`` for the whole window, or its noisy chunks.

        Returns:
            The chunks that became clean, those that the plan keeps.
        """
        self.step(row, row.chunks, velocity)
        return self.close(row)

    def step(self, row: PlanRow, chunks: Sequence[int], velocity: Tensor) -> None:
        """One step of some noisy chunks of ``row``; ``velocity`` is ``[1, C, F, h, w]``, theirs at its end."""
        size = self.plan.latent_chunk_size
        noisy = velocity[:, :, velocity.shape[2] - len(chunks) * size :]
        for index, part in zip(chunks, noisy.split(size, dim=2), strict=True):
            self.advance(row, index, part)

    def input(self, index: int, row: PlanRow) -> Tensor:
        """Latents ``[1, C, c, h, w]`` of one chunk as the model sees them at ``row``."""
        latents, level = self.chunk(index), self._held.context_level(row, self._levels)
        if index not in row.context or not level:
            return latents
        assert self._again is not None, "context is noised again with noise of its own"
        return (1 - level) * latents + level * self._again(index, CONTEXT)

    def chunk(self, index: int) -> Tensor:
        """Latents ``[1, C, c, h, w]`` of one chunk; its noise, where it is only now being born."""
        if index not in self._latents:
            self._latents[index] = self._noise(index)
        return self._latents[index].unsqueeze(0)

    def advance(self, row: PlanRow, index: int, velocity: Tensor) -> None:
        """One step of a noisy chunk of ``row``; ``velocity`` is ``[1, C, c, h, w]``.

        ``euler``: z <- z + v (t - t'). ``renoise``: x_0 = z + t v, then z <- (1 - t') x_0 + t' eps, fresh noise.
        """
        if row.index != self.row:
            raise ValueError(f"row {row.index} applied to a window that is at row {self.row}")
        left = row.steps_left[row.chunks.index(index)]
        now, then, latents = self._levels[left], self._levels[left - 1], self._latents[index]
        if self._step == "euler":
            moved = latents + velocity[0].float() * (now - then)
        else:
            moved = predicted(latents, velocity[0], now)
            if then:
                assert self._again is not None, "a chunk is noised again with noise of its own"
                moved = (1 - then) * moved + then * self._again(index, str(self.plan.num_inference_steps - left + 1))
        if index == 0 and self._held.image:
            moved[:, : self._held.image] = self._latents[index][:, : self._held.image]
        self._latents[index] = moved

    def close(self, row: PlanRow) -> tuple[CleanChunk, ...]:
        """Ends a row all of whose chunks have advanced; the chunks that became clean, those that the plan keeps."""
        self.row += 1
        clean = tuple(CleanChunk(index, self._latents[index].clone()) for index in row.emits)
        self._forget(row)
        return clean

    def _forget(self, row: PlanRow) -> None:
        """Drops what no later row reads, so that memory stays constant."""
        first_noisy = row.chunks[0] + row.steps_left.count(1)
        for index in [i for i in self._latents if i < first_noisy - self.plan.joint_context]:
            del self._latents[index]


def first_not_finite(latents: Mapping[int, Tensor], clean: Sequence[CleanChunk] = ()) -> int | None:
    """The first chunk with a value that is no finite number, of ``clean`` and others; None where there is none."""
    held = {**{chunk.index: chunk.latents for chunk in clean}, **latents}
    # Nothing but finite values has a finite sum, and one sum is one answer to wait for.
    if not held or torch.cat([one.flatten() for one in held.values()]).sum().isfinite():
        return None
    return next((index for index, one in sorted(held.items()) if not one.isfinite().all()), None)


def predicted(latents: Tensor, velocity: Tensor, level: float) -> Tensor:
    """Clean latents by a velocity x_0 - eps at ``level``, float32; in float64 until then, as students' programs are."""
    return (latents.double() + level * velocity.double()).float()


def row_levels(row: PlanRow, levels: tuple[float, ...], latent_chunk_size: int, held: Held = NOTHING_HELD) -> Tensor:
    """Noise level of every latent frame at ``row``: float32 ``[F]``; ``levels[j]`` is the level at j steps left."""
    per_chunk = [held.context_level(row, levels)] * len(row.context) + [levels[left] for left in row.steps_left]
    found = torch.tensor(per_chunk, dtype=torch.float32).repeat_interleave(latent_chunk_size)
    if held.image and 0 in row.chunks:
        first = row.window.index(0) * latent_chunk_size
        found[first : first + held.image] = 0.0
    return found
