"""Where a model's files are: a folder, or a repository on the hub. It travels to the nodes, and each opens it there."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pavdm_dist import __version__
from pavdm_dist.errors import CheckpointError, ConfigError, first_line
from pavdm_dist.io.shipped import shipped_models
from pavdm_dist.models.hub import hub_errors
from pavdm_dist.models.nearby import near_name
from pavdm_dist.values.fields import made, read_object

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """A model, or one of its components.

    Attributes:
        location: absolute path of a folder, a name of a model that comes with the package, which lies elsewhere on
            every machine, or a hub id.
        revision: of a hub id: branch, tag or commit; None = the default branch.
        component: folder inside, such as ``transformer``; "" = all of it.
        adapters: what is added to its weights as they are loaded.
    """

    location: str
    revision: str | None = None
    component: str = ""
    adapters: tuple[Adapter, ...] = ()

    @classmethod
    def of(cls, place: str | Path | Source, revision: str | None = None, field: str = "model") -> Source:
        """What a user names: a model that comes with the package, a folder, made absolute because others work in other
        folders, else a hub id.

        Args:
            place: which.
            revision: of a hub id.
            field: the setting it was named in, for messages.

        Raises:
            ConfigError: a revision of what has none.
            CheckpointError: none of these, with what may have been meant.
        """
        if isinstance(place, Source):
            return place
        name = os.path.expanduser(place)
        if revision == "":
            raise ConfigError("revision=: is empty; leave it out for the default branch")
        is_shipped = name in shipped_models()
        if is_shipped or os.path.isdir(name):
            if revision is not None:
                kind = "comes with this package" if is_shipped else "is a folder"
                raise ConfigError(f"revision={revision}: {field}={place} {kind}, only hub ids have revisions")
            return cls(name if is_shipped else os.path.abspath(name))
        if os.path.lexists(name):
            raise CheckpointError(f"{field}={place} is no folder; name the folder of a model")
        if os.path.isabs(name):
            raise CheckpointError(f"{field}={place}: no such folder{near_name(name)}")
        if "/" not in name:
            raise CheckpointError(f"{field}={place}: no such folder here, and hub ids are owner/name{near_name(name)}")
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:  # at once: without a network the hub's library tries for half a minute
            validate_repo_id(name)
        except HFValidationError as error:
            reason = first_line(error)
            raise CheckpointError(
                f"{field}={name!r} is no folder here and no hub id: {reason}{near_name(name)}"
            ) from error
        return cls(name, revision)

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.location}{at}/{self.component}" if self.component else f"{self.location}{at}"

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, or comes with the package, and is not on the hub."""
        return os.path.isabs(self.location) or "/" not in self.location

    def part(self, component: str) -> Source:
        """One of its components."""
        return replace(self, component=component)

    def find(self, name: str) -> Path | None:
        """A file of it on this machine, fetched from the hub where it is not here yet; None where there is none.

        Raises:
            CheckpointError: the folder is not on this machine, or the hub does not deliver.
        """
        if self.is_folder:
            path = self._here() / name
            return path if os.path.exists(path) else None
        if self._is_known_absent(name):
            return None
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        with self._hub():
            try:
                return Path(hf_hub_download(self.location, self._inside(name), revision=self.revision))
            except LocalEntryNotFoundError:
                if not constants.HF_HUB_OFFLINE:
                    raise
                return None
            except EntryNotFoundError:
                return None

    def has(self, name: str) -> bool:
        """Whether there is such a file, without a network: here; nothing is fetched."""
        if self.is_folder or self.cached(name) is not None:
            return self.find(name) is not None
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError

        if constants.HF_HUB_OFFLINE or self._is_known_absent(name):
            return False
        with self._hub():
            try:
                get_hf_file_metadata(hf_hub_url(self.location, self._inside(name), revision=self.revision))
            except EntryNotFoundError:
                return False
            return True

    def file(self, name: str) -> Path:
        """As :meth:`find`, for a file that must be there.

        Raises:
            CheckpointError: also when it is missing.
        """
        path = self.find(name)
        if path is None:
            raise CheckpointError(self.missing(name))
        return path

    def missing(self, name: str = "") -> str:
        """Why a file, or all of it, was not found, for a message."""
        return f"{self}{name and f'/{name}'} is {self.offline or 'missing: this is no model folder'}"

    @property
    def offline(self) -> str | None:
        """Where nothing may be fetched: what that means for a file that was not found; else None."""
        from huggingface_hub import constants

        if self.is_folder or not constants.HF_HUB_OFFLINE:
            return None
        return f"not in the hub's cache {constants.HF_HUB_CACHE}, and with HF_HUB_OFFLINE set nothing is fetched"

    def cached(self, name: str) -> Path | None:
        """A file of it, if it is on this machine already."""
        if self.is_folder:
            return self.find(name)
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.location, self._inside(name), revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def header(self, name: str) -> dict[str, Any]:
        """Tensors (``dtype``, ``shape``, ``data_offsets``) of a safetensors file on the hub; nothing else is read.

        Raises:
            CheckpointError: no such file, or a damaged one; or nothing may be fetched.
        """
        if self.offline:
            raise CheckpointError(self.missing(name))
        from huggingface_hub import HfApi
        from huggingface_hub.errors import SafetensorsParsingError

        with self._hub():
            try:
                where = self._inside(name)
                return HfApi().parse_safetensors_file_metadata(self.location, where, revision=self.revision).tensors
            except SafetensorsParsingError as error:
                raise CheckpointError(f"{self}/{name} is not a readable safetensors file: {error}") from error

    def read(self, name: str, first: int, size: int) -> bytes:
        """Bytes ``first .. first + size - 1`` of a file on the hub.

        Raises:
            CheckpointError: they did not come, or nothing may be fetched.
        """
        if self.offline:
            raise CheckpointError(self.missing(name))
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        with self._hub():
            url = hf_hub_url(self.location, self._inside(name), revision=self.revision)
            wanted = {"range": f"bytes={first}-{first + size - 1}"}
            response = get_session().get(url, headers={**build_hf_headers(), **wanted})
            hf_raise_for_status(response)
            if len(response.content) == size:
                return response.content
        # A mirror that knows no parts of files sends all of it.
        with open(self.file(name), "rb") as file:
            file.seek(first)
            content = file.read(size)
        if len(content) != size:
            raise CheckpointError(f"{self}/{name}: {size} bytes were asked for, it has {len(content)}")
        return content

    def folder(self, patterns: Sequence[str] = ("*",)) -> Path:
        """All of it as a folder on this machine; a component on the hub is fetched whole.

        Args:
            patterns: of the names of the files that must be there.

        Raises:
            CheckpointError: there is none, or the hub does not deliver.
        """
        if self.is_folder:
            return self._here()
        from huggingface_hub import snapshot_download

        with self._hub():
            wanted = [self._inside(pattern) for pattern in patterns]
            path = Path(snapshot_download(self.location, revision=self.revision, allow_patterns=wanted), self.component)
        if not path.is_dir():
            raise CheckpointError(self.missing())
        return path

    def pinned(self, name: str) -> Source:
        """The same at the commit that ``name`` comes from now, so that every node opens the same files."""
        if self.is_folder:
            return self
        # The cache keeps a repository's files under its commit.
        return replace(self, revision=self.file(name).parents[name.count("/")].name)

    def _here(self) -> Path:
        here = socket.gethostname()
        root = Path(self.location) if os.path.isabs(self.location) else shipped_models().get(self.location)
        if root is None:
            raise CheckpointError(f"model={self.location} is not in pavdm_dist {__version__} on {here}")
        path = root / self.component
        if not path.is_dir():
            if root.is_dir():
                raise CheckpointError(f"{path} does not exist in the checkpoint on {here}")
            raise CheckpointError(
                f"{path} is not on {here}: a model folder must have the same path on every node; "
                "hub ids are fetched by each"
            )
        return path

    def _is_known_absent(self, name: str) -> bool:
        """Whether the hub said before that this commit has no such file: then it need not be asked, nor be up."""
        from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

        pinned = self.revision is not None and _COMMIT.fullmatch(self.revision) is not None
        where = self._inside(name)
        return pinned and try_to_load_from_cache(self.location, where, revision=self.revision) is _CACHED_NO_EXIST

    def _inside(self, name: str) -> str:
        return f"{self.component}/{name}" if self.component else name

    def _hub(self) -> AbstractContextManager[None]:
        return hub_errors(self.location, self.revision, self.offline)


