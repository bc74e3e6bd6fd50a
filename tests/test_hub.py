"""Hubs, mirrors and proxies that answer oddly: the right bytes, or a sentence that says what is wrong and helps."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_checkpoint, tiny_model
from hub import COMMIT, REPOSITORY, Hub, serve

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.models.catalog import load_backbone


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.5)  # it asks twice
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # anywhere, between its attempts
    with serve(model, tmp_path / "cache", monkeypatch) as hub:
        yield hub


def answer(handler: BaseHTTPRequestHandler, status: int, content: bytes = b"", **headers: str) -> bool:
    handler.send_response(status)
    for name, value in {"Content_Length": str(len(content)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(content)
    return True


def said(model: str = REPOSITORY, revision: str | None = None) -> str:
    began = time.monotonic()
    with pytest.raises(CheckpointError) as raised:
        Checkpoint.open(model, revision)
    assert time.monotonic() - began < 5
    text = str(raised.value)
    assert "\n" not in text and (f"model='{model}'" in text or f"model={model}" in text), text
    return text


@pytest.mark.parametrize(
    ("status", "headers", "sentence"),
    [
        (401, {"X_Error_Code": "RepoNotFound"}, "no hub id: 401, .* or not for whom it is asked by; HF"),
        (401, {}, r"refuses access \(401\); is the token good\? HF_TOKEN"),
        (403, {}, r"refuses access \(403\)"),
        (403, {"X_Error_Code": "GatedRepo"}, r"is gated: ask for access at http://127.0.0.1:\d+/someone/model; HF"),
        (404, {"X_Error_Code": "RevisionNotFound"}, "revision=v9: .* has no such branch, tag or commit at http"),
        (429, {"Retry_After": "3600"}, r"is asked too often \(429\): wait, .*; HF_HUB_OFFLINE=1"),
        (500, {}, r"is out of order \(500\): try again later"),
        (503, {}, r"is out of order \(503\)"),
        (302, {"Location": "/elsewhere"}, "cannot be fetched from .*redirects"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_helps(hub: Hub, status: int, headers: dict[str, str], sentence: str) -> None:
    hub.odd = lambda handler, body: answer(handler, status, **headers)
    assert re.search(sentence, said(revision="v9"))


def test_a_login_page_is_no_hub(hub: Hub) -> None:
    page = b"<html>Welcome to the hotel's network</html>"
    hub.odd = lambda handler, body: answer(handler, 200, page, Content_Type="text/html")
    assert "is no hub, but perhaps a proxy or a login page (" in said()


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "hub.example", "http://", "http://[::1"])
def test_a_hub_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert f"cannot be fetched from {endpoint} (" in said()


def test_a_hub_that_says_nothing(hub: Hub) -> None:
    def silent(handler: BaseHTTPRequestHandler, body: bool) -> bool:
        threading.Event().wait(1)
        return False

    hub.odd = silent
    assert "cannot be fetched from http://127.0.0.1" in said()


def test_a_download_that_breaks_off(hub: Hub) -> None:
    """Never a model of half a file: what is cut off is not kept."""

    def cut(handler: BaseHTTPRequestHandler, body: bool) -> bool:
        name = handler.path.rpartition("/")[2]
        if not body or not name.endswith(".safetensors") or "Range" in handler.headers:
            return False
        content = (hub.folder / "transformer" / name).read_bytes()
        answer(handler, 200, content[: len(content) // 2], Content_Length=str(len(content)))
        handler.close_connection = True
        return True

    source = Checkpoint.open(REPOSITORY).transformer
    hub.odd = cut
    with pytest.raises(CheckpointError, match=f"model='{REPOSITORY}' cannot be fetched from http"):
        load_backbone(source)
    hub.odd = lambda handler, body: False
    assert all(map(torch.equal, load_backbone(source).state_dict().values(), tiny_model().state_dict().values()))


def test_a_mirror_that_sends_whole_files_only(hub: Hub) -> None:
    def whole(handler: BaseHTTPRequestHandler, body: bool) -> bool:
        del handler.headers["Range"]
        return False

    hub.odd = whole
    checkpoint = Checkpoint.open(REPOSITORY)
    checkpoint.require_weights()
    assert torch.equal(checkpoint.null_text, tiny_model().null_text())


def test_a_full_disk_of_the_cache_is_told_as_one(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    assert f"cannot be kept in the hub's cache {tmp_path}/cache: No space left on device" in said()


def test_what_was_fetched_before_serves_while_the_hub_is_down(hub: Hub) -> None:
    source = Checkpoint.open(REPOSITORY).source
    load_backbone(source.part("transformer"))
    hub.odd = lambda handler, body: answer(handler, 503)
    again = Checkpoint.open(REPOSITORY, COMMIT)
    assert again.source == source
    load_backbone(again.transformer)


def test_names_that_were_meant(hub: Hub, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(model, tmp_path / "runs" / "model")
    for name, meant in {
        "runs/modle": "runs/model",
        "./runs/modle": "runs/model",
        str(tmp_path / "runs" / "modl"): str(tmp_path / "runs" / "model"),
        "runs": "runs/model",
        "runs/model/vae": "runs/model",
        "embeded": "embedded",
    }.items():
        with pytest.raises(CheckpointError, match=rf"; did you mean (.*/)?{meant}\?$"):
            Checkpoint.open(name)
    for name in ("runs/model/model_index.json", "runs/model/transformer/config.json"):
        with pytest.raises(CheckpointError, match=f"model={name} is no folder; name the folder of a model"):
            Checkpoint.open(name)
    with pytest.raises(CheckpointError, match="model=: no such folder here"):
        Checkpoint.open("")
    with pytest.raises(ConfigError, match="revision=: is empty; leave it out"):
        Checkpoint.open(REPOSITORY, "")
    with pytest.raises(ConfigError, match="revision=main: model=embedded comes with this package, only hub ids"):
        Checkpoint.open("embedded", "main")
    assert Checkpoint.open("~/runs/model").source.location == str(tmp_path / "runs" / "model")
