"""What is asked of a run's streams while it runs: for those that are there or still to come, not for those that are
over, and never for those of another run."""

from __future__ import annotations

from pavdm_dist.errors import ConfigError
from pavdm_dist.method.stream import NewPrompt

# Streams that are over of which a run knows that it is too late to ask them for something.
_GONE = 10_000


def ended_by_a_later_run() -> ConfigError:
    """What whoever consumes a run is told when another one has taken its place."""
    return ConfigError("this run was ended by a later one on the same engine")


class Asked:
    """By stream id, ends, cancellations and prompts that were asked for and not yet handed on."""

    def __init__(self) -> None:
        self._stopping: set[int] = set()
        self._cancelled: set[int] = set()
        self._prompts: dict[int, list[NewPrompt]] = {}
        self._gone: dict[int, None] = {}  # the newest of those that are over

    def stop(self, stream: int) -> None:
        """An endless stream is to end after what is in flight."""
        if stream not in self._gone:
            self._stopping.add(stream)

    def cancel(self, stream: int) -> None:
        """A stream is to end where it is."""
        if stream not in self._gone:
            self._cancelled.add(stream)

    def set_prompt(self, stream: int, new: NewPrompt) -> None:
        """A stream is to follow another prompt."""
        if stream not in self._gone:
            self._prompts.setdefault(stream, []).append(new)

    def is_stopping(self, stream: int) -> bool:
        return stream in self._stopping

    def is_cancelled(self, stream: int) -> bool:
        return stream in self._cancelled

    def take_prompts(self, stream: int) -> list[NewPrompt]:
        """Prompts of a stream that were not taken before, in the order in which they were asked for."""
        return self._prompts.pop(stream, [])

    def comes(self, stream: int) -> None:
        """A stream has come: another one, where one of its id is over."""
        self._gone.pop(stream, None)

    def ends(self, stream: int) -> None:
        """A stream is over: nothing that was asked of it is for a later one of its id."""
        self._gone[stream] = None
        if len(self._gone) > _GONE:
            self._gone.pop(next(iter(self._gone)))
        self._stopping.discard(stream)
        self._cancelled.discard(stream)
        self._prompts.pop(stream, None)

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits to be handed on."""
        return not (self._stopping or self._cancelled or self._prompts)
