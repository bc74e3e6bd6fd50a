"""The loss on clips that are not trained on: the same windows, levels and noise every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.errors import ConfigError
from pavdm_dist.train.batch import Batches
from pavdm_dist.train.interval import by_kind, per_level
from pavdm_dist.train.loss import velocity_loss
from pavdm_dist.train.ranks import World
from pavdm_dist.train.sequence import SequenceGroup
from pavdm_dist.train.steps import load, refuse
from pavdm_dist.train.train_settings import ValidationConfig
from pavdm_dist.train.zero import ZeroEngine


class Validation:
    """Looks at a fixed row of batches.

    Args:
        batches: of held-out clips; their first ones are looked at.
        count: how many.
        world: all processes.
        sequence: those that share windows.
    """

    def __init__(self, batches: Batches, count: int, world: World, sequence: SequenceGroup) -> None:
        self._batches, self._count, self._world, self._sequence = batches, count, world, sequence

    @classmethod
    def of(cls, config: ValidationConfig, batches: Batches, world: World, sequence: SequenceGroup) -> Validation | None:
        """As the settings ask for it; None where they do not.

        Raises:
            ConfigError: no clips are held out.
        """
        cls.check(config, batches.held_out is not None)
        if not config.every_steps or batches.held_out is None:
            return None
        return cls(batches.held_out, config.batches, world, sequence)

    @staticmethod
    def check(config: ValidationConfig, held_out: bool) -> None:
        """Refuses what is to be looked at and is not there.

        Raises:
            ConfigError: no clips are held out.
        """
        if config.every_steps and not held_out:
            raise ConfigError(
                f"validation.every_steps={config.every_steps}: no clips are held out; with data.folder"
                " validation.clips=N leaves N of each bucket out of training"
            )

    @torch.no_grad()
    def line(self, engine: ZeroEngine, before_refusal: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The mean loss, per level and per kind of window; every process must call it.

        Args:
            engine: the model.
            before_refusal: called by every process where a batch cannot be loaded, which ends them all.

        Raises:
            EngineError: another process cannot load its part of a batch.
            PAVDMError: this one cannot.
        """
        values, kinds = list[Tensor](), list[str]()
        with engine.evaluating():
            for number in range(self._count):
                loaded = load(self._batches, number, self._sequence)
                # As in training: the others must not wait for a process that has nothing to show.
                if self._world.told(loaded.fault is not None)[0]:
                    before_refusal()
                    refuse(loaded, f"validation batch {number}", self._world)
                batch = loaded.batch
                assert batch is not None
                kinds.append(batch.kind if batch.chunk_causal is None else f"{batch.kind} causal")
                batch = self._sequence.cut(batch).to(self._world.device)
                given = (batch.text, batch.dropped, batch.info, batch.chunk_causal, batch.window)
                velocity = engine.forward(batch.x, batch.levels, *given)
                about = (batch.levels, batch.context, batch.window, self._sequence.size)
                loss, sums, counts = velocity_loss(velocity.float(), batch.target, *about)
                values.append(torch.cat([loss[None], sums, counts]))
        mean = self._world.mean(torch.stack(values)).cpu()
        found = {"loss": float(mean[:, 0].mean()), "per_level": per_level(mean.sum(dim=0))}
        return {"validation": {**found, "kinds": by_kind(zip(kinds, mean[:, 0].tolist(), strict=True))}}
