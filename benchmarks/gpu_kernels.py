"""What a GPU's kernels take, for `gpu.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMED = 16  # kernels that are told by name


def kernels_of(call: Callable[[], object], parts: Callable[[], int]) -> dict[str, Any]:
    """Kernels' seconds and launches in a call, waits for the device, and the kernels that take most of it.

    Args:
        call: what is looked at.
        parts: how many equal parts the call had, asked behind it; all numbers but that of the waits are of one.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    # Launches and waits are events of CUDA's own; those of torch's operations beside them take a minute to sort.
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    events, count = profiler.key_averages(), parts()
    # What called a kernel counts its time a second time.
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    longest = sorted(kernels, key=lambda event: -event.self_device_time_total)[:NAMED]
    return {
        "kernel_seconds": sum(event.self_device_time_total for event in kernels) / 1e6 / count,
        "launches": sum(event.count for event in events if "LaunchKernel" in event.key) / count,
        "waits_in_all": sum(event.count for event in events if event.key.endswith("Synchronize")),
        "longest_kernels": {
            event.key[:80]: [event.count / count, event.self_device_time_total / 1e6 / count] for event in longest
        },
    }
