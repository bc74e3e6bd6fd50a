"""The engine for one process without Ray: video after video through the reference loop, decoded chunk by chunk.

Gives what :class:`~pavdm_dist.engine.ray_engine.RayEngine` gives, bit for bit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pavdm_dist.codecs.base import FrameDecoder
from pavdm_dist.engine.asked import Asked, ended_by_a_later_run
from pavdm_dist.engine.beside import Beside
from pavdm_dist.engine.events import AtWork, Decoded, Failed, Finished, Shift
from pavdm_dist.engine.flight import Flight
from pavdm_dist.engine.watchdog import Patience, Watchdog
from pavdm_dist.errors import PAVDMError, VideoError
from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.sampler import StepCallback, sample
from pavdm_dist.method.schedule import PlanRow
from pavdm_dist.method.stream import NewPrompt, Stream
from pavdm_dist.method.window import CleanChunk, Window
from pavdm_dist.models.base import Backbone
from pavdm_dist.models.devices import intra_op_threads
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
        self._run: _Run | None = None  # the newest one
        self._lock = threading.RLock()  # of that, and of what is asked of it; a finaliser may end one meanwhile

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

        Raises:
            ConfigError: another run has taken this one's place.
        """
        run = _Run()
        with self._lock:
            self._run = run
        try:
            with closing(self._chunks(run, streams, on_grown, on_failed, on_step)) as chunks:
                while True:
                    with intra_op_threads(self._threads):  # the consumer has its own number while it works
                        finished = next(chunks, None)
                    if finished is None:
                        return
                    yield finished
                    if self._run is not run:
                        raise ended_by_a_later_run()
        finally:
            with self._lock:
                if self._run is run:
                    self._run = None

    def stop(self, stream: int) -> None:
        """Lets an endless stream of the running :meth:`run` end after what is in flight."""
        with self._lock:
            if self._run is not None:
                self._run.asked.stop(stream)

    def set_prompt(self, stream: int, new: NewPrompt) -> None:
        """Another prompt for a stream of the running :meth:`run`."""
        with self._lock:
            if self._run is not None:
                self._run.asked.set_prompt(stream, new)

    def cancel(self, stream: int) -> None:
        """Ends a stream of the running :meth:`run` where it is."""
        with self._lock:
            if self._run is not None:
                self._run.asked.cancel(stream)

    def at_work(self, stream: int) -> AtWork | None:
        """Where the stream is that is being sampled; None of any other. From any thread."""
        run = self._run
        sampled, row = (None, 0) if run is None else run.at
        return AtWork(f"row {row} comes next", row) if sampled == stream else None

    def close(self) -> None:
        """Nothing outlives a run."""

    def _chunks(
        self,
        run: _Run,
        streams: Iterable[Stream | Failed],
        on_grown: Callable[[int, ResumePoint], None] | None,
        on_failed: Callable[[int, PAVDMError], None] | None,
        on_step: Callable[[Stream], StepCallback] | None,
    ) -> Generator[Finished, None, None]:
        # Measured once, which takes half a second: nobody who asks for the first video need wait for it.
        with suppress(Exception):  # every video says so itself
            self._codec.receptive_latents()
        for stream in streams:
            number = stream.stream if isinstance(stream, Failed) else stream.id
            with self._lock:
                run.asked.comes(number)
            try:
                if isinstance(stream, Failed):
                    raise stream.error
                if run.asked.is_cancelled(number):
                    continue
                with _watched(stream, self._patience) as pace:
                    step = None if on_step is None else on_step(stream)
                    for finished in self._sampled(run, stream, on_grown, step):
                        pace.gave()
                        yield finished
                        pace.goes_on()
                        if run.asked.is_cancelled(number):
                            break
            except PAVDMError as error:
                if on_failed is None:
                    raise
                on_failed(number, error)
            finally:  # a run may last for months
                run.at = None, 0
                with self._lock:
                    run.asked.ends(number)

    def _sampled(
        self,
        run: _Run,
        stream: Stream,
        on_grown: Callable[[int, ResumePoint], None] | None,
        on_step: StepCallback | None,
    ) -> Iterator[Finished]:
        denoise = StreamDenoiser(self._model, stream, TextBank(self._model.project_text, self._device), self._device)
        flight, decoder = Flight(stream, self._codec.receptive_latents()), self._codec.decoder()

        def change(row: int) -> None:
            with self._lock:
                flight.asked = run.asked.take_prompts(stream.id)
            if flight.change(row):
                denoise.follow(flight.stream)

        change(stream.first_row)
        run.at = stream.id, stream.first_row
        if flight.past is not None:
            decoder.warm(flight.past)
        ended: list[tuple[int, Shift]] = []

        def after(row: PlanRow, window: Window, clean: Sequence[CleanChunk]) -> None:
            run.at = stream.id, window.row
            if on_step is not None:
                on_step(row, window, clean)
            stopping = run.asked.is_stopping(stream.id) and window.plan.num_chunks is None
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


class _Run:
    """One call of :meth:`InlineEngine.run`.

    Attributes:
        asked: of its streams.
        at: what is sampled, and its next row.
    """

    def __init__(self) -> None:
        self.asked = Asked()
        self.at: tuple[int | None, int] = None, 0


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
