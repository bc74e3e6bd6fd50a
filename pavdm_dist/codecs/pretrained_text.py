"""Large pretrained text encoders (UMT5 of the Wan family, T5 of Open-Sora): loaded elsewhere, and as rarely as can be.

An encoder may be larger than the model that reads its embeddings. It is loaded in a process of its own, which encodes
all prompts that are new and ends; nothing of it is left when rendering begins. What it gives is kept on disk, without
padding, under a hash of all that it depends on: a prompt is encoded once, and machines that render need no encoder.
"""

from __future__ import annotations

import hashlib
import html
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from pavdm_dist.cluster.starting import imports_from
from pavdm_dist.codecs.kept_embeddings import KeptEmbeddings
from pavdm_dist.codecs.newest import Newest
from pavdm_dist.errors import CheckpointError, ConfigError, first_line
from pavdm_dist.io.checksums import ends_digest
from pavdm_dist.io.folders import without_hidden
from pavdm_dist.io.remote import is_remote
from pavdm_dist.io.storage import atomic_write
from pavdm_dist.io.temporary import temporary_prefix
from pavdm_dist.models.devices import tell_of_slow_bfloat16
from pavdm_dist.models.source import Source, load_config, named_class
from pavdm_dist.values.fields import TextDevice, TextDtype

PRETRAINED = ("UMT5EncoderModel", "T5EncoderModel", "UMT5ForConditionalGeneration", "T5ForConditionalGeneration")
_SHOWN = 120

logger = logging.getLogger(__name__)


class TextSettings(Protocol):
    """What settings of verbs that may start a text encoder are called."""

    text_device: TextDevice
    text_dtype: TextDtype
    text_cache: str | None


@dataclass(frozen=True)
class TextOptions:
    """Where a pretrained text encoder computes, and where what it gives is kept.

    Attributes:
        device: ``auto`` is this machine's GPU where it has one with room for the encoder.
        dtype: what the encoder computes in, and embeddings are kept as.
        cache: folder; None = that of this user.

    Raises:
        ConfigError: ``cache`` is a store's address.
    """

    device: TextDevice = "auto"
    dtype: TextDtype = "bfloat16"
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.cache is not None and is_remote(self.cache):  # not a folder whose name begins so
            raise ConfigError(
                f"text_cache={self.cache}: must be a local folder, or one that is mounted; copy what is in"
                " the store there"
            )

    @classmethod
    def of(cls, settings: TextSettings) -> TextOptions:
        """Those of a verb's settings."""
        return cls(settings.text_device, settings.text_dtype, settings.text_cache)

    @property
    def given(self) -> list[tuple[str, str]]:
        """Settings that are not what they are by default, with their values."""
        return [(f"text_{name}", value) for name, value in asdict(self).items() if value != getattr(TextOptions, name)]


def _mended(prompt: str) -> str:
    if prompt.isascii() and "&" not in prompt:  # which ftfy leaves as it is
        return prompt
    import ftfy

    return ftfy.fix_text(prompt)


