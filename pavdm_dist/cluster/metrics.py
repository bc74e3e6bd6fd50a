"""Numbers that Ray exports for Prometheus on every node; those of a process in no cluster go nowhere."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


class Meters:
    """Counters and gauges by name, made as they are first used.

    Args:
        about: by name, what each means; other names are refused.
        labels: names of what is told with every value.
    """

    def __init__(self, about: Mapping[str, str], labels: tuple[str, ...] = ()) -> None:
        self._about, self._labels = about, labels
        self._made: dict[str, Any] = {}

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Counts on."""
        if amount and (meter := self._meter(name, "Counter")) is not None:
            meter.inc(amount, tags=self._told(labels))

    def set(self, name: str, value: float, **labels: str) -> None:
        """Says how much it is now."""
        if (meter := self._meter(name, "Gauge")) is not None:
            meter.set(value, tags=self._told(labels))

    def _told(self, labels: Mapping[str, str]) -> dict[str, str]:
        return {name: labels.get(name, "") for name in self._labels}

    def _meter(self, name: str, kind: str) -> Any:
        import ray

        if not ray.is_initialized():
            return None
        if name not in self._made:
            from ray.util import metrics

            make = getattr(metrics, kind)
            self._made[name] = make(name, description=self._about[name], tag_keys=self._labels)
        return self._made[name]
