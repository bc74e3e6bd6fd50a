"""What renderers and the pool that they belong to say to each other, and whose fault an error is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from pavdm_dist.engine.events import AtWork
from pavdm_dist.errors import ConfigError, EngineError, PAVDMError, StalledError, TakenError
from pavdm_dist.farm.shot import Shot
from pavdm_dist.io.state import BegunOtherwiseError
from pavdm_dist.redaction import hide_secrets
from pavdm_dist.request.outputs import VideoChunk

if TYPE_CHECKING:
    from pavdm_dist.farm.renderer import Renderer

logger = logging.getLogger(__name__)

End = Literal["done", "failed", "again", "aside", "unfit", "cancelled", "saved"]


@dataclass(frozen=True)
class Ended:
    """What became of a shot that a renderer was given.

    Attributes:
        how: ``done``; ``failed`` for good; ``again``: through no fault of its own; ``aside``: another process has it;
            ``unfit``: it was begun by other versions, on other devices or with other settings than there are here, and
            stays begun for where these are; ``cancelled``; ``saved``: the renderer was told to end.
        kind: see :class:`~pavdm_dist.farm.tree.Failure`; ``elsewhere``: another process did it; ``otherwise``: another
            process has completed it, but not as it is asked for here; ``versions``: of an unfit one, only these
            differ.
        error: why, of the middle four; of a saved one, why its newest state is not.
        frames: that it gave here.
    """

    how: End
    kind: str = ""
    error: str = ""
    frames: int = 0

    @property
    def counted(self) -> str:
        """As what it counts: failures that are no fault of a shot count apart."""
        return self.kind if self.how == "failed" and self.kind in ("otherwise", "unfit") else self.how


@dataclass(frozen=True)
class Sight:
    """What can be seen of a shot that is being rendered.

    Attributes:
        at: where it is.
        shots: by the number of a stage's unit, the shots in this renderer's hands.
    """

    at: AtWork
    shots: Mapping[int, str]


class Desk(Protocol):
    """Where a renderer gets shots and says what became of them. Called from threads of the renderer's."""

    def take(self, renderer: Renderer) -> Shot | None:
        """The next shot, waited for; None = there will be none any more for this renderer."""

    def is_free(self, shot: Shot) -> bool:
        """Whether no other process holds it, as far as can be seen."""

    def begun(self, renderer: Renderer, shot: Shot, chunk: int, video: int) -> None:
        """It is this renderer's, which goes on at ``chunk`` and calls it by that number."""

    def grew(self, renderer: Renderer, shot: Shot, chunk: VideoChunk) -> None:
        """A chunk of it is written."""

    def ended(self, renderer: Renderer, shot: Shot, ended: Ended) -> None:
        """It is not this renderer's any more."""


class Listener:
    """Hears what happens to the shots of a pool, in threads of renderers; each call holds its renderer up."""

    def begun(self, shot: Shot, chunk: int) -> None:
        """A shot is rendered from now on, from ``chunk`` on."""

    def grew(self, shot: Shot, chunk: VideoChunk) -> None:
        """A chunk of it is written."""

    def ended(self, shot: Shot, ended: Ended) -> None:
        """It is done, or failed or cancelled for good, or goes back to the queue."""


def end_of(cause: BaseException, said: BaseException | None = None) -> Ended:
    """What becomes of a shot by an error: it fails, or goes to where it may do better.

    Args:
        cause: what was raised.
        said: its message in better words.
    """
    text = one_line(said or cause)
    if isinstance(cause, BegunOtherwiseError):  # nothing is wrong with it
        # Another version of this program may know of other facts besides.
        of_versions = all(name.startswith("versions.") for name in cause.names)
        is_upgrade = "versions.pavdm_dist" in cause.names or (bool(cause.names) and of_versions)
        return Ended("unfit", "versions" if is_upgrade else "", text)
    if isinstance(cause, TakenError):
        return Ended("aside", error=text)
    if isinstance(cause, StalledError):
        return Ended("again", "stalled", text)
    if isinstance(cause, OSError):
        return Ended("again", "storage", text)
    if isinstance(cause, EngineError):
        return Ended("again", "lost", text)
    if isinstance(cause, ConfigError):
        return Ended("failed", "input", text)
    if not isinstance(cause, PAVDMError):
        logger.error("a fault of this program", exc_info=cause)
    return Ended("failed", "video", text)


def one_line(error: BaseException | None) -> str:
    """All that an error says, for files: without secrets, and in characters that these can hold."""
    if error is None:
        return "its renderer ended"
    text = hide_secrets(" ".join(str(error).split()))
    return text.encode("utf-8", "backslashreplace").decode() or type(error).__name__
