"""What callers of diffusers' pipelines hand over: generators, and names of arguments that mean nothing here."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch

from pavdm_dist.errors import ConfigError
from pavdm_dist.values.fields import show_no_text
from pavdm_dist.values.names import alike, same

# What says here what these say there.
_INSTEAD = {
    "cache_dir": "HF_HUB_CACHE names the cache",
    "token": "HF_TOKEN holds the token",
    "local_files_only": "HF_HUB_OFFLINE=1 fetches nothing",
    "subfolder": "name the whole model's folder",
    "variant": "torch_dtype is what weights are turned into",
    "device_map": "device, or num_stages, says where it runs",
    **dict.fromkeys(("seconds", "duration", "length", "frames", "video_length"), "num_frames says how long a video is"),
}


def check_names(given: Iterable[str], known: Iterable[str], who: str) -> None:
    """Refuses names of arguments that nobody would read, mistyped ones above all.

    Args:
        given: those of a call.
        known: those that there are.
        who: takes them.

    Raises:
        ConfigError: naming the first one, the nearest legal one, and all.
    """
    legal = list(known)
    for name in given:
        if name not in legal:
            near = same(name, legal) or alike(name, legal)
            hint = _INSTEAD.get(name) or (f"did you mean {near}?" if near else "")
            raise ConfigError(f"no such argument {name!r}{hint and f', {hint}'}; {who} takes {', '.join(legal)}")


def checked_seed(seed: object) -> int:
    """A seed as Python's own whole number.

    Raises:
        ConfigError: something else, or below 0.
    """
    try:
        number = operator.index(seed)  # type: ignore[arg-type]
    except TypeError as error:
        raise ConfigError(f"seed={show_no_text(seed)}: must be a whole number") from error
    if number < 0:  # elsewhere a word for "any"
        raise ConfigError(f"seed={number}: must be 0 or more; random.randrange(2**63) gives another every time")
    return number


def seeds_of(generator: torch.Generator | Sequence[torch.Generator] | None, seed: int, count: int) -> list[int]:
    """Seeds of the videos of a call.

    A generator that nothing was drawn from gives its own seed s: video i has s + i, as with ``seed=s``. From one that
    was used before, as by an earlier call, seeds are drawn: as with diffusers, a loop that hands over one generator
    makes another video every time, and the same ones again from the same first state. Each call uses them.

    Args:
        generator: one for all, or one for each video; None = ``seed + i``.
        seed: without a generator.
        count: of videos.

    Raises:
        ConfigError: another number of generators, or something else; no whole number from 0 on.
    """
    if generator is None:
        return [checked_seed(seed) + i for i in range(count)]
    if isinstance(generator, torch.Generator):
        fresh, first = _is_fresh(generator), generator.initial_seed()
        drawn = [_draw(generator) for _ in range(count)]
        return [first + i for i in range(count)] if fresh else drawn
    generators = list(generator) if isinstance(generator, Sequence) else [generator]
    if not all(isinstance(one, torch.Generator) for one in generators):
        raise ConfigError("generator: must be a torch.Generator, or a list of them; seed takes a number")
    if len(generators) != count:
        raise ConfigError(f"generator: {len(generators)} generators for {count} videos")
    return [seeds_of(one, seed, 1)[0] for one in generators]


def _is_fresh(generator: torch.Generator) -> bool:
    other = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    return torch.equal(generator.get_state(), other.get_state())


def _draw(generator: torch.Generator) -> int:
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
