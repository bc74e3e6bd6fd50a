"""How many connections a server holds, and how long: each is an open file, and those who render need files, too."""

from __future__ import annotations

import asyncio
import fcntl
import resource
import struct
import termios
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from pavdm_dist.serve.guard import ADMIT

# How long a client may keep the server waiting; and one that may come in, with reading: a person may pause a video.
SILENCE_S, PAUSE_S = 10.0, 600.0
# Looks in that time after who keeps it waiting.
_LOOKS = 4
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


def bounded(most: int, silence_s: float = SILENCE_S, pause_s: float = PAUSE_S) -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1 with bounds.

    A connection is known once somebody has asked on it for what only those get who may come in.

    Args:
        most: connections at once, those of WebSockets included. When one more comes, the oldest of those goes that are
            not known, which may be the new one itself.
        silence_s: seconds after which one is closed that has sent no whole head of a request, or none since its last
            answer; that has sent nothing more of a body; or that has read nothing more of what it is sent. At most a
            quarter more.
        pause_s: the same for reading, of one that is known.
    """
    unknown: dict[Bounded, None] = {}  # the oldest first

    class Bounded(H11Protocol):
        app_state: dict[str, Any]

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._received, self._answers = 0, 0
            self._awaited, self._since = self._await(), self.loop.time()
            self._timer = self.loop.call_later(silence_s / _LOOKS, self._look)
            self.app_state = {**self.app_state, ADMIT: self._forget}
            unknown[self] = None
            if len(self.connections) > most:
                oldest = next(iter(unknown))
                oldest._forget()
                oldest.transport.abort()

        def data_received(self, data: bytes) -> None:
            self._received += len(data)
            super().data_received(data)

        def on_response_complete(self) -> None:
            self._answers += 1
            super().on_response_complete()

        def handle_websocket_upgrade(self, event: Any) -> None:
            """From here on it is another protocol's, which asks by pings whether somebody is there."""
            super().handle_websocket_upgrade(event)
            self._timer.cancel()
            self._forget()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._timer.cancel()
            self._forget()

        def _forget(self) -> None:
            unknown.pop(self, None)

        def _look(self) -> None:
            awaited, now = self._await(), self.loop.time()
            if awaited is None or awaited != self._awaited:
                self._awaited, self._since = awaited, now
            elif now - self._since >= (pause_s if awaited[0] == "read" and self not in unknown else silence_s):
                # At once: an orderly end would wait for all to be read.
                self.transport.abort()
            self._timer = self.loop.call_later(silence_s / _LOOKS, self._look)

        def _await(self) -> tuple[str, int] | None:
            """What the client is to do, and a number that changes as it does; None while only the server is at work."""
            cycle: Any = self.cycle
            if unread := self._unread():
                return "read", unread
            if cycle is None or cycle.response_complete:
                return "ask", self._answers
            if cycle.more_body and not self.flow.read_paused and not cycle.waiting_for_100_continue:
                return "send", self._received
            return None

        def _unread(self) -> int:
            """Bytes that the client's system has not taken yet, of those that this one holds, too, where it says so."""
            held = 0
            with suppress(OSError, ValueError):
                file = self.transport.get_extra_info("socket").fileno()
                (held,) = struct.unpack("i", fcntl.ioctl(file, termios.TIOCOUTQ, bytes(4)))
            return self.transport.get_write_buffer_size() + held

    return Bounded
