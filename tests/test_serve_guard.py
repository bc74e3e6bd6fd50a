"""What stands before the routes of ``pavdm serve``: tokens, and how much a request may bring; without a model."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.tree import Tree
from pavdm_dist.io import local
from pavdm_dist.serve.guard import Guard, Receive, Scope, Send
from pavdm_dist.serve.tokens import TOKEN, TOKEN_FILE, token_of


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

        monkeypatch.setattr(local.os, "link", refused)
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


def test_a_guard_takes_no_empty_token() -> None:
    for token in ("", " "):
        with pytest.raises(ValueError, match="would let everybody in"):
            Guard(nothing, token, loopback_only=True, max_body=10)
