"""Components of a model that lie in several places, as published ones do, put together in one folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.io.folders import without_hidden
from pavdm_dist.models.components import WEIGHTS, link_or_copy
from pavdm_dist.models.loading import has_weights
from pavdm_dist.models.source import Source, load_config, named_class

# What tells a tokenizer's folder, and what belongs to one that lies among other files.
_TOKENIZER = ("tokenizer.json", "spiece.model", "tokenizer_config.json")
_TOKENIZER_FILES = (*_TOKENIZER, "special_tokens_map.json", "added_tokens.json")
_CONFIG = ("config.json",)
# Of a published file: owner/name, perhaps @revision, then its place in there.
_ON_HUB = re.compile(r"(?P<id>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?")


@dataclass(frozen=True)
class Component:
    """A component that does not come from the base.

    Attributes:
        name: of its folder in a model.
        source: its files, which may lie among others.
        patterns: of the files' names.
    """

    name: str
    source: Source
    patterns: tuple[str, ...]

    @classmethod
    def of(cls, name: str, place: str) -> Component:
        """What a user names: a folder or hub id that is the component, or has it as a model has.

        Raises:
            CheckpointError: neither, or the hub does not deliver.
            ConfigError: it is named in a way that nothing is.
        """
        component = cls.in_place(name, place)
        if component is None:
            missing = Source.of(place, field=name).missing((_TOKENIZER if name == "tokenizer" else _CONFIG)[0])
            raise CheckpointError(f"{name}={place}: {missing}")
        return component

    @classmethod
    def in_place(cls, name: str, place: str) -> Component | None:
        """As :meth:`of`; None where it is neither."""
        found = Source.of(place, field=name)
        marks = _TOKENIZER if name == "tokenizer" else _CONFIG
        if any(found.find(f"{name}/{mark}") is not None for mark in marks):
            source = found.part(name)
        elif any(found.find(mark) is not None for mark in marks):
            source = found
        else:
            return None
        if name == "tokenizer":
            return cls(name, source, _TOKENIZER_FILES)
        # Repositories may hold the same weights several times; what could run code is only taken where nothing else is.
        return cls(name, source, ("*.json", "*.safetensors" if has_weights(source) else "*.bin"))

    def write(self, folder: Path) -> None:
        """Its files, in a new folder of its name in ``folder``; weights are linked where the disk allows it."""
        target = folder / self.name
        target.mkdir()
        here = self.source.folder(self.patterns)
        for file in without_hidden(here.iterdir()):
            if file.is_file() and any(fnmatch(file.name, pattern) for pattern in self.patterns):
                link_or_copy(str(file), str(target / file.name))

    def kind(self) -> str | None:
        """The class that its ``config.json`` names."""
        return named_class(self.source)


def published_file(place: str) -> Path:
    """A published file of weights, or a folder of them: on this machine, or fetched from the hub.

    Args:
        place: a path; ``owner/name`` for the safetensors files of a repository or of its ``transformer``;
            ``owner/name/FILE`` for one file. ``owner/name@REVISION`` names a branch, tag or commit.

    Raises:
        CheckpointError: the hub has no such repository or file, or does not deliver.
        ConfigError: an empty revision.
    """
    path = Path(os.path.expanduser(place))
    match = _ON_HUB.fullmatch(place)
    # Two words of which the last is a file's name are a path that is not there.
    if os.path.lexists(path) or match is None or (match["file"] is None and path.suffix in WEIGHTS):
        return path
    source = Source.of(match["id"], match["revision"], field="source")
    if match["file"] is not None:
        return source.file(match["file"])
    inside = source.find("transformer/config.json") is not None
    return (source.part("transformer") if inside else source).folder(("*.safetensors", "*.safetensors.index.json"))


def check_fit(components: Iterable[Component], latent_channels: int, text_dim: int) -> None:
    """Refuses a codec or text encoder of another width than the transformer's, from configurations alone.

    Raises:
        ConfigError: naming the setting and both widths.
    """
    from pavdm_dist.codecs.catalog import codec_spec

    for component in components:
        place = f"{component.name}={component.source}"
        if component.name == "vae" and (found := codec_spec(component.source).latent_channels) != latent_channels:
            raise ConfigError(f"{place}: has {found} latent channels, the transformer takes {latent_channels}")
        if component.name == "text_encoder":
            config = load_config(component.source)
            width = config.get("text_dim", config.get("d_model"))
            if width != text_dim:
                raise ConfigError(f"{place}: gives {width} channels, the transformer takes {text_dim}")
