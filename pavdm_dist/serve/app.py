"""The routes: OpenAI's ``/v1/videos``, live streams, the page, health and metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Mapping, MutableMapping
from contextlib import asynccontextmanager
from functools import partial
from importlib import resources
from typing import Any, BinaryIO
from urllib.parse import quote

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, StreamingResponse
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException

from pavdm_dist import __version__
from pavdm_dist.errors import PAVDMError
from pavdm_dist.io.remote import is_remote
from pavdm_dist.io.storage import open_read
from pavdm_dist.serve.front import Front
from pavdm_dist.serve.guard import COOKIE, Guard, Receive, Scope, Send, TooLarge
from pavdm_dist.serve.live import Live
from pavdm_dist.serve.metrics import exposition
from pavdm_dist.serve.refusals import Refusal, error_body
from pavdm_dist.serve.settings import is_loopback
from pavdm_dist.values.fields import json_value, show

logger = logging.getLogger(__name__)

# A client that polls is told when to come again (OpenAI's clients heed it).
_POLL_MS = 1000
_MEDIA = "video/mp4"
_LISTED = 100  # videos of one page of a list, at most
_TEXT = 2**16  # bytes of a field of a form that is no file
_LOGIN_S = 10.0  # seconds that the body of a login may take, which is of anybody
_ENCODING = 4  # changed prompts whose texts are encoded at a time


def make_app(front: Front, token: str | None = None, lifespan: Any = None) -> Guard:
    """The whole application.

    Args:
        front: opened, or opened by ``lifespan``.
        token: what clients must have; None = nothing.
        lifespan: of FastAPI, where the desk is opened and closed with the application.
    """
    config = front.desk.config.http
    app = FastAPI(title="pavdm serve", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    _handle_errors(app)
    _add_videos(app, front)
    _add_watching(app, front)
    _add_page(app, front, token)
    return Guard(app, token, is_loopback(config.host), int(config.max_body_mib * 2**20))


def _handle_errors(app: FastAPI) -> None:
    def answer(
        status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> Response:
        return JSONResponse(error_body(status, message, code), status, headers)

    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> Response:
        return answer(error.status, str(error), error.code, error.headers)

    @app.exception_handler(PAVDMError)
    async def impossible(_: Request, error: PAVDMError) -> Response:
        return answer(400, str(error), "invalid_value")

    @app.exception_handler(TooLarge)
    async def too_large(_: Request, error: TooLarge) -> Response:
        return answer(413, str(error), headers={"Connection": "close"})

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return answer(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return answer(422, f"{'.'.join(str(part) for part in first['loc'][1:])}: {first['msg']}")

    @app.exception_handler(OSError)
    async def disk(_: Request, error: OSError) -> Response:
        logger.error("the folder cannot be used: %s", error)
        return answer(503, f"the server's disk does not do its part ({error.strerror or 'error'})", "storage")

    @app.exception_handler(Exception)
    async def fault(_: Request, __: Exception) -> Response:
        return answer(500, "a fault of the server; its log says more", "internal")


def _add_videos(app: FastAPI, front: Front) -> None:
    # What waits for its turn to be decoded, or for a large text encoder, must not take threads from others.
    decoding, encoding = CapacityLimiter(1), CapacityLimiter(_ENCODING)

    @app.post("/v1/videos")
    async def create(request: Request) -> Response:
        await run_sync(front.desk.check_room)  # before a body is read
        async with _fields(request) as (fields, reference):
            limiter = None if reference is None else decoding
            return JSONResponse(await run_sync(front.create, fields, reference, limiter=limiter))

    @app.get("/v1/videos")
    def videos(limit: int = 20, after: str | None = None, order: str = "desc") -> Response:
        if not 1 <= limit <= _LISTED:
            raise Refusal(400, f"limit={limit}: must be 1 to {_LISTED}")
        if order not in ("asc", "desc"):
            raise Refusal(400, f"order={order[:20]!r}: must be asc or desc")
        return JSONResponse(front.list(limit, after, newest_first=order == "desc"))

    @app.get("/v1/videos/{id}")
    def video(id: str) -> Response:
        found = front.get(id)
        over = found["status"] in ("completed", "failed")
        return JSONResponse(found, headers={} if over else {"openai-poll-after-ms": str(_POLL_MS)})

    @app.delete("/v1/videos/{id}")
    def delete(id: str) -> Response:
        front.desk.cancel(id)
        return JSONResponse({"id": id, "object": "video.deleted", "deleted": True})

    @app.head("/v1/videos/{id}/content")
    @app.get("/v1/videos/{id}/content")
    def content(id: str, request: Request, variant: str = "video") -> Response:
        if variant != "video":
            raise Refusal(400, f"variant={variant[:40]!r}: there is video only")
        found = front.get(id)
        if found["status"] != "completed":
            message = f"video {id} is {found['status']}; /v1/videos/{id}/live plays what there is of it"
            raise Refusal(409, message, "not_completed")
        output, name = front.desk.tree.output(id), f"{id}.mp4"
        if not is_remote(output):
            return _Film(output, media_type=_MEDIA, filename=name)
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        whole = _read(output) if request.method == "GET" else iter(())
        return StreamingResponse(whole, media_type=_MEDIA, headers=headers)

    @app.post("/v1/videos/{id}/prompt")
    async def prompt(id: str, request: Request) -> Response:
        async with _fields(request) as (fields, reference):
            if reference is not None or not set(fields) <= {"prompt", "from_chunk"}:
                raise Refusal(400, "the fields are prompt and from_chunk")
            return JSONResponse(await run_sync(front.set_prompt, id, fields, limiter=encoding))

    @app.get("/v1/models")
    def models() -> Response:
        one = {"id": front.desk.model, "object": "model", "created": front.began_at, "owned_by": "pavdm_dist"}
        return JSONResponse({"object": "list", "data": [one]})


def _add_watching(app: FastAPI, front: Front) -> None:
    live = Live()

    def stream(id: str) -> AsyncIterator[bytes]:
        return live.stream(front.desk.tree.output(id), partial(front.desk.is_over, id))

    @app.get("/v1/videos/{id}/live")
    def watch(id: str) -> Response:
        front.get(id)
        return StreamingResponse(stream(id), media_type=_MEDIA, headers={"Cache-Control": "no-store"})

    @app.websocket("/v1/videos/{id}/live")
    async def watch_socket(socket: WebSocket, id: str) -> None:
        try:
            await run_sync(front.get, id)
        except Refusal as error:
            await socket.close(4000 + error.status, str(error)[:120])
            return
        await socket.accept()
        # A viewer of a video that waits is sent nothing, so that only this tells that it has gone.
        sending, gone = asyncio.ensure_future(send(socket, id)), asyncio.ensure_future(_gone(socket))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, gone):
                task.cancel()
            ended = await asyncio.gather(sending, gone, return_exceptions=True)
        for end in ended:
            # Nobody watches any more, or it was deleted meanwhile.
            if isinstance(end, Exception) and not isinstance(end, WebSocketDisconnect | RuntimeError | Refusal):
                raise end

    async def send(socket: WebSocket, id: str) -> None:
        told = False
        async for data in stream(id):
            if not told:  # what the bytes are, before the first of them
                await socket.send_text(json.dumps({"mime": await run_sync(front.mime, id)}))
                told = True
            await socket.send_bytes(data)
        await socket.send_text(json.dumps({"status": (await run_sync(front.get, id))["status"]}))
        await socket.close()

    @app.get("/v1/videos/{id}/timeline")
    def timeline(id: str) -> Response:
        return JSONResponse(front.timeline(id))

    # Answered whatever keeps all other threads busy.
    asking = CapacityLimiter(1)

    @app.get("/health")
    async def health() -> Response:
        report = await run_sync(front.health, limiter=asking)
        return JSONResponse(report, 200 if report["status"] == "ok" else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        body, kind = exposition(front.desk)
        return Response(body, media_type=kind)


def _add_page(app: FastAPI, front: Front, token: str | None) -> None:
    page = resources.files("pavdm_dist.serve") / "page"
    # Nothing is loaded from elsewhere, and no other page may show this one in a frame.
    policy = "default-src 'self'; media-src 'self' blob:; img-src 'self' data:; frame-ancestors 'none'"
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}

    @app.get("/")
    def index() -> Response:
        return HTMLResponse((page / "index.html").read_text(), headers=headers)

    @app.get("/page.{kind}")
    def part(kind: str) -> Response:
        kinds = {"js": "text/javascript", "css": "text/css"}
        if kind not in kinds:
            raise Refusal(404, "there is no such page")
        return Response((page / f"page.{kind}").read_text(), media_type=kinds[kind], headers=headers)

    @app.post("/login")
    async def login(request: Request) -> Response:
        try:
            async with asyncio.timeout(_LOGIN_S), _fields(request) as (fields, _):
                given = fields.get("token")
        except TimeoutError as error:
            said = f"the body of a login must come within {_LOGIN_S:g} s"
            raise Refusal(408, said, headers={"Connection": "close"}) from error
        answer = JSONResponse({"ok": True})
        if token is not None:
            if not front.is_token(given, token):
                raise Refusal(401, "that is not this server's token")
            secure = request.url.scheme == "https"
            answer.set_cookie(COOKIE, quote(token, safe=""), httponly=True, samesite="strict", secure=secure)
        return answer


async def _gone(socket: WebSocket) -> None:
    """Returns when a viewer has closed its end; whatever it says before is of no interest."""
    while (await socket.receive())["type"] != "websocket.disconnect":
        pass


@asynccontextmanager
async def _fields(request: Request) -> AsyncIterator[tuple[dict[str, Any], BinaryIO | None]]:
    """A request's fields, of a form or of JSON, and the file that comes with it, which lies on disk if it is large."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        async with request.form(max_files=1, max_fields=64, max_part_size=_TEXT) as form:
            fields: dict[str, Any] = {}
            reference = None
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name != "input_reference":
                        raise Refusal(400, f"{name[:40]!r} is a file; only input_reference is")
                    reference = value.file
                else:
                    fields[name] = value
            _check_reference(fields)
            yield fields, reference
            return
    try:
        fields = json_value(await request.body() or b"{}")
    except ValueError as error:
        raise Refusal(400, f"the body is neither a form nor JSON: {str(error)[:100]}") from error
    if not isinstance(fields, dict):
        raise Refusal(400, "the body must hold names and values")
    _check_reference(fields)
    yield fields, None


def _check_reference(fields: dict[str, Any]) -> None:
    """Refuses what is given in the place of a file; null says that there is none."""
    if fields.pop("input_reference", None) is not None:
        raise Refusal(400, "input_reference: must be a file of a form; this server fetches nothing")


class _Film(FileResponse):
    """A video's file. A range that it does not have is refused in the form of every refusal."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = 0

        async def told(message: MutableMapping[str, Any]) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] >= 400:
                refused = message["status"]
            if not refused:
                await send(message)

        await super().__call__(scope, receive, told)
        if refused:
            asked, size = Headers(scope=scope).get("range", ""), os.path.getsize(self.path)
            said = f"Range: {show(asked)}: must be bytes=FIRST-LAST within the {size} bytes of the video"
            headers = {"Content-Range": f"bytes */{size}"}
            await JSONResponse(error_body(refused, said), refused, headers)(scope, receive, send)


def _read(path: str) -> Any:
    with open_read(path) as file:
        while data := file.read(1 << 20):
            yield data
