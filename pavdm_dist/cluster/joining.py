"""Joining a Ray cluster, or starting one that nobody else can reach; several users in one process share it."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pavdm_dist.cluster import address as addresses
from pavdm_dist.cluster.starting import settings_of_own, workers_paths
from pavdm_dist.errors import EngineError

# A finaliser may end another membership while this thread makes one.
_turn = threading.RLock()
# How long whoever was told to end waits for a Ray that is just being started: it would abort an ending interpreter.
GIVE_UP_S = 30.0


class _Session:
    """This process' connection that was made here, how many use it, and whether it has ended."""

    def __init__(self) -> None:
        self.members, self.over = 0, threading.Event()


_session: _Session | None = None


class Membership:
    """One user's part in the cluster that this process is in, made by :func:`connect`."""

    def __init__(self, session: _Session | None) -> None:
        self._session = session

    @property
    def others(self) -> int:
        """How many others in this process use the same connection, as far as it was made here."""
        return 0 if self._session is None else self._session.members - 1

    def leave(self) -> None:
        """Gives the part up; safe to call twice.

        The last one ends the connection, and with it a cluster that was started here. One that this process was in
        already, because somebody else had joined it, stays.
        """
        global _session
        import ray

        with _turn:
            session, self._session = self._session, None
            if session is None:
                return
            session.members -= 1
            if session.members:
                return
            try:
                if session is _session:  # else somebody has shut it down by himself, and another one was made since
                    _session = None
                    ray.shutdown()
            finally:
                session.over.set()


def connect(address: str | None, log_to_driver: bool = False) -> Membership:
    """Joins the Ray cluster that this process is in, or that of the address, else starts a local one.

    Args:
        address: None = that of ``RAY_ADDRESS``.
        log_to_driver: what workers print, tracebacks too, comes out of this process; else it stays in their logs. The
            first user of a connection decides.

    Raises:
        EngineError: no cluster answers there, one that asks for another token or is of another Ray version does, this
            process is in another cluster, or none can be started here.
    """
    with _turn:
        membership, wanted = _shared(address), addresses.given(address)
        if membership is None and wanted is not None:
            addresses.check_reachable(wanted)
            with _signals_kept():
                _join(wanted, log_to_driver)
            membership = _first()
    return membership or _started(address, log_to_driver)


def _shared(address: str | None) -> Membership | None:
    """A part in the cluster that this process is in; None where it is in none."""
    import ray

    if not ray.is_initialized():
        return None
    addresses.check_same(address)
    if _session is not None:
        _session.members += 1
    return Membership(_session)


def _first() -> Membership:
    """The first part in a connection that was just made."""
    global _session
    _session = _Session()
    _session.members = 1
    return Membership(_session)


def _started(address: str | None, log_to_driver: bool) -> Membership:
    """A part in the cluster that this process is in, else in one that is started by a thread of its own.

    The kernel ends what Ray starts when the thread that started it ends (PR_SET_PDEATHSIG), and whoever connects first
    may be a server's thread that ends with its request. This one lives until the last membership is given up. It is a
    daemon, as nothing says that before the interpreter ends where memberships are left to finalisers.
    """
    found: list[Membership | BaseException] = []
    ready, unwanted = threading.Event(), threading.Event()

    def hold() -> None:
        session: _Session | None = None
        try:
            with _turn:
                membership = _shared(address)  # another thread may have been quicker
                if membership is None:
                    _join(None, log_to_driver)
                    membership, session = _first(), _session
            found.append(membership)
        except BaseException as error:  # it belongs to whoever connects
            found.append(error)
        ready.set()
        if unwanted.is_set():
            leave()
        if session is not None:
            session.over.wait()

    def leave() -> None:
        for one in found:
            if isinstance(one, Membership):
                one.leave()

    holding = threading.Thread(target=hold, name="pavdm-ray", daemon=True)
    try:
        holding.start()
        ready.wait()
    except BaseException:  # Ctrl-C: what comes up is for nobody
        unwanted.set()
        if holding.is_alive():
            ready.wait(GIVE_UP_S)
        leave()
        raise
    (outcome,) = found
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _join(address: str | None, log_to_driver: bool) -> None:
    import ray

    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": log_to_driver}
    if address is None or not address.startswith("ray://"):
        settings["job_config"] = workers_paths()
    try:
        if address is not None:
            ray.init(address=address, **settings)
            return
        with settings_of_own() as own, _outliving_the_terminal():
            ray.init(address="local", **own, **settings)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        why = addresses.one_line(error)
        if address is None:
            raise EngineError(f"no Ray could be started on this machine: {why}") from error
        raise EngineError(f"ray_address={address!r}: no Ray cluster could be joined: {why}") from error


@contextmanager
def _outliving_the_terminal() -> Iterator[None]:
    """What is started here is not told that a terminal closes, as Ray sees to for Ctrl-C: all of a terminal's processes
    are, and this one has yet to end what it does on them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray ends the process at SIGTERM, with whatever is half done; who runs the process decides that here."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
