"""A cluster that adds nodes on demand, by Ray's own autoscaler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from pavdm_dist.train.ranks import free_port

NOTHING = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "rsync_filter",
    "head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude", "cluster_synced_files",
)  # fmt: skip


@contextmanager
def growing_cluster() -> Iterator[str]:
    """The address of a cluster of a head without CPUs, and up to two nodes of two."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        address = f"127.0.0.1:{port}"
        kinds = {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        }
        settings = {
            "cluster_name": "fake", "max_workers": 2, "idle_timeout_minutes": 5, "upscaling_speed": 1, "auth": {},
            "provider": {"type": "fake_multinode", "gcs_address": address}, "available_node_types": kinds,
            "head_node_type": "ray.head.default", "head_node": {}, "worker_nodes": {}, "file_mounts": {},
            "file_mounts_sync_continuously": False, **{name: [] for name in NOTHING},
        }  # fmt: skip
        (Path(folder) / "scaler").write_text(json.dumps(settings))
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", f"--temp-dir={folder}/r",
            "--num-cpus=0", "--object-store-memory=83886080", "--include-dashboard=false", "--disable-usage-stats",
            f"--autoscaling-config={folder}/scaler", "--node-ip-address=127.0.0.1",
        ]  # fmt: skip
        try:
            subprocess.run(command, env=scaler_environment(), timeout=100, check=True, capture_output=True)
            yield address
        finally:
            for process in psutil.process_iter(["cmdline"]):
                if any(folder in word for word in process.info["cmdline"] or []):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()


def scaler_environment() -> dict[str, str]:
    """For commands of such a cluster, and its own."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "WORLD_SIZE")}
    return {**kept, "RAY_AUTH_MODE": "disabled", "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
