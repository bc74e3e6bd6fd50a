"""The settings of a server: those of its videos, the pool that renders them, and where it listens."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.settings import SERVED_SEGMENT, FarmConfig, validate_farm
from pavdm_dist.values.fields import Within


@dataclass
class HttpConfig:
    """Where a server listens, and what it takes."""

    host: str = "127.0.0.1"  # beyond the loopback clients need a token
    port: Annotated[int, Within(0, 65_535)] = 8000  # 0 = one that is free
    # who may use it; auto: whoever has the token, on the loopback everybody. PAVDM_SERVE_TOKEN, or OUT/serve.token
    auth: Literal["auto", "token", "none"] = "auto"
    max_queue: Annotated[int, Within(0, 1_000_000, above=True)] = 256  # unfinished videos; more are told to wait
    max_seconds: Annotated[float, Within(0, 1_000_000_000, above=True)] = 3600.0  # longest video of one request
    # largest picture of one request, in pixels; null = four times that of the server's own settings
    max_pixels: Annotated[int, Within(0, 1_000_000_000, above=True)] | None = None
    max_body_mib: Annotated[float, Within(0, 1_000_000, above=True)] = 64.0  # largest request


@dataclass
class ServeConfig(FarmConfig):
    """Everything ``pavdm serve`` knows."""

    chunks_per_segment: Annotated[int, Within(0, 1_000_000, above=True)] = SERVED_SEGMENT  # what a viewer waits for
    http: HttpConfig = field(default_factory=HttpConfig)


def validate_serve(config: ServeConfig) -> None:
    """Refuse settings that contradict one another.

    Raises:
        ConfigError: with the field, its value and what is legal.
    """
    validate_farm(config)
    if config.farm.trace:
        raise ConfigError(
            "farm.trace=true: is held in the stages' memory until a renderer ends, and a server's does not"
        )
    if not config.http.host.strip():
        raise ConfigError("http.host: name an address, as 127.0.0.1 or 0.0.0.0")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def asks_for_token(config: HttpConfig) -> bool:
    """Whether clients need the token."""
    return config.auth == "token" or (config.auth == "auto" and not is_loopback(config.host))
