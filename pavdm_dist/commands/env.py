"""``pavdm env``: what a bug report needs to know about a machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from pavdm_dist.io.metadata import versions
from pavdm_dist.redaction import hide_secrets


def environment() -> dict[str, Any]:
    """Versions, processors, memory in GiB, GPUs and what Ray would connect to; starts and connects nothing."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    running = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "gpus": gpus,
        "nccl": torch.distributed.is_available() and torch.distributed.is_nccl_available(),
        "ray": {
            "RAY_ADDRESS": hide_secrets(os.environ.get("RAY_ADDRESS", "")) or None,
            "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE"),
            "last_cluster_started_here": running.read_text().strip() if running.is_file() else None,
        },
    }
