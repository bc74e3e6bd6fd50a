"""Actors in threads of this process, with futures for Ray's references: what talks to actors is tested without any."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import pytest
import ray


class Threads:
    """An actor in this process: calls in order in one thread, those of its control group in another."""

    def __init__(self, actor: object) -> None:
        self._actor = actor
        self.pools = {"": ThreadPoolExecutor(1), "control": ThreadPoolExecutor(1)}

    def __getattr__(self, name: str) -> Call:
        return Call(getattr(self._actor, name), self.pools)


@dataclass
class Call:
    method: Callable[..., Any]
    pools: dict[str, ThreadPoolExecutor]
    group: str = ""

    def options(self, concurrency_group: str) -> Call:
        return Call(self.method, self.pools, concurrency_group)

    def remote(self, *arguments: object) -> Future[Any]:
        return self.pools[self.group].submit(self.method, *arguments)


def futures_for_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets ``ray.wait`` and ``ray.get`` take futures."""

    def waited(refs: list[Future[Any]], num_returns: int = 1, timeout: float | None = None) -> tuple[list[Any], Any]:
        done = wait(refs, timeout).done
        return [ref for ref in refs if ref in done], [ref for ref in refs if ref not in done]

    def result(refs: Future[Any] | list[Future[Any]], timeout: float | None = None) -> Any:
        return [ref.result(timeout) for ref in refs] if isinstance(refs, list) else refs.result(timeout)

    monkeypatch.setattr(ray, "wait", waited)
    monkeypatch.setattr(ray, "get", result)
