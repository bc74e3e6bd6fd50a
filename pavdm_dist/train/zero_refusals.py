"""What DeepSpeed itself does not take of a user's settings of it, in one sentence that names them."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from traceback import walk_tb
from types import TracebackType
from typing import Any

from pavdm_dist.errors import ConfigError, PAVDMError
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.zero_settings import deepspeed_json, flat

logger = logging.getLogger(__name__)


class _Read(dict[str, Any]):
    """Settings that know which of their names were asked for, there or not, by all copies."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def keys(self) -> Any:
        """Itself, as some names are looked for in here."""
        return self


def check_known(settings: Mapping[str, Any]) -> None:
    """Refuses names at the top that DeepSpeed does not ask for when it reads its settings.

    It refuses what it does not know within its sections, and passes over it at the top; it has no list of what it
    knows. The processes must be connected.

    Raises:
        ConfigError: naming them, and the nearest that it has asked for.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    # Not those of the engine, which puts what it was given into every checkpoint.
    read = _Read(settings)
    DeepSpeedConfig(read)
    for name in sorted(set(settings) - read.names):
        near = difflib.get_close_matches(name, read.names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"deepspeed.{name}={settings[name]}: DeepSpeed has no setting of that name{hint}")


@contextmanager
def refusals(config: TrainConfig) -> Iterator[None]:
    """DeepSpeed's refusals of what a user's settings of it say, as one sentence; other faults stay as they are.

    DeepSpeed has no list of what it knows: it says so when its engine is made.

    Raises:
        ConfigError: naming the settings that it does not take.
    """
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        yield
    except PAVDMError:
        raise
    except (DeepSpeedConfigError, ValueError, TypeError, AssertionError, AttributeError, NotImplementedError) as error:
        from pydantic import ValidationError  # which DeepSpeed has read its settings with

        theirs = deepspeed_json(config)
        given = {**flat(theirs), **{name: value for name, value in theirs.items() if value == {}}}
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason, field = first["msg"], ".".join(map(str, first["loc"]))
            wrong = [name for name in given if f".{name}.".endswith(f".{field}.")]
        else:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            concerned = _concerned(given, error.__traceback__)
            wrong = _quoted(given, reason) if concerned else []
            if not wrong and concerned:
                logger.warning("in full, as it may have other causes than these settings", exc_info=error)
                wrong = concerned
        if not wrong:
            raise
        named = ", ".join(f"deepspeed.{name}={given[name]}" for name in wrong)
        raise ConfigError(f"{named}: DeepSpeed does not take that: {reason}") from error


def _quoted(given: dict[str, Any], reason: str) -> list[str]:
    """Those of the settings, or of the sections, that a reason quotes, by name or value."""
    words = set(re.findall(r"[\w-]+", reason))
    return [
        name
        for name, value in given.items()
        if any(f"'{part}'" in reason for part in (name.rpartition(".")[2], name.partition(".")[0]))
        or (isinstance(value, str) and value in words)
    ]


def _concerned(given: dict[str, Any], trace: TracebackType | None) -> list[str]:
    """Those of the optimizer, where DeepSpeed was making it, or else all; none where the fault is not DeepSpeed's."""
    frames = [frame for frame, _ in walk_tb(trace) if frame.f_globals.get("__name__", "").startswith("deepspeed.")]
    making = any(frame.f_code.co_name == "_configure_basic_optimizer" for frame in frames)
    return [name for name in given if frames and (not making or name.startswith("optimizer."))]
