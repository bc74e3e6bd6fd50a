"""What stands before the routes of ``pavdm serve``: tokens, and how much a request may bring; without a model."""

from __future__ import annotations

import asyncio
import stat
from collections import deque
from collections.abc import MutableMapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.tree import Tree
from pavdm_dist.io import local_disk
from pavdm_dist.serve.request_fields import shot_of
from pavdm_dist.serve.tokens import TOKEN, TOKEN_FILE, token_of

if TYPE_CHECKING:
    from pavdm_dist.serve.guard import Receive, Scope, Send

guard = pytest.importorskip("pavdm_dist.serve.guard", reason="needs pavdm-dist[serve]")
ADMIT, COOKIE, Guard, TooLarge = guard.ADMIT, guard.COOKIE, guard.Guard, guard.TooLarge


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that does nothing."""


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
def test_one_token_is_made_for_all_servers_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    if not links:  # a share without hard links

        def refused(*_: object) -> None:
            raise OSError("no links here")

        monkeypatch.setattr(local_disk.os, "link", refused)
    tree = Tree(str(tmp_path / "out"))
    with ThreadPoolExecutor(8) as pool:
        tokens = set(pool.map(lambda _: token_of(tree), range(8 if links else 1)))
    (token,) = tokens
    path = tmp_path / "out" / TOKEN_FILE
    assert path.read_text() == f"{token}\n" and len(token) >= 43
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [TOKEN_FILE]


@pytest.mark.parametrize("left", ["", "\n", "abc\n"])
def test_what_is_left_of_a_token_lets_nobody_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    (tmp_path / TOKEN_FILE).write_text(left)
    with pytest.raises(ConfigError, match=rf"{TOKEN_FILE}: has {len(left.strip())} characters"):
        token_of(Tree(str(tmp_path)))
    monkeypatch.setenv(TOKEN, "short")
    with pytest.raises(ConfigError, match=f"{TOKEN}: has 5 characters; at least 16"):
        token_of(Tree(str(tmp_path)))
    monkeypatch.setenv(TOKEN, "x" * 16)
    assert token_of(Tree(str(tmp_path))) == "x" * 16


@pytest.mark.parametrize("token", ["pässwort-pässwort", "密码密码密码密码密码密码密码密码", "x" * 16 + "\ty"])
def test_a_token_that_nobody_could_send_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    place = next(place for place, one in enumerate(token, 1) if one in "ä密\t")
    said = f": character {place} is none that a token may have: letters, digits and signs of ASCII"
    monkeypatch.setenv(TOKEN, token)
    with pytest.raises(ConfigError, match=f"^{TOKEN}{said}$"):
        token_of(Tree(str(tmp_path)))
    monkeypatch.delenv(TOKEN)
    (tmp_path / TOKEN_FILE).write_text(token, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"{TOKEN_FILE}{said}$"):
        token_of(Tree(str(tmp_path)))
    # All of ASCII that is printed may be.
    monkeypatch.setenv(TOKEN, every := "".join(map(chr, range(33, 127))))
    assert token_of(Tree(str(tmp_path))) == every


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_of_a_token_may_be_written_in_any_case(scheme: str) -> None:
    for token, status in (("x" * 20, 200), ("y" * 20, 401), ("bearer " + "x" * 20, 401)):
        headers = [("authorization", f"{scheme} {token}")]
        assert _asked("/v1/videos", headers, 0, token="x" * 20) == status


@pytest.mark.parametrize(
    "others",
    ['prefs={"a":1}', "x=a b", "a:b[0]=1", "theme", "n=é", "version=1", "path=/x", "expires=never", 'q="a', "$x=1"],
)
def test_cookies_of_others_do_not_hide_the_token(others: str) -> None:
    token = "x" * 16 + '%41;,"\\ =&'
    kept = f"{COOKIE}={quote(token, safe='')}"
    for cookies in (kept, f"{others}; {kept}", f"{kept}; {others}"):
        headers = [("cookie", cookies)]
        assert _asked("/v1/videos", headers, 0, token=token) == 200
        assert _asked("/v1/videos", headers, 0, token=f"{token}y") == 401


def test_every_token_that_may_be_comes_back_in_the_cookie_that_a_login_sets() -> None:
    from pavdm_dist.serve import app

    token = "".join(map(chr, range(33, 127))) + "%41"
    routes = app.FastAPI()
    app._handle_errors(routes)
    app._add_page(routes, SimpleNamespace(is_token=lambda *_: True), token)
    body, sent = b'{"token": "x"}', list[MutableMapping[str, Any]]()

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/login", "headers": headers, "query_string": b""}
    asyncio.run(Guard(routes, token, loopback_only=True, max_body=1)(scope, receive, send))
    cookie = dict(sent[0]["headers"])[b"set-cookie"].decode().partition(";")[0]
    assert _asked("/v1/videos", [("cookie", f'a="; {cookie}')], 0, token=token) == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:18102", "LocalHost", "127.0.0.1:1", "[::1]:1"])
def test_a_name_has_no_case(host: str) -> None:
    for origin in ([], [("origin", f"http://{host}")], [("origin", f"http://{host.lower()}")]):
        assert _asked("/v1/videos", origin, 0, host=host) == 200
    assert _asked("/v1/videos", [("origin", "http://elsewhere")], 0, host=host) == 403
    assert _asked("/v1/videos", [], 0, host=f"x{host}") == 403


@pytest.mark.parametrize("reads", ["body", "form"])
def test_a_client_that_leaves_in_mid_request_is_no_fault(reads: str, caplog: pytest.LogCaptureFixture) -> None:
    from starlette.requests import Request

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await getattr(Request(scope, receive), reads)()

    came = iter(
        [{"type": "http.request", "body": b"token=", "more_body": True}, {"type": "http.disconnect"}],
    )

    async def receive() -> MutableMapping[str, Any]:
        return next(came)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/x-www-form-urlencoded")]
    scope = {"type": "http", "path": "/login", "headers": headers, "query_string": b""}
    asyncio.run(Guard(app, None, loopback_only=True, max_body=9)(scope, receive, _unsent))
    assert not caplog.records


async def _unsent(message: MutableMapping[str, Any]) -> None:
    pytest.fail("nobody is there to be answered")


def test_a_connection_is_told_of_whoever_may_come_in() -> None:
    for path, token, admitted in (
        ("/v1/videos", "x" * 20, 1), ("/v1/videos", "y" * 20, 0), ("/", "x" * 20, 0), ("/login", "x" * 20, 0),
        ("/health", "x" * 20, 0),
    ):  # fmt: skip
        told = deque[int]()
        state = {ADMIT: partial(told.append, 1)}
        _asked(path, [("authorization", f"Bearer {token}")], 0, token="x" * 20, state=state)
        assert len(told) == admitted


def test_a_guard_takes_no_empty_token() -> None:
    for token in ("", " "):
        with pytest.raises(ValueError, match="would let everybody in"):
            Guard(nothing, token, loopback_only=True, max_body=10)


# --- how much a request may bring -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind", "most"),
    [
        ("/login", "application/json", 4096),
        ("/login", "multipart/form-data; boundary=x", 4096),
        ("/v1/videos", "application/json", 2**20),
        ("/v1/videos", "application/x-www-form-urlencoded", 2**20),
        ("/v1/videos", "", 2**20),
        ("/v1/videos", "Multipart/Form-Data; boundary=x", 3 * 2**20),
    ],
)
@pytest.mark.parametrize("says", [True, False])
def test_only_files_may_be_large(path: str, kind: str, most: int, says: bool) -> None:
    """Announced or counted as it comes; with the last byte that may be it is let through."""
    for size, status in ((most, 200), (most + 1, 413)):
        length = [("content-length", str(size))] if says else []
        assert _asked(path, [("content-type", kind), *length], size) == status


def test_a_length_of_thousands_of_digits_is_too_large() -> None:
    assert _asked("/v1/videos", [("content-length", "9" * 5000)], 0) == 413


def _asked(
    path: str,
    headers: list[tuple[str, str]],
    size: int,
    token: str | None = None,
    host: str = "localhost",
    state: dict[str, Any] | None = None,
) -> int:
    """The status that a request gets whose body of so many bytes is read to its end."""
    sent: list[MutableMapping[str, Any]] = []
    left = size

    async def reads(scope: Scope, receive: Receive, send: Send) -> None:
        taken, status = 0, 200
        try:
            while taken < size:
                taken += len((await receive())["body"])
        except TooLarge:  # as the routes answer it
            status = 413
        await send({"type": "http.response.start", "status": status})

    async def receive() -> MutableMapping[str, Any]:
        nonlocal left
        piece = min(left, 2**16)
        left -= piece
        return {"type": "http.request", "body": b" " * piece, "more_body": left > 0}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in [("host", host), *headers]]
    scope = {"type": "http", "path": path, "headers": raw, "query_string": b"", "state": state or {}}
    asyncio.run(Guard(reads, token, loopback_only=True, max_body=3 * 2**20)(scope, receive, send))
    return int(sent[0]["status"])


def test_numbers_sent_as_text_are_the_numbers_that_were_sent() -> None:
    for text, seed in (("9007199254740993", 2**53 + 1), (str(2**63 - 1), 2**63 - 1), ("7.0", 7), ("1e3", 1000)):
        assert shot_of("x", {"prompt": "a", "seed": text}, "m").seed == seed
    assert shot_of("x", {"prompt": "a", "seconds": "1.5"}, "m").seconds == 1.5
    with pytest.raises(ConfigError, match="seed="):  # which no float can say
        shot_of("x", {"prompt": "a", "seed": "9007199254740993.0"}, "m")


@pytest.mark.parametrize("rate", ["30000/1001", "30000:1001", "ntsc", " NTSC "])
def test_a_rate_may_be_written_as_everywhere_else(rate: str) -> None:
    assert shot_of("x", {"prompt": "a", "fps": rate}, "m").overrides == {"fps": 30000 / 1001}


def test_what_is_no_rate_is_refused_with_what_is_one() -> None:
    for rate in ("fast", "1/0", "2000/1"):
        with pytest.raises(ConfigError, match=r"fps=.*a fraction such as 30000/1001 or a name such as ntsc"):
            shot_of("x", {"prompt": "a", "fps": rate}, "m")
    with pytest.raises(ConfigError, match=r"guidance_scale=ntsc: must be a number$"):
        shot_of("x", {"prompt": "a", "guidance_scale": "ntsc"}, "m")
