"""What actors get from the driver's environment, and where they listen: seen in real actors."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import tiny_checkpoint
from previews import light_frames

from pavdm_dist.cluster.environment import handed_on, take_on
from pavdm_dist.data.workers import workers
from pavdm_dist.engine.actors import _own_address
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.ray_engine import RayEngine
from pavdm_dist.errors import PAVDMError

pytestmark = pytest.mark.timeout(120)
SECRET = "hf_sesame"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def _seen(actor: Any) -> dict[str, str]:
    """The environment of an actor, as the hub's library and everything else in it sees it."""
    import ray

    def look(_: Any) -> dict[str, str]:
        from huggingface_hub import constants, get_token

        return {**os.environ, "cache": constants.HF_HUB_CACHE, "token": get_token() or ""}

    return ray.get(actor.__ray_call__.remote(look))


def test_actors_get_the_drivers_environment_and_keep_its_secret(
    ray_cluster: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("https_proxy", "http://user:word@proxy:3128")
    monkeypatch.setenv("SOME_OTHER", "1")
    with RayEngine(str(model / "transformer"), [(0, 2), (2, 4)], EngineOptions(2), light_frames(model)) as engine:
        assert engine._gang._cast.decoding is not None
        for actor in (*engine._gang._cast.stages, engine._gang._cast.decoding.actor):
            seen = _seen(actor)
            assert seen["cache"] == str(tmp_path / "hub") and seen["token"] == SECRET
            assert seen["NCCL_DEBUG"] == "WARN" and seen["https_proxy"] and "SOME_OTHER" not in seen
        first, node = engine._gang._cast.stages[0], ray.util.get_node_ip_address()
        interface = _seen(first)["GLOO_SOCKET_IFNAME"]
        assert node in [entry.address for entry in psutil.net_if_addrs()[interface]]
        sockets = psutil.Process(engine._gang._cast.places[0].pid).net_connections("tcp")
        listening = [socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN]
        # One port is Ray's own; the others are the rendezvous store's and gloo's.
        assert listening.count(node) >= len(listening) - 1 >= 2, listening
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    logs = [file for file in session.rglob("*") if file.is_file() and not file.is_symlink()]
    assert logs and not any(SECRET.encode() in file.read_bytes() for file in logs)


def test_the_store_listens_on_one_address_though_the_nodes_is_translated() -> None:
    """As in containers and clouds, where no interface has the address that others know a node by."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect(("198.51.100.7", 9))
        except OSError:
            pytest.skip("this machine has no way out, and so no address that others' would be translated to")
        own = asking.getsockname()[0]
    for host, expected in (("198.51.100.7", own), ("127.0.0.1", "127.0.0.1")):
        assert _own_address(host, socket.AF_INET) == expected


def test_what_a_node_sets_for_itself_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"HF_HOME": "/here", "HTTP_PROXY": "here"})
    take_on({"HF_HOME": "/there", "http_proxy": "there", "HF_ENDPOINT": "there"})
    assert os.environ == {"HF_HOME": "/here", "HTTP_PROXY": "here", "HF_ENDPOINT": "there"}


def test_only_what_others_need_is_handed_on() -> None:
    wanted = {"NCCL_IB_HCA": "mlx5", "GLOO_SOCKET_IFNAME": "eth1", "NO_PROXY": "10.0.0.0/8", "HF_HUB_OFFLINE": "1"}
    assert handed_on({**wanted, "PATH": "/bin", "HOME": "/root", "CUDA_VISIBLE_DEVICES": "0", "MY_HF_": "1"}) == wanted


def test_paths_mean_the_same_in_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    given = {"HF_HOME": "hf", "HF_HUB_CACHE": "~/hub", "HF_TOKEN_PATH": "", "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    wanted = {**given, "HF_HOME": f"{tmp_path}/hf", "HF_HUB_CACHE": "/home/me/hub"}
    assert handed_on(given) == wanted


@pytest.mark.slow
def test_an_interface_that_a_node_does_not_have_is_named(
    ray_cluster: None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    with pytest.raises(PAVDMError, match=r"GLOO_SOCKET_IFNAME=eth77: node .* has no such interface, but .*lo.*; leave"):
        RayEngine(str(model / "transformer"), [(0, 2), (2, 4)], EngineOptions(2))
    with RayEngine(str(model / "transformer"), [(0, 4)], EngineOptions(1)):
        pass  # has no links


def test_tasks_of_data_preparation_get_the_drivers_environment(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is imported for them that reads it."""
    monkeypatch.setenv("NCCL_OF_THIS_TEST", "http://mirror")  # workers may serve other tests afterwards
    monkeypatch.setenv("SOME_OTHER", "1")

    class Early:
        def __reduce__(self) -> Any:  # what a task brings along is read where it runs
            return os.getenv, ("NCCL_OF_THIS_TEST",)

    def task(early: str, length: int) -> int:
        return len(early) * length * ("SOME_OTHER" not in os.environ)

    with workers(1, "auto", 1, gpu=False) as run:
        assert sorted(run(task, [(Early(), 1), (Early(), 2)])) == [13, 26]
