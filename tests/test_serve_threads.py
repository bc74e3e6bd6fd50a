"""What the routes of ``pavdm serve`` have threads for: some that wait take none from others; without a model."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest

make_app = pytest.importorskip("pavdm_dist.serve.app", reason="needs pavdm-dist[serve]").make_app

# More than a server has threads.
MANY = 60


class FrontThatWaits:
    """Whose answers come when a test lets them, but for health."""

    def __init__(self) -> None:
        http = SimpleNamespace(host="127.0.0.1", max_body_mib=1.0)
        self.desk: Any = SimpleNamespace(config=SimpleNamespace(http=http), check_room=lambda: None)
        self.let = threading.Event()
        self.decoding, self.most = 0, 0

    def get(self, id: str) -> dict[str, Any]:
        assert id == "other" or self.let.wait(20)
        return {"id": id, "status": "completed"}

    def create(self, fields: dict[str, Any], reference: Any) -> dict[str, Any]:
        self.decoding += 1
        self.most = max(self.most, self.decoding)
        assert self.let.wait(20)
        self.decoding -= 1
        return {"prompt": fields["prompt"], "read": len(reference.read())}

    def set_prompt(self, id: str, fields: dict[str, Any]) -> dict[str, Any]:
        assert self.let.wait(20)
        return fields

    def health(self) -> dict[str, Any]:
        return {"status": "ok"}


async def _while_many(front: FrontThatWaits, method: str, path: str, then: str, **more: Any) -> list[httpx.Response]:
    """Answers of many requests that wait, the one to another that comes behind them being there before."""
    transport = httpx.ASGITransport(make_app(front))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30) as client:
        waiting = [asyncio.ensure_future(client.request(method, path, **more)) for _ in range(MANY)]
        await asyncio.sleep(0.3)
        try:
            answer = await asyncio.wait_for(client.get(then), 10)
            assert answer.status_code == 200 and not any(task.done() for task in waiting)
        finally:
            front.let.set()
        return await asyncio.gather(*waiting)


def test_health_is_told_though_every_thread_waits() -> None:
    answers = asyncio.run(_while_many(FrontThatWaits(), "GET", "/v1/videos/slow", "/health"))
    assert {answer.status_code for answer in answers} == {200}


def test_references_are_decoded_one_at_a_time_and_those_that_wait_take_no_threads() -> None:
    front, files = FrontThatWaits(), {"input_reference": ("a.png", b"picture", "image/png")}
    more: dict[str, Any] = {"data": {"prompt": "a"}, "files": files}
    answers = asyncio.run(_while_many(front, "POST", "/v1/videos", "/v1/videos/other", **more))
    assert [answer.json() for answer in answers] == [{"prompt": "a", "read": 7}] * MANY and front.most == 1


def test_prompts_that_wait_for_a_text_encoder_take_no_threads_from_others() -> None:
    asked = {"prompt": "a blue seven"}
    told = _while_many(FrontThatWaits(), "POST", "/v1/videos/slow/prompt", "/v1/videos/other", json=asked)
    assert [answer.json() for answer in asyncio.run(told)] == [asked] * MANY
