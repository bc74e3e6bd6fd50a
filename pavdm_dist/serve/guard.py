"""What stands before the routes: who may come in, from where, and with how much."""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pavdm_dist.serve.refusals import error_body
from pavdm_dist.serve.settings import is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# What the page keeps the token in; scripts of other pages can neither read nor send it.
COOKIE = "pavdm_token"
# Needed before a token can be: whether the server lives, and the page that asks for one.
_OPEN = re.compile(r"/health|/|/page\.(js|css)|/login")


class Guard:
    """Refuses requests that are not for the routes behind it.

    Args:
        app: what is guarded.
        token: what clients must have; None = nothing.
        loopback_only: the server listens to this machine alone: what a browser sends for another name is refused (a
            name that an attacker lets lead to 127.0.0.1).
        max_body: bytes of a request's body.

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
        if scope["type"] == "websocket":
            return await self._app(scope, receive, send)
        await self._app(scope, self._limited(receive), send)

    def _refused(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if self._loopback_only and not is_loopback(host.rpartition(":")[0] if re.search(r":\d+$", host) else host):
            return 403, f"this server is for this machine alone, and not for {host[:100]!r}; set http.host to open it"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "a page of another site may not use this server"
        if self._token is not None and not _OPEN.fullmatch(scope["path"]) and not self._may(scope, headers):
            return 401, "the token is missing or wrong; send it as Authorization: Bearer TOKEN"
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return 400, f"Content-Length: {length[:100]!r} is no number"
        if int(length) > self._max_body:
            return 413, self._too_large
        return None

    def _may(self, scope: Scope, headers: dict[str, str]) -> bool:
        assert self._token is not None
        given = [headers.get("authorization", "").removeprefix("Bearer ").strip()]
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        given += [] if cookie is None else [cookie.value]
        if scope["type"] == "websocket":  # which scripts cannot give headers to
            given += parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        return any(hmac.compare_digest(one.encode(), self._token.encode()) for one in given)

    @property
    def _too_large(self) -> str:
        return f"a request may have {self._max_body / 2**20:g} MiB at most (http.max_body_mib)"

    def _limited(self, receive: Receive) -> Receive:
        """A body that says nothing of its length is counted as it comes."""
        taken = 0

        async def limited() -> MutableMapping[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_body:
                raise TooLarge(self._too_large)
            return message

        return limited


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
