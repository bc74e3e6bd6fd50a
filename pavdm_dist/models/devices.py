"""Where a model computes, and in which type: what ``auto`` means, and what cannot be."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pavdm_dist.errors import ConfigError, first_line
from pavdm_dist.io.metadata import cpu_model
from pavdm_dist.models.loading import stored_dtype
from pavdm_dist.models.source import Source

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# What the system shows of NVIDIA's GPUs, and what hides them from torch.
_GPU_FILES, _HIDDEN = "/dev/nvidia[0-9]*", ("", "-1")

logger = logging.getLogger(__name__)


def choose_device(device: str | torch.device, field: str = "device") -> torch.device:
    """The device of a name, the value of a setting; ``auto`` is this process' GPU where it has one, else the CPU.

    Raises:
        ConfigError: a GPU that is not there or cannot be used, or no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"{field}={device}: must be auto, cpu or cuda") from error
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cpu" and chosen.index):
        raise ConfigError(f"{field}={device}: must be auto, cpu or cuda")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{field}={device}: this process sees {torch.cuda.device_count()} GPUs; use {field}=cpu")
    if chosen.type == "cuda":
        try:
            torch.empty(1, device=chosen)
        except (RuntimeError, AssertionError) as error:  # a driver that does not fit, a broken or a full GPU
            reason = first_line(error)
            raise ConfigError(f"{field}={device}: the GPU cannot be used ({reason}); use {field}=cpu") from error
    return chosen


def idle_gpus(on_stages: bool) -> str:
    """What to say of GPUs of this machine that ``device=auto`` leaves idle; empty where there are none.

    Args:
        on_stages: whether stages compute; ``auto`` means CPUs to them, and this process' GPU without them.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        return idle_on_stages(count, "this machine") if on_stages else ""
    here = sorted(glob.glob(_GPU_FILES))
    if not here or os.environ.get("CUDA_VISIBLE_DEVICES") in _HIDDEN:
        return ""
    return (
        f"{here[0]} is a GPU, but torch {torch.__version__} can use none: it was built without CUDA, or for a newer"
        " driver; this runs on the CPU (device=cpu says that it is meant)"
    )


def idle_on_stages(count: int, where: str) -> str:
    """What to say of so many GPUs beside stages on CPUs."""
    return (
        f"{count} GPUs of {where} stay idle: to stages device=auto means CPUs; device=cuda gives every stage a GPU"
        " (device=cpu says that it is meant)"
    )


def named_dtype(dtype: str | torch.dtype, device: torch.device, source: Source) -> torch.dtype:
    """The type of a name; ``auto`` is what the files of ``source`` hold on a GPU, and float32 on a CPU.

    Asks ``device`` for its kind alone, so that a process without a GPU can plan for the GPUs of others.

    Raises:
        ConfigError: no such type.
    """
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        name = "float32" if device.type == "cpu" else str(stored_dtype(source)).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype={name}: must be auto, {', '.join(list(DTYPES)[:-1])} or {list(DTYPES)[-1]}")
    return DTYPES[name]


def choose_dtype(dtype: str | torch.dtype, device: torch.device, source: Source) -> torch.dtype:
    """As :func:`named_dtype`, for a device of this process.

    Raises:
        ConfigError: no such type, or one that the device cannot compute in.
    """
    chosen = named_dtype(dtype, device, source)
    check_dtype("dtype", str(chosen).removeprefix("torch."), device)
    return chosen


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of main memory on a device; a GPU gets it from pinned memory, so that nobody waits for the copy."""
    place = torch.device(device)
    if place.type != "cuda" or tensor.is_cuda:
        return tensor.to(place)
    return tensor.pin_memory().to(place, non_blocking=True)


def device_model(device: torch.device) -> str:
    """What its bits depend on: the model of the GPU, or ``cpu`` and that of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {cpu_model()}"


def check_dtype(field: str, name: str, device: torch.device) -> None:
    """Refuses a type, the value of a setting, that a device of this process cannot compute in; warns of a slow one.

    Raises:
        ConfigError: naming the field.
    """
    if device.type == "cpu" and name == "float16":
        raise ConfigError(f"{field}=float16: a CPU computes in float32 or bfloat16; use one of them, or a GPU")
    if device.type == "cuda" and name == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"{field}=bfloat16: {torch.cuda.get_device_name(device)} cannot compute in it; use float16 or float32"
        )
    if name == "bfloat16":
        tell_of_slow_bfloat16(f"{field}={name}", device)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device of this process is as quick in bfloat16 as in float32; without, torch emulates its products."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # What torch itself asks before it gives a product of a CPU to oneDNN; its own loops take one number at a time.
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def tell_of_slow_bfloat16(setting: str, device: torch.device) -> None:
    """Warns where bfloat16, which ``setting`` asks for, is emulated."""
    if device.type == "cpu" and not computes_bfloat16(device):
        logger.warning(
            "%s: this CPU has no instructions for bfloat16; float32 is many times as fast here, in twice the memory",
            setting,
        )


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Torch computes on so many threads of the CPU meanwhile: the last bits of a result depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
