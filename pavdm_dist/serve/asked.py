"""What a server keeps of a request, and where: when it was made, and a manifest of its one shot."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.tree import Tree
from pavdm_dist.io.remote import is_remote
from pavdm_dist.io.storage import atomic_write, join, list_names, open_read
from pavdm_dist.values.fields import json_value

# The first file in a video's folder.
REQUEST = "request.json"


def tree_at(out: str) -> Tree:
    """A server's folder by its whole path: whoever reads what it writes of its files may stand elsewhere.

    Raises:
        ConfigError: it is a file or no name, or what a server writes in it cannot be written.
    """
    tree = Tree(out if is_remote(out) or not out else os.path.abspath(out))
    tree.check_writable(traces=False)
    return tree


@contextmanager
def folder_errors(tree: Tree) -> Iterator[None]:
    """What a system says of a file that cannot be used, as one sentence.

    Raises:
        ConfigError: naming the file, and ``out`` where it is in that folder.
    """
    try:
        yield
    except OSError as error:
        place = str(error.filename or tree.root)
        field = "out=" if place.startswith(tree.root) else ""
        raise ConfigError(f"{field}{place}: cannot be used: {error.strerror or error}") from error


def keep_time(tree: Tree, id: str, created_at: int) -> None:
    """Says when a video was asked for, seconds since 1970.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_write(join(tree.folder(id), REQUEST), "w") as file:
        file.write(f'{{"created_at": {created_at}}}\n')


def created_at(tree: Tree, id: str) -> int | None:
    """When a video was asked for here, seconds since 1970; None of what only a farm was asked for."""
    try:
        with open_read(join(tree.folder(id), REQUEST)) as file:
            return int(json_value(file.read())["created_at"])
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return None


def manifest_name(stamp: int, id: str) -> str:
    """The manifest of one video. They are read in the order of their names: a restart knows who came first.

    Args:
        stamp: nanoseconds since 1970.
        id: of the video.
    """
    return f"{stamp:020d}-{id}.jsonl"


def manifests_of(tree: Tree, id: str) -> list[str]:
    """Names of the manifests that have this video alone; those of farms have others besides."""
    own = re.compile(rf"\d{{20}}-{re.escape(id)}\.jsonl")
    return [name for name in list_names(tree.path("manifests")) if own.fullmatch(name)]
