"""A word-level text encoder for a closed caption grammar: vocabulary, small bidirectional transformer, no downloads.

It is trained together with the video model and shipped beside it. Words it does not know become ``<unk>``, and a
warning names the words it does know.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from pavdm_dist.codecs.newest import Newest
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.models.loading import load_module
from pavdm_dist.models.source import Source, load_config
from pavdm_dist.values.fields import Within, made, show

logger = logging.getLogger(__name__)

PAD, UNKNOWN, EMPTY = "<pad>", "<unk>", "<empty>"
_SPECIAL = (PAD, UNKNOWN, EMPTY)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*|,")


def split_words(prompt: str) -> list[str]:
    """Lower-case words and commas of a prompt.

    All other punctuation only separates. Commas at the ends or in a row say nothing and are dropped, so that
    ``"A red three, a blue seven."`` and ``"a red three , a blue seven"`` are the same prompt.
    """
    words: list[str] = []
    for word in _WORD.findall(prompt.lower().replace("’", "'")):
        if word != "," or (words and words[-1] != ","):
            words.append(word)
    return words[:-1] if words[-1:] == [","] else words


# Prompts whose tokens are kept in training: some 30 MB of them.
_KNOWN_PROMPTS = 32_768


@dataclass(frozen=True)
class _TextConfig:
    vocabulary: list[str]
    text_dim: Annotated[int, Within(2, 65_536)] = 128
    depth: Annotated[int, Within(0, 256)] = 2
    num_heads: Annotated[int, Within(1, 1024)] = 4
    max_length: Annotated[int, Within(1, 65_536)] = 64


class WordTextEncoder(nn.Module):
    """Words -> contextual embeddings.

    Args:
        vocabulary: the words of the caption grammar, lower case, each once; a comma is added when missing.
        text_dim: width of the embeddings.
        depth: transformer layers.
        num_heads: attention heads; divides ``text_dim``.
        max_length: most tokens of a prompt.

    Raises:
        ConfigError: a vocabulary entry that can never occur in a prompt, or twice; an impossible shape.
    """

    def __init__(
        self,
        vocabulary: Sequence[str],
        text_dim: int = 128,
        depth: int = 2,
        num_heads: int = 4,
        max_length: int = 64,
    ) -> None:
        super().__init__()
        words = [*vocabulary] if "," in vocabulary else [*vocabulary, ","]
        for word in words:
            if word != "," and split_words(word) != [word]:
                raise ConfigError(f"vocabulary entry {word!r} is not one lower-case word")
        if len(set(words)) != len(words):
            twice = next(word for word in words if words.count(word) > 1)
            raise ConfigError(f"vocabulary entry {twice!r} occurs twice")
        if text_dim % (2 * num_heads):
            raise ConfigError(f"text_dim={text_dim} cannot be divided by twice num_heads={num_heads}")
        self.vocabulary = tuple(words)
        self.text_dim = text_dim
        self.max_length = max_length
        self._config = {
            "vocabulary": words,
            "text_dim": text_dim,
            "depth": depth,
            "num_heads": num_heads,
            "max_length": max_length,
        }
        self._index = {word: position for position, word in enumerate((*_SPECIAL, *words))}
        self._warned = Newest()
        self._collated: dict[str, list[int]] = {}
        self.embedding = nn.Embedding(len(self._index), text_dim)
        self.layers = nn.ModuleList(_Layer(text_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(text_dim)
        nn.init.normal_(self.embedding.weight, std=0.5)

    @classmethod
    def of_shape(cls, config: Mapping[str, Any], where: object) -> WordTextEncoder:
        """Without trained weights, from what ``config.json`` holds.

        Raises:
            CheckpointError: naming ``where``, the field, its value and what is legal.
        """
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        shape = made(_TextConfig, given, where, error=CheckpointError)
        try:
            return cls(**vars(shape))
        except ConfigError as error:
            raise CheckpointError(f"{where} describes no WordTextEncoder: {error}") from error

    @classmethod
    def from_pretrained(cls, source: str | Path | Source) -> WordTextEncoder:
        """Loads ``config.json`` and ``model.safetensors`` of any precision as float32.

        Args:
            source: component folder, hub id, or :class:`~pavdm_dist.models.source.Source`.

        Raises:
            CheckpointError: missing or broken files, or a tensor missing or of the wrong size.
        """
        with torch.device("meta"):
            encoder = cls.of_shape(load_config(source), f"{source}/config.json")
        load_module(encoder, source)
        return encoder.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes what :meth:`from_pretrained` reads; ``dtype``: precision on disk, None keeps the weights'."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        state = {key: value.detach().to("cpu", dtype).contiguous() for key, value in self.state_dict().items()}
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        config = {"_class_name": type(self).__name__, **self._config}
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @property
    def identity(self) -> str:
        """SHA-256 of vocabulary, shape and float32 weights: equal encoders give equal embeddings."""
        digest = hashlib.sha256(json.dumps(self._config, sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def token_ids(self, prompt: str) -> list[int]:
        """Token numbers of a prompt, at least one (``<empty>``).

        Raises:
            ConfigError: more than ``max_length`` tokens.
        """
        words = split_words(prompt) or [EMPTY]
        if len(words) > self.max_length:
            raise ConfigError(f"the prompt has {len(words)} words and commas, at most {self.max_length} are legal")
        return [self._index.get(word, self._index[UNKNOWN]) for word in words]

    def collate(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """A batch for training: token numbers ``[b, L]`` padded at the end, and mask ``[b, L]``, True = a token."""
        known, pad = self._collated, self._index[PAD]
        if len(known) > _KNOWN_PROMPTS:
            known.clear()
        for prompt in prompts:  # those of training clips come again and again
            if prompt not in known:
                known[prompt] = self.token_ids(prompt)
        longest = max(len(known[prompt]) for prompt in prompts)
        ids = torch.tensor([known[prompt] + [pad] * (longest - len(known[prompt])) for prompt in prompts])
        return ids, ids != pad

    def prepare(self, prompts: Iterable[str]) -> None:
        """Nothing: it is small."""

    def check(self, prompt: str, limit: int) -> None:
        """Refuses a prompt of more than ``limit`` tokens, and warns of words as :meth:`encode` does.

        Raises:
            ConfigError: it is too long.
        """
        tokens = len(self.token_ids(prompt))
        if tokens > limit:
            raise ConfigError(f"prompt {show(prompt)!r} has {tokens} tokens, the model takes at most {limit}")
        self._warn(prompt)

    def unread(self, prompt: str, limit: int) -> str:
        """Nothing: prompts that are too long are refused."""
        return ""

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that are not in the vocabulary, each once, in order."""
        return list(dict.fromkeys(word for word in split_words(prompt) if word not in self._index))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embeds a batch.

        Args:
            ids: token numbers ``[b, L]``.
            mask: ``[b, L]`` bool, True = a token; None = all are.

        Returns:
            ``[b, L, text_dim]``; rows of padding hold no meaning.
        """
        h = self.embedding(ids)
        h = h + _positions(ids.shape[1], self.text_dim, h)
        attend = None if mask is None else rearrange(mask, "b l -> b 1 1 l")
        for layer in self.layers:
            h = layer(h, attend)
        return self.norm(h)

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Float32 embeddings ``[L, text_dim]`` of one prompt, one row per word or comma, no padding.

        Unknown words are warned about once per prompt, as long as it is among the newest of those.

        Raises:
            ConfigError: the prompt is too long.
        """
        self._warn(prompt)
        device = self.embedding.weight.device
        return self(torch.tensor([self.token_ids(prompt)], device=device))[0].float().contiguous()

    def _warn(self, prompt: str) -> None:
        unknown = self.unknown_words(prompt)
        if not unknown or not self._warned.is_new(prompt):
            return
        logger.warning(
            "prompt %r: %s not in this model's vocabulary and will be ignored or misread; it knows: %s",
            prompt,
            ", ".join(repr(word) for word in unknown) + (" is" if len(unknown) == 1 else " are"),
            " ".join(sorted(word for word in self.vocabulary if word != ",")),
        )


class _Layer(nn.Module):
    """Pre-norm transformer layer with attention in both directions."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self._heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, h: Tensor, attend: Tensor | None) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(h)), "b l (three n d) -> three b n l d", three=3, n=self._heads)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=attend)
        h = h + self.proj(rearrange(mixed, "b n l d -> b l (n d)"))
        return h + self.mlp(self.norm2(h))


def _positions(length: int, dim: int, like: Tensor) -> Tensor:
    """Sinusoidal positions ``[length, dim]``: nothing to train, defined for prompts longer than any seen."""
    frequency = torch.exp(torch.arange(dim // 2, device=like.device) * (-math.log(10_000.0) / (dim // 2)))
    angle = torch.outer(torch.arange(length, device=like.device), frequency)
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(like.dtype)
