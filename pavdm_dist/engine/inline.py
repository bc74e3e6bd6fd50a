"""The engine for one process without Ray: video after video through the reference loop, decoded chunk by chunk.

Gives what :class:`~pavdm_dist.engine.ray_engine.RayEngine` gives, bit for bit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pavdm_dist.codecs.base import FrameDecoder
from pavdm_dist.engine.beside import Beside
from pavdm_dist.engine.events import AtWork, Decoded, Failed, Finished, Shift
from pavdm_dist.engine.flight import Flight
from pavdm_dist.engine.watchdog import Patience, Watchdog
from pavdm_dist.errors import PAVDMError, VideoError
from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.sampler import StepCallback, sample
from pavdm_dist.method.schedule import PlanRow
from pavdm_dist.method.stream import NewPrompt, ResumePoint, Stream
from pavdm_dist.method.window import CleanChunk, Window
from pavdm_dist.models.base import Backbone
from pavdm_dist.models.text_cache import TextBank

logger = logging.getLogger(__name__)

# Seconds between two looks at whether the video that is made gives anything.
LOOK_S = 1.0


class InlineEngine:
    """A whole backbone and a codec in this process.

    Args:
        model: wholly loaded.
        codec: makes frames.
        device: that the model is on.
        threads: intra-op threads while it computes; the caller's own number holds in between.
        codec_device: that the codec is on; None = the model's.
        patience: when a video that gives nothing is reported. Nothing can end it: what stands still is the caller.
    """

    def __init__(
        self,
        model: Backbone,
        codec: FrameDecoder,
        device: torch.device | str = "cpu",
        threads: int = 1,
        patience: Patience | None = None,
        codec_device: torch.device | str | None = None,
    ) -> None:
        self._model, self._codec, self._device, self._threads = model, codec, torch.device(device), threads
        self._patience = patience or Patience()
        self._codec_device = self._device if codec_device is None else torch.device(codec_device)
        self._overlaps = self._device.type != "cpu"
        self._stopping: set[int] = set()
        self._cancelled: set[int] = set()
        self._prompts: dict[int, list[NewPrompt]] = {}
        self._at: tuple[int | None, int] = None, 0  # what is sampled, and its next row

    def run(
        self,
        streams: Iterable[Stream | Failed],
        on_grown: Callable[[int, ResumePoint], None] | None = None,
        on_failed: Callable[[int, PAVDMError], None] | None = None,
        on_step: Callable[[Stream], StepCallback] | None = None,
    ) -> Iterator[Finished]:
        """Samples and decodes all streams, one after another; yields each stream's chunks in order.

        Args:
            streams: taken when the one before has ended.
            on_grown, on_failed: see :meth:`RayEngine.run <pavdm_dist.engine.ray_engine.RayEngine.run>`.
            on_step: makes what is called after every row of a stream.
        """
        self._prompts.clear()  # of a run that had ended when they came
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            # Measured once, which takes half a second: nobody who asks for the first video need wait for it.
            with suppress(Exception):  # every video says so itself
                self._codec.receptive_latents()
            for stream in streams:
                if isinstance(stream, Stream) and stream.id in self._cancelled:
                    self._forget(stream.id)
                    continue
                try:
                    if isinstance(stream, Failed):
                        raise stream.error
                    with _watched(stream, self._patience) as pace:
                        for finished in self._sampled(stream, on_grown, None if on_step is None else on_step(stream)):
                            pace.gave()
                            # The consumer's own thread count while it works; ours again, whatever it did, for the next.
                            torch.set_num_threads(before)
                            yield finished
                            before = torch.get_num_threads()
                            torch.set_num_threads(self._threads)
                            pace.goes_on()
                            if stream.id in self._cancelled:
                                break
                except PAVDMError as error:
                    if on_failed is None:
                        raise
                    on_failed(stream.stream if isinstance(stream, Failed) else stream.id, error)
                finally:  # a run may last for months
                    self._forget(stream.stream if isinstance(stream, Failed) else stream.id)
        finally:
            self._stopping.clear()
            self._cancelled.clear()
            self._prompts.clear()
            torch.set_num_threads(before)

    def stop(self, stream: int) -> None:
        """Lets an endless stream end after what is in flight."""
        self._stopping.add(stream)

    def set_prompt(self, stream: int, new: NewPrompt) -> None:
        """Another prompt for a stream of the running :meth:`run`."""
        self._prompts.setdefault(stream, []).append(new)

    def cancel(self, stream: int) -> None:
        """Ends a stream where it is."""
        self._cancelled.add(stream)

    def at_work(self, stream: int) -> AtWork | None:
        """Where the stream is that is being sampled; None of any other. From any thread."""
        sampled, row = self._at
        return AtWork(f"row {row} comes next", row) if sampled == stream else None

    def close(self) -> None:
        """Nothing outlives a run."""

    def _forget(self, stream: int) -> None:
        """Of a stream that is over, what was asked for."""
        self._stopping.discard(stream)
        self._cancelled.discard(stream)
        self._prompts.pop(stream, None)
        self._at = None, 0

    def _sampled(
        self, stream: Stream, on_grown: Callable[[int, ResumePoint], None] | None, on_step: StepCallback | None
    ) -> Iterator[Finished]:
        denoise = StreamDenoiser(self._model, stream, TextBank(self._model.project_text, self._device), self._device)
        flight, decoder = Flight(stream, self._codec.receptive_latents()), self._codec.decoder()

        def change(row: int) -> None:
            flight.asked = self._prompts.pop(stream.id, [])
            if flight.change(row):
                denoise.follow(flight.stream)

        change(stream.first_row)
        self._at = stream.id, stream.first_row
        if flight.past is not None:
            decoder.warm(flight.past)
        ended: list[tuple[int, Shift]] = []

        def after(row: PlanRow, window: Window) -> None:
            self._at = stream.id, window.row
            if on_step is not None:
                on_step(row, window)
            stopping = stream.id in self._stopping and window.plan.num_chunks is None
            if stopping and denoise.batches.may_end(window.row):
                window.plan = window.plan.stopped(window.row)
                flight.stopped(window.plan)
                denoise.batches = replace(denoise.batches, plan=window.plan)
            flight.batches = denoise.batches
            change(window.row)
            if not window.plan.closes_shift(row.index):
                return
            shift = Shift(stream.id, replace(window.snapshot(), left=denoise.newly_left()))
            if row.emits:
                ended.append((len(row.emits), shift))  # its chunks are given out next
            elif (point := flight.shifted(shift)[1]) is not None and on_grown is not None:
                on_grown(stream.id, point)

        def finished(clean: CleanChunk, frames_of: Callable[[], Tensor]) -> Finished:
            try:
                frames = frames_of()
            except Exception as error:  # as in a decode actor, it ends this video
                if not isinstance(error, PAVDMError):
                    logger.exception("chunk %d could not be decoded", clean.index, extra={"video": stream.id})
                raise VideoError(f"chunk {clean.index} could not be decoded: {error}") from error
            return flight.finished(Decoded(stream.id, clean.index, frames))

        for clean, _ in list(flight.undecoded):
            yield finished(clean, partial(decoder.decode, clean.latents))

        def shifted() -> Iterator[CleanChunk]:
            """Chunks in main memory; those that become clean at one row come once all of them are there."""
            together = list[CleanChunk]()
            for clean in sample(stream.window(self._device), denoise, stream.guidance_scale, after):
                together.append(CleanChunk(clean.index, clean.latents.cpu()))
                count, shift = ended[-1]
                if len(together) < count:
                    continue
                flight.shifted(replace(shift, clean=tuple(together)))
                ended.clear()
                yield from together
                together.clear()

        if not self._overlaps:
            for clean in shifted():
                yield finished(clean, partial(decoder.decode, clean.latents))
            return
        # A chunk is decoded while the next one is sampled, and given out when that has been.
        before: tuple[CleanChunk, Callable[[], Tensor]] | None = None
        with Beside(decoder, self._codec_device, self._threads) as beside:
            try:
                for clean in shifted():
                    if before is not None:
                        yield finished(*before)
                    before = clean, beside.decode(clean.latents)
            except VideoError:  # nothing follows, but what was finished is
                if before is not None:
                    yield finished(*before)
                raise
            if before is not None:
                yield finished(*before)


class _Pace:
    """What one video gives, seen from a thread beside the one that makes it."""

    def __init__(self, stream: Stream, patience: Patience) -> None:
        self._stream, self._watchdog = stream.id, Watchdog(patience)
        self._lock, self._is_awaited, self._is_told = threading.Lock(), True, False
        self._watchdog.starts(stream.id, stream.plan.block_chunks)

    def gave(self) -> None:
        """A chunk, which somebody is busy with now."""
        with self._lock:
            self._watchdog.gave(self._stream)
            self._is_awaited = self._is_told = False

    def goes_on(self) -> None:
        """The next chunk is awaited from now on."""
        with self._lock:
            self._watchdog.excuse()
            self._is_awaited = True

    def look(self) -> None:
        """Reports it where it has given nothing for long."""
        with self._lock:
            for late in self._watchdog.late([self._stream] if self._is_awaited else []):
                # One past the limit is told of again and again; here nothing can end it, and once is enough.
                if self._is_told:
                    return
                self._is_told = True
                said = "video %d: nothing has come for %.0f s%s"
                logger.warning(said, late.stream, late.seconds, late.usually, extra={"video": late.stream})


@contextmanager
def _watched(stream: Stream, patience: Patience) -> Iterator[_Pace]:
    pace, over = _Pace(stream, patience), threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            pace.look()

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield pace
    finally:
        over.set()
        thread.join()
