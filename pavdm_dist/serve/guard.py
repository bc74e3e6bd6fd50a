"""What stands before the routes: who may come in, from where, and with how much."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from starlette.requests import ClientDisconnect, cookie_parser

from pavdm_dist.serve.refusals import error_body
from pavdm_dist.serve.settings import is_loopback
from pavdm_dist.serve.tokens import is_same

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# What the page keeps the token in, percent-encoded; scripts of other pages can neither read nor send it.
COOKIE = "pavdm_token"
# In the state of a request, where its connection wants to know: called once it is of somebody who may come in.
ADMIT = "pavdm_admit"
# Needed before a token can be: whether the server lives, and the page that asks for one.
_OPEN = re.compile(r"/health|/|/page\.(js|css)|/login")

# Of a token in a header, however it is written (RFC 7235).
_SCHEME = re.compile("^bearer +", re.IGNORECASE)

# Bytes of bodies: at the login, and of those that are read into memory; digits of a number of bytes that is none.
_LOGIN, _IN_MEMORY, _DIGITS = 4 * 2**10, 2**20, 18


class Guard:
    """Refuses requests that are not for the routes behind it.

    Args:
        app: what is guarded.
        token: what clients must have; None = nothing.
        loopback_only: the server listens to this machine alone: what a browser sends for another name is refused (a
            name that an attacker lets lead to 127.0.0.1).
        max_body: bytes of a request's body, where it is a multipart form.

    Raises:
        ValueError: an empty token, which a request without one would have.
    """

    def __init__(self, app: App, token: str | None, loopback_only: bool, max_body: int) -> None:
        if token is not None and not token.strip():
            raise ValueError("an empty token would let everybody in")
        self._app, self._token, self._loopback_only, self._max_body = app, token, loopback_only, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refused(scope, headers)
        if refused is not None:
            return await _refuse(scope, receive, send, *refused)
        if ADMIT in scope.get("state", {}) and not _OPEN.fullmatch(scope["path"]):
            scope["state"][ADMIT]()
        if scope["type"] == "websocket":
            return await self._app(scope, receive, send)
        try:
            await self._app(scope, self._limited(receive, *self._most(scope, headers)), send)
        except ClientDisconnect:  # in the middle of its request: nobody is there to be answered
            pass
        except Exception:
            # It was answered as far as possible; raised further it would end the connection, and requests behind it.
            logger.exception("a fault of this program")

    def _refused(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "").lower()  # names have no case
        if self._loopback_only and not is_loopback(host.rpartition(":")[0] if re.search(r":\d+$", host) else host):
            return 403, f"this server is for this machine alone, and not for {host[:100]!r}; set http.host to open it"
        origin = headers.get("origin")
        if origin is not None and _place(origin.lower()) != host:
            return 403, "a page of another site may not use this server"
        if self._token is not None and not _OPEN.fullmatch(scope["path"]) and not self._may(scope, headers):
            return 401, "the token is missing or wrong; send it as Authorization: Bearer TOKEN"
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return 400, f"Content-Length: {length[:100]!r} is no number"
        most, what = self._most(scope, headers)
        if len(length) > _DIGITS or int(length) > most:
            return 413, what
        return None

    def _most(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str]:
        """How many bytes a body may have, and what is said of a larger one.

        Only files are large, and they go to the disk as they come. All else is held in memory and read at once, which
        everybody else waits for; and what comes to the login is of anybody.
        """
        if scope["path"] == "/login":
            return _LOGIN, f"a login may have {_LOGIN // 2**10} KiB at most"
        is_form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        if not is_form and self._max_body > _IN_MEMORY:
            return _IN_MEMORY, f"a request that is no multipart form may have {_IN_MEMORY / 2**20:g} MiB at most"
        return self._max_body, f"a request may have {self._max_body / 2**20:g} MiB at most (http.max_body_mib)"

    def _may(self, scope: Scope, headers: dict[str, str]) -> bool:
        assert self._token is not None
        given = [_SCHEME.sub("", headers.get("authorization", "")).strip()]
        # Others on this host set cookies, too, of all kinds; what is none of ours must not hide ours.
        given.append(unquote(cookie_parser(headers.get("cookie", "")).get(COOKIE, "")))
        if scope["type"] == "websocket":  # which scripts cannot give headers to
            given += parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        return any(is_same(one, self._token) for one in given)

    @staticmethod
    def _limited(receive: Receive, most: int, what: str) -> Receive:
        """A body that says nothing of its length is counted as it comes."""
        taken = 0

        async def limited() -> MutableMapping[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                raise TooLarge(what)
            return message

        return limited


def _place(origin: str) -> str | None:
    """Host and port of an address; None of what is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


class TooLarge(Exception):
    """A body has more bytes than it may."""


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, message: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 4000 + status, "reason": message[:120]})
        return
    body = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 413:  # what is still on its way is not read
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
