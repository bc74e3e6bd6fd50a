"""The token that clients need: the environment's, or one that is made once and kept beside the videos."""

from __future__ import annotations

import hmac
import logging
import os
import secrets

from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.tree import Tree
from pavdm_dist.io.remote import is_remote
from pavdm_dist.io.storage import create_new, open_read

logger = logging.getLogger(__name__)

TOKEN = "PAVDM_SERVE_TOKEN"
TOKEN_FILE = "serve.token"
# A shorter one can be guessed, or is what a full disk has left of one.
LEAST_CHARACTERS = 16


def is_same(given: str, token: str) -> bool:
    """Whether somebody has the token; takes as long for a wrong one."""
    return hmac.compare_digest(given.encode(errors="surrogatepass"), token.encode())


def given_token() -> str | None:
    """The environment's; None where it has none.

    Raises:
        ConfigError: it is too short, or has characters that no header has.
    """
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        return None
    if len(token) < LEAST_CHARACTERS:
        raise ConfigError(f"{TOKEN}: has {len(token)} characters; at least {LEAST_CHARACTERS} are needed")
    _check_characters(TOKEN, token)
    return token


def _check_characters(where: str, token: str) -> None:
    """Refuses a token that clients could not send: headers and cookies have these characters only."""
    place = next((place for place, one in enumerate(token, 1) if not (one.isascii() and one.isprintable())), None)
    if place is not None:
        raise ConfigError(
            f"{where}: character {place} is none that a token may have: letters, digits and signs of ASCII"
        )


def token_of(tree: Tree) -> str:
    """The environment's, or the one in ``serve.token`` of a server's folder, which is made there if need be.

    Raises:
        ConfigError: as :func:`given_token`, of the file, too; or a folder in a store, which is no place for one.
        OSError: the file cannot be written or read.
    """
    token = given_token()
    if token is not None:
        return token
    if is_remote(tree.root):
        raise ConfigError(f"http.auth: set {TOKEN}; {tree.root} is no place for a token")
    path = tree.path(TOKEN_FILE)
    # Whole from its first moment on: of two servers that begin at once, both read the same one.
    create_new(path, f"{secrets.token_urlsafe(32)}\n".encode(), mode=0o600)
    with open_read(path) as file:
        token = file.read().decode("utf-8", "replace").strip()
    if len(token) < LEAST_CHARACTERS:
        raise ConfigError(
            f"{path}: has {len(token)} characters, and a token at least {LEAST_CHARACTERS}; remove the file, so that"
            " another one is made"
        )
    _check_characters(path, token)
    logger.info("clients need the token in %s", path)
    return token