def load_config(source: str | Path | Source) -> dict[str, Any]:
    """``config.json`` of a component.

    Raises:
        CheckpointError: missing or not a JSON object.
    """
    return read_object(Source.of(source).file("config.json"), CheckpointError)


@dataclass(frozen=True)
class _ClassNames:
    _class_name: str | None = None
    architectures: tuple[str, ...] = ()


def class_names(config: Mapping[str, Any], where: object) -> list[str]:
    """The classes that a ``config.json`` names: diffusers' ``_class_name``, then transformers' ``architectures``.

    Args:
        config: what the file holds.
        where: it is, for the message.

    Raises:
        CheckpointError: a name that is no text.
    """
    names = made(_ClassNames, config, where, ignore_unknown=True, error=CheckpointError)
    return [*([names._class_name] if names._class_name else ()), *names.architectures]


def named_class(source: Source) -> str | None:
    """The first of the :func:`class_names` of a component; None where it names none.

    Raises:
        CheckpointError: there is no ``config.json``, or a name that is no text.
    """
    return next(iter(class_names(load_config(source), f"{source}/config.json")), None)


@dataclass(frozen=True)
class Adapter:
    """A low-rank change of a model's weights (LoRA): a folder or hub id, and how strong it is; 1 is as trained."""

    source: Source
    scale: float = 1.0
