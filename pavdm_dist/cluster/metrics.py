"""Numbers that Ray exports for Prometheus on every node; those of a process in no cluster go nowhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


class Meters:
    """Counters and gauges by name, made as they are first used.

    They are only looked at: one that cannot be told is warned of once, and costs whoever works nothing else.

    Args:
        about: by name, what each means; other names are refused.
        labels: names of what is told with every value.
    """

    def __init__(self, about: Mapping[str, str], labels: tuple[str, ...] = ()) -> None:
        self._about, self._labels = about, labels
        self._made: dict[str, Any] = {}
        self._failed: set[str] = set()

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Counts on."""
        if amount:
            self._tell("Counter", name, "inc", amount, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Says how much it is now."""
        self._tell("Gauge", name, "set", value, labels)

    def _tell(self, kind: str, name: str, how: str, value: float, labels: Mapping[str, str]) -> None:
        about = self._about[name]
        try:
            # Who has not imported Ray, or is just doing it, is in no cluster, and need not wait for it.
            is_in_cluster = getattr(sys.modules.get("ray"), "is_initialized", None)
            if is_in_cluster is None or not is_in_cluster():
                return
            if name not in self._made:
                from ray.util import metrics

                self._made[name] = getattr(metrics, kind)(name, description=about, tag_keys=self._labels)
            getattr(self._made[name], how)(value, tags={label: labels.get(label, "") for label in self._labels})
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                logger.warning("the meter %s cannot be told: %s: %s", name, type(error).__name__, error)
