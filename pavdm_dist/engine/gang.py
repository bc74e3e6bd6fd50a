"""What a driver needs of what computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from pavdm_dist.engine.events import Event
from pavdm_dist.engine.order import LogEntry
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import CleanChunk


class Gang(Protocol):
    """Stages (and a decoder) that work together, from their making to the first loss. All calls return at once.

    Every method may raise :class:`~pavdm_dist.engine.events.GangLost`.

    Attributes:
        decodes: whether there is a decoder.
        keep: latents that a decoder is warmed on to go on with a video; 0 without one.
        frames_per_latent: of the decoder, in the middle of a video.
    """

    @property
    def keep(self) -> int: ...

    @property
    def frames_per_latent(self) -> int: ...

    @property
    def decodes(self) -> bool: ...

    def prepare(self, stream: Stream, warm: Tensor | None) -> None:
        """Lets the stages take a stream in, if rows of it are left, and the decoder; when they have: ``Prepared``.

        Args:
            stream: what is sampled.
            warm: latents ``[C, n, h, w]`` that the decoder must have seen before the next chunk.
        """

    def seal(self, epoch: int, entry: LogEntry) -> None:
        """Fixes what changes at an epoch; epochs are sealed in order."""

    def decode(self, stream: int, clean: CleanChunk) -> None:
        """Hands a stream's next chunk to the decoder; ``Decoded`` follows, in the order of these calls."""

    def renew_decoder(self, warm: Mapping[int, Tensor | None]) -> None:
        """Puts another decoder in the place of one that was lost, with these streams open, warmed on these latents."""

    def forget(self, stream: int) -> None:
        """Drops what the decoder holds of a stream, also what waits for it; no ``Decoded`` of it follows."""

    def poll(self, timeout: float) -> list[Event]:
        """What has happened; waits up to ``timeout`` seconds for the first event."""
