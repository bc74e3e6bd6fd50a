"""Whether a Ray cluster answers at an address, with the token that it asks for: found out within seconds, where Ray
itself tries for minutes."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterable

from pavdm_dist.errors import EngineError

# How long a connection may take; and, once there is one, how long Ray's head may take to say that it is one.
REACH_S, ANSWER_S = 10.0, 15.0
# Ray's usual ports, which are easily taken for each other.
_PORTS = "6379 is the usual port of a cluster, ray://HOST:10001 that of its client server, 8265 that of its dashboard"

# Where a token may be, as Ray looks for it.
_TOKENS = "RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"


def given(address: str | None) -> str | None:
    """The address to join: that of a setting, else that of ``RAY_ADDRESS``; None starts a cluster here."""
    if address in (None, "", "auto"):
        address = os.environ.get("RAY_ADDRESS") or address
    return None if address == "local" else address or None  # Ray's word for one of this process' own


def check_reachable(address: str) -> None:
    """Refuses an address at which no Ray cluster answers. From then on this process shows its token to one that asks.

    Args:
        address: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``.

    Raises:
        EngineError: naming the address, and what was found there, or what is wrong with the token.
    """
    import ray

    is_client = address.startswith("ray://")
    if "//" in address and not is_client:
        raise EngineError(f"ray_address={address!r}: must be auto, HOST:PORT or ray://HOST:PORT; {_PORTS}")
    try:
        if is_client:
            where = address.removeprefix("ray://")
        else:
            # Ray's own reading: "auto" may stand for a cluster that is long gone.
            where = ray._private.services.canonicalize_bootstrap_address(address) or ""
    except (OSError, ValueError) as error:
        legal = "must be auto, HOST:PORT or ray://HOST:PORT"
        raise EngineError(f"ray_address={address!r}: {one_line(error)}; {legal}") from error
    said = f"ray_address={address!r}" if address != "auto" else f"ray_address='auto', which stands for {where}"
    host, _, port = where.rpartition(":")
    if not host or not port.isdecimal():
        raise EngineError(f"{said}: must be auto, HOST:PORT or ray://HOST:PORT; {_PORTS}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:
        raise EngineError(f"{said}: no Ray cluster could be reached: {error}") from error
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() == "token" and not _has_token():  # Ray would end the process
        raise EngineError(f"RAY_AUTH_MODE={mode}: there is no token here; put the cluster's into {_TOKENS}")
    if is_client:
        return
    try:
        _check_is_ray(said, where)
    except _TokenRefusedError:
        # A token is looked for only where one is asked for: a process that has read one asks all that call back for it,
        # too. Any Ray of one's own leaves one in the home; what is started there from then on asks for it.
        if mode is not None or not _has_token():
            raise
        _show_token()
        _check_is_ray(said, where)


def check_same(address: str | None) -> None:
    """Refuses another cluster than the one that this process is in already: Ray knows one at a time.

    Args:
        address: of a setting; None, ``auto`` and ``local`` are whatever the process is in.

    Raises:
        EngineError: naming both.
    """
    import ray
    from ray.util.client import ray as client

    if address is None or address in ("auto", "local") or address.startswith("ray://") or client.is_connected():
        return
    here = ray.get_runtime_context().gcs_address
    if not _same(address, here):
        raise EngineError(
            f"ray_address={address!r}: this process is in the Ray cluster at {here}, and can be in one at a time; close"
            " what uses that one first, or use another process"
        )


def one_line(error: BaseException) -> str:
    """All that an error says, in one line: what Ray says at the end of its first line is often only a colon."""
    return " ".join(str(error).split()) or type(error).__name__


class _TokenRefusedError(EngineError):
    """A cluster asks for a token, and was shown none or another."""


def _has_token() -> bool:
    """Whether there is a token here, which Ray keeps in mind from then on.

    Raises:
        EngineError: it cannot be read.
    """
    try:
        from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
    except ImportError:  # a Ray that is older than tokens, and asks for none
        return True
    try:
        return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))
    except Exception as error:  # Ray's own kind is as young as tokens are
        path = os.environ.get("RAY_AUTH_TOKEN_PATH")
        if path is None:
            raise EngineError(f"no token can be read of {_TOKENS}: {one_line(error)}") from error
        raise EngineError(
            f"RAY_AUTH_TOKEN_PATH={path}: no token can be read there; set it to the file of one"
        ) from error


def _show_token() -> None:
    """Ray shows a token by itself only to a cluster that it has found, not to one whose address it is given."""
    from ray._raylet import Config  # type: ignore[attr-defined]

    os.environ["RAY_AUTH_MODE"] = "token"
    Config.initialize("")  # Ray has read the variable by now


def _token_refused(said: str) -> _TokenRefusedError:
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is None:
        why = "there is none here"
    else:
        why = "the one here is another" if mode.lower() == "token" else f"RAY_AUTH_MODE={mode} shows none"
    return _TokenRefusedError(f"{said}: the Ray cluster there asks for its token, and {why}; put it into {_TOKENS}")


def _check_is_ray(said: str, where: str) -> None:
    """A port at which something listens need not be Ray's; then Ray tries for ten minutes, deaf to Ctrl-C."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    found: list[BaseException | None] = []

    def ask() -> None:
        try:
            GcsClient(address=where)
            found.append(None)
        except Exception as error:
            found.append(error)

    asking = threading.Thread(target=ask, name="pavdm-reach", daemon=True)
    asking.start()
    asking.join(ANSWER_S)
    if not found:
        raise EngineError(
            f"{said}: something listens there, but no Ray cluster answered within {ANSWER_S:.0f} s; {_PORTS}"
        )
    if "InvalidAuthToken" in str(found[0]):
        raise _token_refused(said) from found[0]
    if found[0] is not None:
        raise EngineError(f"{said}: no Ray cluster answers there: {one_line(found[0])}; {_PORTS}") from found[0]


def _same(one: str, other: str) -> bool:
    """Whether two addresses, ``HOST:PORT``, are the same; this machine has several."""
    (host, _, port), (other_host, _, other_port) = one.rpartition(":"), other.rpartition(":")
    if port != other_port:
        return False
    first, second = _numbers(host), _numbers(other_host)
    here = _of_this_machine()
    return bool(first & second) or bool(first & here and second & here)


def _numbers(host: str) -> set[str]:
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(host.strip("[]"), None)}
    except OSError:
        return {host}


def _of_this_machine() -> set[str]:
    import psutil

    every: Iterable[list[object]] = psutil.net_if_addrs().values()
    return {entry.address.partition("%")[0] for entries in every for entry in entries}  # type: ignore[attr-defined]
