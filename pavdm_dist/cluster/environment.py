"""What of the driver's environment its actors need on other machines, and what an actor finds out about its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from pavdm_dist.errors import ConfigError

logger = logging.getLogger(__name__)

# Links, the hub, compiled kernels, and what GPUs may round by; never what belongs to one machine, such as PATH.
PREFIXES = ("GLOO_", "NCCL_", "TORCH_GLOO_", "TORCH_NCCL_", "TORCHINDUCTOR_", "HF_", "HUGGING_FACE_")
# Not what torch reads when it is imported, as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE: an actor has it by then.
NAMES = ("NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
# Of these, names of folders and files, which may be relative; actors work in other folders.
_PATHS_OF, _PATHS = ("HF_", "HUGGING", "TORCHINDUCTOR_"), ("_HOME", "_HUB_CACHE", "_PATH", "_DIR", "_FILE")


def handed_on(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that actors get from the driver.

    They travel as an argument of the actors, not as Ray's runtime environment: that one Ray shows in its dashboard, and
    there is a token among these (``HF_TOKEN``), and passwords of proxies. Values must not be logged.
    """
    taken = {
        name: value
        for name, value in environment.items()
        if name.startswith(PREFIXES) or name in NAMES or name.lower() in PROXIES
    }
    for name, value in taken.items():
        if value and name.startswith(_PATHS_OF) and name.endswith(_PATHS):
            taken[name] = os.path.abspath(os.path.expanduser(value))
    return taken


def take_on(handed: Mapping[str, str]) -> None:
    """In an actor, before anything reads them: sets the variables that its machine does not set for itself.

    What a node's Ray was started with stays, because folders and interfaces may have other names there.
    """
    own = {name.lower() for name in os.environ}
    taken = {name: value for name, value in handed.items() if name.lower() not in own}
    os.environ.update(taken)
    if taken:
        logger.info("from the driver's environment: %s", ", ".join(sorted(taken)))


def choose_interface(address: str) -> None:
    """In an actor, before its first gloo group: gloo takes the interface that carries the node's address in Ray's eyes.

    By itself it takes what the machine's own name stands for, which is often loopback, or a network that the other
    machines are not on. A variable that is set already stays.

    Args:
        address: of this node.

    Raises:
        ConfigError: a variable names an interface that is not here.
    """
    _check_interfaces()
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := _interface(address)) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _interface(address: str) -> str | None:
    """The interface with this address; None where the address is translated on its way (NAT)."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None


def _check_interfaces() -> None:
    """gloo's own words for an interface that is not there name neither the node nor what it has."""
    import psutil
    import ray

    there = list(psutil.net_if_addrs())
    for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(","):
        if name and name not in there:
            raise ConfigError(
                f"GLOO_SOCKET_IFNAME={name}: node {ray.util.get_node_ip_address()} has no such interface, but"
                f" {', '.join(there)}; leave it unset, or set it where that node's Ray is started"
            )
