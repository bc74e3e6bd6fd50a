"""``pavdm serve`` under Ray Serve, as KubeRay's RayService starts it."""

from __future__ import annotations

import importlib
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from helpers import tiny_checkpoint
from needs import needs

from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.tree import Tree
from pavdm_dist.serve.deployment import application, build, checked
from pavdm_dist.serve.tokens import TOKEN

needs("needs pavdm-dist[serve]", "fastapi", "multipart", "prometheus_client", "uvicorn", "websockets")
MANIFEST = Path(__file__).parent.parent / "cluster" / "kuberay" / "rayservice.yaml"


def config_of_manifest() -> dict[str, Any]:
    return yaml.safe_load(yaml.safe_load(MANIFEST.read_text())["spec"]["serveConfigV2"])


def test_the_service_names_an_application_with_arguments_that_it_takes() -> None:
    (app,) = config_of_manifest()["applications"]
    module, _, name = app["import_path"].partition(":")
    assert getattr(importlib.import_module(module), name) is application
    out, config = checked(app["args"])
    assert (out, config.http.host, config.num_stages) == ("/output/videos", "0.0.0.0", 0)
    for wrong in ({"out": 7}, {"out": "/o", "setting": []}, {"out": "/o", "settings": "seed=3"}):
        with pytest.raises(ConfigError, match="must be out, a folder"):
            checked(wrong)
    with pytest.raises(ConfigError, match="no such key"):
        checked({"out": "/o", "settings": ["http.hots=0.0.0.0"]})


def test_ray_serve_takes_the_services_config(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="needs ray[serve]", exc_type=ImportError)
    read = schema.ServeDeploySchema.model_validate(config_of_manifest())
    (app,) = read.applications
    (deployment,) = app.deployments
    assert (read.http_options.host, read.http_options.port, app.route_prefix) == ("0.0.0.0", 8000, "/")
    assert deployment.num_replicas == 1  # two would render each other's videos only by turns
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(ConfigError, match=f"set {TOKEN}"):
        application(app.args)
    monkeypatch.setenv(TOKEN, "x" * 20)
    assert application(app.args)._bound_deployment.name == deployment.name


def test_a_replica_without_the_token_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has an environment of its own."""
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(ConfigError, match=f"set {TOKEN}"):
        build("unused", ["http.host=0.0.0.0"])


def test_the_application_renders_from_its_start_up_to_its_shutdown(tmp_path: Path) -> None:
    import uvicorn

    model, out = tiny_checkpoint(tmp_path / "model"), str(tmp_path / "out")
    server = uvicorn.Server(
        uvicorn.Config(build(out, [f"model={model}"]), log_config=None, access_log=False, lifespan="on")
    )
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/videos"
        try:
            while not server.started:
                time.sleep(0.02)
            ids = [
                httpx.post(url, json={"prompt": "a", "seconds": length}, timeout=60).json()["id"]
                for length in (0.5, 60)
            ]
            while httpx.get(f"{url}/{ids[0]}", timeout=60).json()["status"] != "completed":
                time.sleep(0.02)
            while Tree(out).state(ids[1]).standing != "running":
                time.sleep(0.02)
        finally:
            server.should_exit = True
            thread.join(timeout=60)
    assert [Tree(out).state(id).standing for id in ids] == ["done", "begun"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_serve_runs_it(tmp_path: Path) -> None:
    serve = pytest.importorskip("ray.serve", reason="needs ray[serve]", exc_type=ImportError)
    pytest.importorskip("watchfiles", reason="needs ray[serve]")
    import ray

    model = tiny_checkpoint(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(address="local", num_cpus=2, object_store_memory=100 * 2**20, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        args = {"out": str(tmp_path / "out"), "settings": [f"model={model}"]}
        serve.run(application(args), name="pavdm", route_prefix="/")
        url = f"http://127.0.0.1:{port}/v1/videos"
        id = httpx.post(url, json={"prompt": "a red three", "seconds": 2}, timeout=60).json()["id"]
        with httpx.stream("GET", f"{url}/{id}/live", timeout=120) as answer:
            data = answer.read()
        assert b"ftyp" in data[:16] and httpx.get(f"{url}/{id}", timeout=60).json()["status"] == "completed"
        long = httpx.post(url, json={"prompt": "a red three", "seconds": 600}, timeout=60).json()["id"]
        while not Tree(args["out"]).seconds_rendered(long):
            time.sleep(0.1)
        serve.delete("pavdm")
        # The replica has saved what was under way, and let go of it.
        assert Tree(args["out"]).state(long).standing == "begun"
    finally:
        serve.shutdown()
        ray.shutdown()
