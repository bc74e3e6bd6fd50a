"""How many connections a server holds: each is an open file, and those who render need files, too."""

from __future__ import annotations

import asyncio
import resource
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

# How long somebody who is connected may ask for nothing.
SILENCE_S = 10.0
# Files that this process may have open, where the system lets it: some programs count up to that number.
_FILES = 65_536
# Connections at once, whatever that is; and which part of it they may be: a viewer's has a file besides.
_MOST, _PART = 4096, 4


def most_connections() -> int:
    """Lets this process have as many files open as it may; how many of them connections may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft == resource.RLIM_INFINITY:
        return _MOST
    if soft < wanted:
        with suppress(ValueError, OSError):  # a system whose hard limit is not the last word
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return max(1, min(_MOST, soft // _PART))


def bounded(most: int, silence_s: float = SILENCE_S) -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1 with bounds.

    Args:
        most: connections at once, those of WebSockets included; others are closed as they come.
        silence_s: seconds after which one is closed that has sent no whole head of a request, or none since its last
            answer.
    """

    class Bounded(H11Protocol):
        _silence: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.abort()
            else:
                self._await_request()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._await_request()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._forget_silence()

        def _await_request(self) -> None:
            self._forget_silence()
            self._silence = self.loop.call_later(silence_s, self._end_silence)

        def _forget_silence(self) -> None:
            if self._silence is not None:
                self._silence.cancel()

        def _end_silence(self) -> None:
            cycle: Any = self.cycle
            is_websocket = self.transport.get_protocol() is not self
            if not is_websocket and (cycle is None or cycle.response_complete):
                self.transport.close()

    return Bounded