class PretrainedTextEncoder:
    """Prompts -> embeddings, from the cache or from a process that is started for it.

    Args:
        model: with ``text_encoder/`` and ``tokenizer/``.
        max_length: tokens of a prompt that the encoder was made for; further ones are cut, and said.
        options: see there.

    Attributes:
        encoded: prompts that a process was started for, so far.
    """

    def __init__(self, model: Source, max_length: int, options: TextOptions) -> None:
        self._encoder, self._tokenizer = model.part("text_encoder"), model.part("tokenizer")
        self.max_length, self.options = max_length, options
        config = load_config(self._encoder)
        self.text_dim = int(config["d_model"])
        # Open-Sora's T5 has met lower-case captions only.
        self._lower = not (named_class(self._encoder) or "").startswith("UMT5")
        self._checked = Newest()  # prompts that are not cut into tokens again to see whether all of them is read
        self._kept = KeptEmbeddings(options.cache, self.text_dim)
        self.encoded = 0

    @cached_property
    def identity(self) -> str:
        """Hash of weights, tokenizer, length and type.

        Of weights in a folder names, sizes and both ends are told, not all bytes. Where there are none, what is cached
        for this tokenizer and shape is taken to be theirs.

        Raises:
            CheckpointError: no weights, and nothing is cached.
        """
        facts = [self._weights, self._shape, self.max_length, self.options.dtype]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def prepare(self, prompts: Iterable[str]) -> None:
        """Encodes those of the prompts that are not cached, all of them in one process.

        Raises:
            CheckpointError: there are no weights to encode them with, these cannot be loaded, or no disk has room for
                what they give.
            ConfigError: a package is missing, or the device has no room.
        """
        cleaned = dict.fromkeys(self.cleaned(prompt) for prompt in prompts)
        missing = [text for text in cleaned if self._kept.find(self._key(text)) is None]
        if not missing:
            return
        logger.info("encoding %d prompts with %s", len(missing), self._encoder)
        for text, embedding in zip(missing, self._run(missing), strict=True):
            self.encoded += 1
            try:
                self._kept.keep(self._key(text), embedding)
            except OSError as error:
                reason = f"what it gives cannot be written: {error}"
                raise CheckpointError(f"text encoder {self._encoder}: {reason}") from error

    def encode(self, prompt: str) -> Tensor:
        """Float32 ``[L, text_dim]``, one row per token, no padding; raises as :meth:`prepare`."""
        key = self._key(self.cleaned(prompt))
        found = self._kept.find(key)
        if found is None:
            self.prepare([prompt])
            found = self._kept.find(key)
            assert found is not None
        return found.float()

    def check(self, prompt: str, limit: int) -> None:
        """Says which words are cut, once per prompt as long as it is among the newest; starts nothing.

        Raises:
            CheckpointError: there is no tokenizer.
            ConfigError: a package is missing.
        """
        if not self._checked.is_new(prompt):
            return
        if lost := self.unread(prompt, limit):
            logger.warning(
                "prompt %r has %d tokens, the text encoder takes %d: %r is not read",
                _short(prompt), len(self._token_ends(self.cleaned(prompt))), min(limit, self.max_length), _short(lost),
            )  # fmt: skip

    def unread(self, prompt: str, limit: int) -> str:
        """The words at a prompt's end that are cut; raises as :meth:`check`."""
        limit, text = min(limit, self.max_length), self.cleaned(prompt)
        ends = self._token_ends(text)
        # The last one kept is the end-of-text token.
        return text[ends[limit - 2] :].strip() if len(ends) > limit else ""

    def unknown_words(self, prompt: str) -> list[str]:
        """None: what is no word is read by its parts."""
        return []

    def cleaned(self, prompt: str) -> str:
        """What is encoded, as the models' own programs clean it: with plain quotes and whole characters, without HTML
        escapes and doubled spaces; lower case for T5."""
        return self._spaced(_mended(prompt))

    def is_mended(self, prompt: str) -> bool:
        """Whether quotes or characters are made plain before it is encoded, as videos of before had them not."""
        return self.cleaned(prompt) != self._spaced(prompt)

    def _spaced(self, prompt: str) -> str:
        text = " ".join(html.unescape(html.unescape(prompt)).split())
        return text.lower() if self._lower else text

    # --- what tells encoders apart -------------------------------------------------------------------------

    @cached_property
    def _shape(self) -> str:
        """Hash of configuration and tokenizer, which machines without an encoder have, too."""
        digest = hashlib.sha256(json.dumps(load_config(self._encoder), sort_keys=True).encode())
        for name in ("tokenizer.json", "spiece.model"):
            file = self._tokenizer.find(name)
            digest.update(b"" if file is None else name.encode() + file.read_bytes())
        return digest.hexdigest()

    @cached_property
    def _weights(self) -> str:
        if not self._encoder.is_folder:
            return str(self._encoder)
        folder = self._encoder.folder()
        files = without_hidden(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
        if not files:
            return self._known_weights()
        told = ends_digest(files)
        if self.folder is not None:
            try:
                with atomic_write(self._known(self.folder), "w") as aside:
                    json.dump({"weights": told, "model": str(self._encoder)}, aside)
            except OSError as error:
                self._kept.tell_unwritten(error)
        return told

    def _known_weights(self) -> str:
        """What machines with the weights have kept of them."""
        if self.folder is None:
            raise CheckpointError(f"{self._encoder} has no weights; text_cache=FOLDER names what was kept of it")
        try:
            return str(json.loads(self._known(self.folder).read_text())["weights"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._encoder} has no weights, and text_cache={self.folder} holds nothing for it; "
                "`pavdm text-cache` fills it where the weights are"
            ) from error

    def _known(self, folder: Path) -> Path:
        return folder / "encoders" / f"{self._shape}.json"

    @property
    def folder(self) -> Path | None:
        """Where embeddings are kept; None = for this process alone."""
        return self._kept.folder

    def _key(self, text: str) -> str:
        return hashlib.sha256(f"{self.identity}\n{text}".encode()).hexdigest()

    # --- the encoder ---------------------------------------------------------------------------------------

    def _run(self, texts: list[str]) -> list[Tensor]:
        """What a process that ends with it makes of some texts, in order."""
        on_cpu = self.options.device == "cpu" or (self.options.device == "auto" and not torch.cuda.is_available())
        if on_cpu and self.options.dtype == "bfloat16":  # said here, as what that process says is kept for errors
            tell_of_slow_bfloat16("text_dtype=bfloat16", torch.device("cpu"))
        with tempfile.TemporaryDirectory(prefix=temporary_prefix("text")) as folder:
            order = {
                "encoder": str(self._encoder.folder()),
                "tokenizer": str(self._tokenizer.folder()),
                "texts": texts,
                "max_length": self.max_length,
                "output": os.path.join(folder, "embeddings.safetensors"),
                **{name: value for name, value in asdict(self.options).items() if name != "cache"},
            }
            # With -m alone Python would run a script in the current folder that is named like some library.
            safe = [] if imports_from(os.getcwd()) else ["-P"]
            command = [sys.executable, *safe, "-m", "pavdm_dist.codecs.encode_texts"]
            done = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
                kind = ConfigError if done.returncode == BAD_SETTINGS else CheckpointError
                raise kind(f"text encoder {self._encoder}: {reason}")
            found = load_file(order["output"])
        return [found[str(number)] for number in range(len(texts))]

    def _token_ends(self, text: str) -> list[int]:
        """Of every token of a text, the end-of-text one included, where it ends in it."""
        is_fast, tokenizer = self._cutter
        offsets = tokenizer.encode(text).offsets if is_fast else tokenizer(text, return_offsets_mapping=True)
        return [end for _, end in (offsets if is_fast else offsets["offset_mapping"])]

    @cached_property
    def _cutter(self) -> tuple[bool, Any]:
        """What cuts texts into tokens, and is large; whether it is of the package ``tokenizers``."""
        file = self._tokenizer.find("tokenizer.json")
        if file is None:
            if self._tokenizer.find("spiece.model") is None:
                raise CheckpointError(self._tokenizer.missing("tokenizer.json"))
            return False, imported("transformers").AutoTokenizer.from_pretrained(str(self._tokenizer.folder()))
        tokenizers = imported("tokenizers")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library's own, which is no class of its
            raise CheckpointError(f"{file} is no tokenizer: {first_line(error)}") from error
        tokenizer.no_truncation()
        return True, tokenizer


# How the process that encodes says that it is not the weights' fault.
BAD_SETTINGS = 3


def imported(name: str) -> Any:
    """A package of the extra ``text``.

    Raises:
        ConfigError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"the model's text encoder needs {name}: pip install 'pavdm-dist[text]'") from error


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
