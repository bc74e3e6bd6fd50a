"""The server as an application of Ray Serve, for clusters that keep one alive (KubeRay's RayService)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from anyio.to_thread import run_sync

from pavdm_dist.errors import ConfigError
from pavdm_dist.serve.settings import ServeConfig, asks_for_token, validate_serve
from pavdm_dist.serve.tokens import TOKEN, given_token


def application(args: dict[str, Any]) -> Any:
    """What ``serveConfigV2`` names as ``import_path``.

    One replica: it is the one that renders what waits in the folder. Ray Serve starts it again, elsewhere if need be,
    and it goes on with what is there.

    Args:
        args: ``out``, the folder of the videos, and ``settings``, a list of ``key=value``.

    Raises:
        ConfigError: an argument that is none, or settings that cannot be.
    """
    from ray import serve

    out, config = checked(args)
    settings = args.get("settings", [])
    _token_for(config)
    server = serve.deployment(name="Server", num_replicas=1, max_ongoing_requests=1000)
    return server(serve.ingress(lambda: build(out, settings))()).bind()


def build(out: str, settings: Sequence[str]) -> Any:
    """The ASGI application; its videos are rendered from its start-up to its shutdown.

    Raises:
        PAVDMError: as :func:`~pavdm_dist.serve.run.serve_command`.
    """
    from pavdm_dist.farm.kinds import Kinds
    from pavdm_dist.serve.app import make_app
    from pavdm_dist.serve.asked import tree_at
    from pavdm_dist.serve.front import Front
    from pavdm_dist.serve.front_desk import FrontDesk

    config = _config(settings)
    token = _token_for(config)
    desk = FrontDesk(config, Kinds(config), tree_at(out))

    @asynccontextmanager
    async def life(_: Any) -> AsyncIterator[None]:
        await run_sync(desk.open)
        try:
            yield
        finally:
            await run_sync(desk.close)

    return make_app(Front(desk), token, life)


def _token_for(config: ServeConfig) -> str | None:
    """What clients need; asked where the service is made known, and again where the replica runs, which has its own
    environment."""
    if not asks_for_token(config.http):
        return None
    token = given_token()
    if token is None:
        raise ConfigError(f"http.auth: set {TOKEN} for the replica, from a Secret")
    return token


def _config(settings: Sequence[str]) -> ServeConfig:
    from pavdm_dist.values.merging import load_config

    config = load_config(ServeConfig, None, settings)
    validate_serve(config)
    return config


def checked(args: dict[str, Any]) -> tuple[str, ServeConfig]:
    """The folder and the settings that the arguments of :func:`application` say.

    Raises:
        ConfigError: as there.
    """
    out, settings = args.get("out"), args.get("settings", [])
    if set(args) - {"out", "settings"} or not isinstance(out, str) or not isinstance(settings, list):
        raise ConfigError(f"args={args}: must be out, a folder, and settings, a list of key=value")
    return out, _config(settings)
