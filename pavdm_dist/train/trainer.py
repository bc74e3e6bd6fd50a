"""The training run: steps, checkpoints that it goes on from, and the model that comes out.

One or more processes under the DeepSpeed engine. Every batch is a function of (seed, step), so a resumed run sees
the data an unbroken one would, whatever the number of processes.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.errors import ConfigError, EngineError
from pavdm_dist.io.storage import disk_errors
from pavdm_dist.train import save_reading as saves
from pavdm_dist.train import save_writing as saving
from pavdm_dist.train.average import Average, whole_tensors
from pavdm_dist.train.batch import Batches
from pavdm_dist.train.checks import check_settings, memory_advice
from pavdm_dist.train.export import Parts, export_model
from pavdm_dist.train.identity import identity_of
from pavdm_dist.train.interval import Interval, peak_tflops
from pavdm_dist.train.model import shape_of
from pavdm_dist.train.profiling import Profiler
from pavdm_dist.train.ranks import World, join_world
from pavdm_dist.train.run_folder import CHECKPOINTS, Guard
from pavdm_dist.train.run_log import Records
from pavdm_dist.train.sequence import join_sequence
from pavdm_dist.train.start import group_settings, keep_settings, start_engine
from pavdm_dist.train.steps import Loaded, Pending, advance, load, refuse, settle
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.validation import Validation
from pavdm_dist.values.merging import to_dict

# Takes the metrics of a logged step.
Report = Callable[[dict[str, Any]], None]

logger = logging.getLogger(__name__)


class Trainer:
    """The model's training run.

    Args:
        config: settings.
        batches: the data.
        parts: what the exported model needs besides the trained modules.
        world: all processes.
        report: called on every process with the metrics of each logged step.
        guard: says what keeps this process from writing into the run's folder, before it does.
        asked: says before every step whether the run is to end; looked at by the first process alone.

    Raises:
        ConfigError: impossible settings, or a run folder that was made with others.
    """

    def __init__(
        self,
        config: TrainConfig,
        batches: Batches,
        parts: Parts,
        world: World | None = None,
        report: Report | None = None,
        guard: Guard = lambda: None,
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.batches, self.parts, self.report, self.guard = config, batches, parts, report, guard
        self.asked, self.stopping = asked, False
        self.world = world or join_world(config.launch.timeout_seconds)
        check_settings(config, self.world.size)
        self.run_dir = Path(config.run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.layout = saves.SaveLayout(config.zero.stage, self.world.size)
        folder = self.run_dir / CHECKPOINTS
        self.identity = identity_of(config, batches)
        found = saves.find(folder, self.identity, self.layout, config.resume, self.world)
        shortest = min(kind.latent_chunk_size for _, kind in config.objective.kinds())
        heads = shape_of(config, batches.channels).spec.num_heads
        seconds = config.launch.timeout_seconds
        self.sequence = join_sequence(self.world, config.sequence_parallel, heads, shortest, seconds)
        self.step, self.saved = 0, -1
        self.pending: Pending | None = None
        self.interval = self._interval()
        self.records = Records(self.run_dir, config.trackers, to_dict(config)) if self.world.first else None
        looked_at = config.profile_steps if self.world.first and config.profile_steps else (0, 0)
        steps = (looked_at[0], looked_at[1])
        self.profiler = Profiler(self.run_dir, steps, self.world.rank, lambda: self.interval.paused())
        self.validation = Validation.of(config.validation, batches, self.world, self.sequence)
        home = torch.device("cpu") if config.zero.offload != "none" else None
        with self._memory_advice():
            convert = found is not None and found.convert
            self.engine = start_engine(config, batches.channels, parts.vocabulary, self.world, convert)
            self.average = Average(self.engine.module, config.optimizer.ema_decay, home)
            if found is not None:
                settings = group_settings(self.engine.optimizer.param_groups)
                self.step = self.saved = saves.load(self.engine, self.average, folder, found, self.world)
                keep_settings(self.engine.optimizer.param_groups, settings)
                logger.info("going on at step %d", self.step)

    def run(self, end: float) -> bool:
        """Trains until ``end`` (monotonic clock) or the last step; True when all steps are done."""
        config, every = self.config, self.config.sheet_every_seconds
        saved = drawn = time.monotonic()
        self.interval = self._interval()  # what was before, building the model, is no time of steps
        while self.step < config.optimizer.total_steps:
            loaded, now, first = self.load(), time.monotonic(), self.world.first
            if first and self.asked():
                self.stop()
            # What clocks and signals say is decided once for all; the processes' hosts ask, their devices go on.
            failed, stop, save, sheet = self.world.told(
                loaded.fault is not None,
                self.stopping or (first and now >= end),
                first and now - saved > config.checkpoint_every_seconds,
                first and every > 0 and now - drawn > every,
            )
            if failed:
                self._keep()
                refuse(loaded, f"step {self.step}", self.world)
            if stop:
                break
            self.profiler.before(self.step)
            self.train_step(loaded)
            self.profiler.after(self.step - 1)
            if self.step % config.log_every_steps == 0:
                self._log()
            if self.validation is not None and self.step % config.validation.every_steps == 0:
                self._validate()
            if save or (config.keep_every_steps and self.step % config.keep_every_steps == 0):
                self.save()
                saved = time.monotonic()
            if sheet:
                self.sheet()
                drawn = time.monotonic()
        self.profiler.close()
        self.save()
        self._log_rest()  # not before the folder is known to be this run's still
        if self.records is not None:
            self.records.close()
        return self.step >= config.optimizer.total_steps

    def stop(self) -> None:
        """Ends :meth:`run` after the step that is under way; any process may be told."""
        self.stopping = True

    def train_step(self, loaded: Loaded | None = None) -> dict[str, Any]:
        """One optimizer step on one batch.

        Args:
            loaded: this process' part, that all processes have agreed on. What the step shows is looked at a step
                later then, so that nothing waits for the device. None loads it, and looks at once.

        Returns:
            What the log would show of the step, or nothing yet; losses are means over all processes.

        Raises:
            EngineError: the loss or the gradient of this step, or of the one before, is no number, the device's memory
                is full, or another process cannot load its part of the batch; the last checkpoint is kept.
            PAVDMError: this process cannot.
        """
        interval = self._interval() if loaded is None else None
        if loaded is None:
            loaded = self.load()
            if self.world.told(loaded.fault is not None)[0]:
                refuse(loaded, f"step {self.step}", self.world)
        pending = self._advance(loaded)
        self._settle()
        self.pending = pending
        if interval is None:
            return {}
        self._settle(interval)
        return interval.line()

    def _advance(self, loaded: Loaded) -> Pending:
        """Passes, the optimizer's step and the average; what they show is on its way."""
        rate = self.config.optimizer.lr * self._rate()
        for parameters in self.engine.optimizer.param_groups:
            parameters["lr"] = rate
        parts = self.config.optimizer.accumulation
        with self._memory_advice():
            pending = advance(self.engine, loaded, self.step, parts, self.world, self.sequence)
            self.average.update(self.engine.module)
        self.step += 1
        return pending

    def _settle(self, interval: Interval | None = None) -> None:
        """Looks at what the last step has shown, if nobody has; every process must call it.

        Raises:
            EngineError: its loss or its gradient is no number.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            (interval or self.interval).add(settle(pending, self.world))

    def _interval(self) -> Interval:
        return Interval(self.world.device, self.config.peak_tflops or peak_tflops(self.world.device))

    def load(self) -> Loaded:
        """This process' part of the next step's batch, or why it has none."""
        return load(self.batches, self.step, self.sequence)

    @contextmanager
    def _memory_advice(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise EngineError(memory_advice(self.config, self.step, self.world.size)) from error

    def save(self) -> None:
        """Writes a checkpoint; every process must call it.

        Raises:
            EngineError: it cannot be written, or the folder is another run's by now; the last checkpoint is kept.
        """
        config = self.config
        self._settle()  # weights that are no numbers are never written
        if self.step == self.saved:  # nothing happened since
            return
        if faults := self.world.faults(self.guard()):
            raise EngineError(f"{faults[0]}; nothing more is written there")
        folder, keep = self.run_dir / CHECKPOINTS, (config.keep_last, config.keep_every_steps)
        about = (self.step, self.identity, self.layout, self.world, *keep)
        with self.interval.paused():
            saving.save(self.engine, self.average, folder, *about)
        self.saved = self.step

    def _keep(self) -> None:
        """Saves before a fault ends the run that is none of the weights'; every process must call it."""
        if not self.step:
            return
        try:
            self.save()
            self._log_rest()
        except EngineError as error:  # on every process; what ends the run is still to be said
            logger.warning("the steps since the last checkpoint are lost: %s", error)
        else:
            logger.info("saved at step %d", self.step)

    def whole_weights(self, averaged: bool = True, frozen: bool = True) -> dict[str, Tensor]:
        """State dict of whole tensors on the first process, empty on the others; every process must call it."""
        average = self.average if averaged else None
        return whole_tensors(self.engine.module, self.world, average, self.world.first, frozen)

    def export(self, folder: Path) -> None:
        """Writes a whole model folder, readable by ``pavdm sample model=FOLDER``, or the folder of a LoRA.

        Every process must call it.

        Raises:
            EngineError: it cannot be written.
        """
        self._settle()
        frozen = not self.config.model.lora.rank  # changes are exported alone
        weights = self.whole_weights(self.config.export_weights == "average", frozen)
        fault = None
        if self.world.first:
            try:
                with disk_errors():
                    export_model(self.config, weights, self.batches.channels, self.parts, folder, self.step)
            except OSError as error:
                reason = f"export={folder}: cannot be written: {error.strerror or error}"
                fault = f"{reason}; the checkpoint is kept, make room and run again to export it"
            except ConfigError as error:  # what has come to be there since the run began
                fault = f"{error}; the checkpoint is kept, run again to export it"
        if faults := self.world.faults(fault):
            raise EngineError(faults[0])

    def sheet(self) -> None:
        """Draws a contact sheet of sampled videos with the averaged weights; every process must call it."""
        from pavdm_dist.train.sheets import draw_sheet

        self._settle()
        with self.interval.paused():
            weights = self.whole_weights()
            if self.world.first:
                path = self.run_dir / "sheets" / f"step{self.step:07d}.png"
                # The others wait, and must not take this process for lost.
                seconds = math.inf if self.world.size == 1 else 0.5 * self.config.launch.timeout_seconds
                about = (self.config, weights, self.batches.channels, self.parts)
                try:
                    draw_sheet(*about, path, self.world.device, seconds)
                except Exception:  # a picture is not worth a run
                    logger.exception("no contact sheet at step %d", self.step)
            self.world.wait()

    def _log(self) -> None:
        """Writes what the steps since the last line have shown; every process must call it."""
        self._settle()
        line, self.interval = self.interval.line(), self._interval()
        self._write(line)
        if self.world.first:
            shown = (self.step, line["loss"], line["seconds_per_step"], line["tokens_per_second"])
            logger.info("step %d: loss %.4f, %.3g s a step, %.0f tokens/s", *shown)

    def _log_rest(self) -> None:
        """As :meth:`_log` at the end, where there was a step since the last line."""
        self._settle()
        if self.interval.count:
            self._log()

    def _validate(self) -> None:
        """Measures the loss on clips that are not trained on; every process must call it."""
        assert self.validation is not None
        self._settle()
        with self.interval.paused(), self._memory_advice():
            line = self.validation.line(self.engine, self._keep)
        self._write(line)
        if self.world.first:
            logger.info("step %d: validation loss %.4f", self.step, line["validation"]["loss"])

    def _write(self, line: dict[str, Any]) -> None:
        if self.report is not None:
            self.report({"step": self.step, **line})
        if self.records is not None:
            self.records.write(self.step, line)

    def _rate(self) -> float:
        """Linear warm-up, then cosine to ``final_ratio``."""
        o = self.config.optimizer
        if self.step < o.warmup_steps:
            return (self.step + 1) / o.warmup_steps
        share = (self.step - o.warmup_steps) / max(o.total_steps - o.warmup_steps, 1)
        return o.final_ratio + (1 - o.final_ratio) * 0.5 * (1 + math.cos(math.pi * min(share, 1)))
