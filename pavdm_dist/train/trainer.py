"""The training run: steps, checkpoints that it goes on from, and the model that comes out.

One or more processes under the DeepSpeed engine. Every batch is a function of (seed, step), so a resumed run sees
the data an unbroken one would, whatever the number of processes.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.errors import EngineError
from pavdm_dist.io.storage import disk_errors
from pavdm_dist.merging import to_dict
from pavdm_dist.train import saves, saving
from pavdm_dist.train.average import Average, whole_tensors
from pavdm_dist.train.batches import Batch, Batches
from pavdm_dist.train.checks import check_settings, memory_advice
from pavdm_dist.train.export import Parts, export_model
from pavdm_dist.train.loss import velocity_loss
from pavdm_dist.train.model import shape_of
from pavdm_dist.train.processes import World, join_world
from pavdm_dist.train.run_folder import CHECKPOINTS, Guard
from pavdm_dist.train.sequence import join_sequence
from pavdm_dist.train.settings import TrainConfig
from pavdm_dist.train.start import start_engine

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
    ) -> None:
        self.config, self.batches, self.parts, self.report, self.guard = config, batches, parts, report, guard
        self.stopping = False
        self.world = world or join_world(config.launch.timeout_seconds)
        check_settings(config, self.world.size)
        self.run_dir = Path(config.run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.layout = saves.SaveLayout(config.zero.stage, self.world.size)
        folder = self.run_dir / CHECKPOINTS
        found = saves.find(folder, self._identity(), self.layout, config.resume, self.world)
        shortest = min(kind.latent_chunk_size for _, kind in config.objective.kinds())
        heads = shape_of(config, batches.channels).num_heads
        self.sequence = join_sequence(self.world, config.sequence_parallel, heads, shortest)
        self.step, self.saved = 0, -1
        home = torch.device("cpu") if config.zero.offload != "none" else None
        with self._memory_advice():
            convert = found is not None and found.convert
            self.engine = start_engine(config, batches.channels, parts.vocabulary, self.world, convert)
            self.average = Average(self.engine.module, config.optimizer.ema_decay, home)
            if found is not None:
                self.step = self.saved = saves.load(self.engine, self.average, folder, found, self.world)
                logger.info("going on at step %d", self.step)

    def run(self, end: float) -> bool:
        """Trains until ``end`` (monotonic clock) or the last step; True when all steps are done."""
        config = self.config
        saved = drawn = time.monotonic()
        while self.step < config.optimizer.total_steps and self._goes_on(end):
            metrics = self.train_step()
            if self.step % config.log_every_steps == 0:
                self._log(metrics)
            kept = config.keep_every_steps and self.step % config.keep_every_steps == 0
            if kept or self.world.agree(time.monotonic() - saved > config.checkpoint_every_seconds):
                self.save()
                saved = time.monotonic()
            every = config.sheet_every_seconds
            if every and self.world.agree(time.monotonic() - drawn > every):
                self.sheet()
                drawn = time.monotonic()
        self.save()
        return self.step >= config.optimizer.total_steps

    def stop(self) -> None:
        """Ends :meth:`run` after the step that is under way; any process may be told."""
        self.stopping = True

    def _goes_on(self, end: float) -> bool:
        """Whether the first process' clock says so, and nobody was told to stop."""
        stop = torch.tensor([float(self.stopping or (self.world.first and time.monotonic() >= end))])
        return float(self.world.mean(stop.to(self.world.device))) == 0

    def train_step(self) -> dict[str, Any]:
        """One optimizer step on one batch.

        Returns:
            What the log shows; losses are means over all processes.

        Raises:
            EngineError: the loss or the gradient is no number, the device's memory is full, or another process cannot
                load its part of the batch; the last checkpoint is kept.
            PAVDMError: this process cannot.
        """
        started, o = time.monotonic(), self.config.optimizer
        for group in self.engine.optimizer.param_groups:
            group["lr"] = o.lr * self._rate()
        group = self.sequence
        batch = self._loaded()
        samples, frames = group.data_size * len(batch.dropped), batch.levels.shape[1]
        batch = group.cut(batch)
        loaded = time.monotonic() - started
        with self._memory_advice():
            passes = [self._backward(part, o.accumulation) for part in batch.parts(o.accumulation)]
            norm = passes[-1][1]
            self._refuse_gradient(norm)
            sums = sum(found for found, _ in passes)
            assert isinstance(sums, Tensor)
            mean = self.world.mean(sums).cpu()
            self.average.update(self.engine.module)
        self.step += 1
        per_level = [None if count == 0 else value / count for value, count in mean[1:].view(2, 5).T.tolist()]
        return {
            "loss": mean[0].item(),
            "per_level": per_level,
            "causal": batch.chunk_causal is not None,
            "frames": frames,
            "size": [batch.info.height, batch.info.width],
            "grad_norm": norm,
            "lr": self.engine.optimizer.param_groups[0]["lr"],
            "samples_per_second": samples / (time.monotonic() - started),
            "loading_seconds": loaded,
        }

    def _backward(self, batch: Batch, parts: int) -> tuple[Tensor, float | None]:
        """Forward and backward pass of one part, and after the last one the optimizer's step.

        Returns:
            ``[loss, summed error of five bands of levels, their counts]``; the last part's the gradient's norm too.
        """
        batch = batch.to(self.world.device)
        given = (batch.text, batch.dropped, batch.info, batch.chunk_causal, batch.window)
        velocity = self.engine.forward(batch.x, batch.levels, *given)
        about = (batch.levels, batch.context, batch.window, self.sequence.size)
        loss, sums, counts = velocity_loss(velocity.float(), batch.target, *about)
        self._refuse_nan(loss, batch)
        self.engine.backward(loss)
        return torch.cat([loss.detach()[None] / parts, sums, counts]), self.engine.step()

    def _loaded(self) -> Batch:
        """This process' part of the step's batch; where another cannot load its own, all end with a sentence."""
        group = self.sequence
        batch, fault = None, None
        try:
            batch = self.batches.batch(self.step, group.data_rank, group.data_size)
        except Exception as error:  # whatever it is, the others must hear of it
            fault = error
        told = torch.tensor([float(fault is not None)], device=self.world.device)
        if self.world.mean(told) > 0 and self.world.size > 1:
            reasons = self.world.gather(None if fault is None else f"{type(fault).__name__}: {fault}")
            first = next((rank, text) for rank, text in enumerate(reasons) if text is not None)
            if fault is None:
                raise EngineError(f"process {first[0]} cannot load step {self.step} ({first[1]})")
        if fault is not None:
            raise fault
        assert batch is not None
        return batch

    def _refuse_gradient(self, norm: float | None) -> None:
        """Ends every process when the gradient, of which all know the norm, is no number."""
        if norm is not None and not math.isfinite(norm):
            raise EngineError(
                f"the gradient is no number at step {self.step} although the loss is one; the last checkpoint is kept: "
                "lower optimizer.lr, or set optimizer.grad_clip"
            )

    @contextmanager
    def _memory_advice(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise EngineError(memory_advice(self.config, self.step, self.world.size)) from error

    def _refuse_nan(self, loss: Tensor, batch: Batch) -> None:
        """Ends every process when any loss is no number, before it reaches the weights."""
        bad = (~torch.isfinite(loss.detach())).float()[None]
        if self.world.mean(bad) == 0:
            return
        mine = batch.ids if not torch.isfinite(loss) else []
        every = self.world.gather(mine) if self.world.size > 1 else [mine]
        ids = [name for part in every for name in part]  # type: ignore[attr-defined]
        raise EngineError(
            f"the loss is no number at step {self.step}, in a batch with {ids}; the last checkpoint is kept: "
            "look at these clips, or lower optimizer.lr"
        )

    def save(self) -> None:
        """Writes a checkpoint; every process must call it.

        Raises:
            EngineError: it cannot be written, or the folder is another run's by now; the last checkpoint is kept.
        """
        config = self.config
        if self.step == self.saved:  # nothing happened since
            return
        if faults := self.world.faults(self.guard()):
            raise EngineError(f"{faults[0]}; nothing more is written there")
        folder, keep = self.run_dir / CHECKPOINTS, (config.keep_last, config.keep_every_steps)
        saving.save(self.engine, self.average, folder, self.step, self._identity(), self.layout, self.world, *keep)
        self.saved = self.step

    def whole_weights(self, averaged: bool = True) -> dict[str, Tensor]:
        """State dict of whole tensors on the first process, empty on the others; every process must call it."""
        average = self.average if averaged else None
        return whole_tensors(self.engine.module, self.world, average, keep=self.world.first)

    def export(self, folder: Path) -> None:
        """Writes a whole model folder with averaged weights, readable by ``pavdm sample model=FOLDER``.

        Every process must call it.

        Raises:
            EngineError: it cannot be written.
        """
        weights = self.whole_weights(self.config.export_weights == "average")
        fault = None
        if self.world.first:
            try:
                with disk_errors():
                    export_model(self.config, weights, self.batches.channels, self.parts, folder, self.step)
            except OSError as error:
                fault = f"export={folder}: cannot be written: {error.strerror or error}"
        if faults := self.world.faults(fault):
            raise EngineError(f"{faults[0]}; the checkpoint is kept, make room and run again to export it")

    def sheet(self) -> None:
        """Draws a contact sheet of sampled videos with the averaged weights; every process must call it."""
        from pavdm_dist.train.sheets import draw_sheet

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

    def _log(self, metrics: dict[str, Any]) -> None:
        line = {"step": self.step, **metrics}
        if self.report is not None:
            self.report(line)
        if not self.world.first:
            return
        try:
            with open(self.run_dir / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a line is not worth a run
            logger.warning("step %d is not logged: %s", self.step, error)
        logger.info("step %d: loss %.4f, %.1f clips/s", self.step, metrics["loss"], metrics["samples_per_second"])

    def _rate(self) -> float:
        """Linear warm-up, then cosine to ``final_ratio``."""
        o = self.config.optimizer
        if self.step < o.warmup_steps:
            return (self.step + 1) / o.warmup_steps
        share = (self.step - o.warmup_steps) / max(o.total_steps - o.warmup_steps, 1)
        return o.final_ratio + (1 - o.final_ratio) * 0.5 * (1 + math.cos(math.pi * min(share, 1)))

    def _identity(self) -> dict[str, Any]:
        """What a run must not change on the way: the data and its order, the model and the objective."""
        settings = to_dict(self.config)
        data = {name: settings["data"][name] for name in ("pixels", "batch_size", "batch_sizes")}
        return {
            **self.batches.identity,
            "run": {"seed": self.config.seed},
            "data": data,
            "model": settings["model"],
            "objective": settings["objective"],
            "optimizer": {"name": self.config.optimizer.name},
        }
