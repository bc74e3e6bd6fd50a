"""A hub of one repository, served from a folder on this machine: what is asked of it can be counted."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REPOSITORY, COMMIT = "someone/model", "1" * 40


class Hub:
    """Answers as ``huggingface.co`` does, for revisions ``main``, ``v2`` and the commit itself.

    Attributes:
        asked: ``(method, file, bytes sent)`` of every request.
        odd: called with a request's handler and whether its body is wanted; true = it has answered itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[tuple[str, str, int]]()
        self.odd: Callable[[BaseHTTPRequestHandler, bool], bool] = lambda handler, body: False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(False)

            def do_GET(self) -> None:
                self._answer(True)

            def _answer(self, body: bool) -> None:
                if hub.odd(self, body):
                    return None
                path = self.path.partition("?")[0]
                match = re.fullmatch(rf"/{REPOSITORY}/resolve/(main|v2|{COMMIT})/(.+)", path)
                file = hub.folder / match[2] if match else None
                if path.startswith(f"/api/models/{REPOSITORY}"):
                    return self._tree(path)
                if file is None or not file.is_file():
                    self.send_response(404)
                    kind = "EntryNotFound" if match else "RepoNotFound"
                    self.send_header("X-Error-Code", kind)
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return None
                content, status = file.read_bytes(), 200
                tag, size = hashlib.sha256(content).hexdigest(), len(content)
                if "Range" in self.headers:
                    first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"]).groups()  # type: ignore[union-attr]
                    content, status = content[int(first) : int(last or size) + 1], 206
                self.send_response(status)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{tag}"')
                self.send_header("Content-Length", str(len(content)))
                if status == 206:
                    self.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{size}")
                self.end_headers()
                hub.asked.append((self.command, match[2], len(content) if body else 0))  # type: ignore[index]
                if body:
                    self.wfile.write(content)
                return None

            def _tree(self, path: str) -> None:
                files = [file.relative_to(hub.folder).as_posix() for file in hub.folder.rglob("*") if file.is_file()]
                found: object = {"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                if "/tree/" in path:
                    found = [{"type": "file", "path": name, "oid": "0", "size": 1} for name in files]
                content = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def fetched(self) -> set[str]:
        """Files of which bodies were asked for since the last call."""
        found = {name for method, name, _ in self.asked if method == "GET"}
        self.asked.clear()
        return found


@contextmanager
def serve(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, with an empty cache, as the one that this process asks."""
    from huggingface_hub import constants

    hub = Hub(folder)
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()
