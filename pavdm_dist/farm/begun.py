"""What a shot was made or begun with, against what is asked for now."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pavdm_dist.commands.origin import difference, is_of_machine, without_pixels
from pavdm_dist.config import SampleConfig
from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.tree import CANCEL, FAILED, SIDECAR, SKIP, VIDEO, Tree
from pavdm_dist.io.differences import changes
from pavdm_dist.io.leftovers import identity_begun_with
from pavdm_dist.io.metadata import versions
from pavdm_dist.io.parts import PARTS_SUFFIX, parts_folder
from pavdm_dist.request.sampling import SamplingParams

if TYPE_CHECKING:
    from pavdm_dist.farm.kinds import Kinds


def as_begun(
    config: SampleConfig, params: SamplingParams, begun: Mapping[str, Any], says_segments: bool
) -> tuple[SampleConfig, SamplingParams]:
    """Settings of a shot with those that it was begun with where nobody has said them: how many chunks are one
    segment, of which servers and farms have defaults of their own, and one micro-batch, which follows from the number
    of stages, of videos in flight, and from GPUs.

    Args:
        config, params: of the shot.
        begun: what it was begun with.
        says_segments: whether ``chunks_per_segment`` was asked for.
    """
    says_units = config.chunks_per_unit is not None or params.mode == "window"
    sampling = begun.get("sampling")
    segment = begun.get("chunks_per_segment")
    unit = sampling.get("chunks_per_unit", 1) if isinstance(sampling, dict) else 1  # earlier versions knew of none
    if not says_segments and type(segment) is int and segment >= 1:
        config = replace(config, chunks_per_segment=segment)
    if not says_units and type(unit) is int and 1 <= unit <= params.window_chunks:
        params = replace(params, chunks_per_unit=unit)
    return config, params


def check_as_before(shot: Shot, names: Container[str], tree: Tree, kinds: Kinds, retried: bool = False) -> None:
    """Refuses a shot that is there, or begun, and is asked for otherwise. Of a shot that nobody has begun it reads
    nothing.

    Args:
        shot: which.
        names: of its files.
        tree: where they lie.
        kinds: what is asked of it besides.
        retried: though it has failed.

    Raises:
        PAVDMError: as :func:`check_unchanged` and :func:`check_begun`.
    """
    if SIDECAR in names:
        check_unchanged(shot, tree, kinds)
    elif VIDEO + PARTS_SUFFIX in names and not any(mark in names for mark in (SKIP, CANCEL, *[FAILED] * (not retried))):
        check_begun(shot, tree, kinds)


def check_begun(shot: Shot, tree: Tree, kinds: Kinds) -> None:
    """Refuses an unfinished shot that is asked for otherwise than it was begun. Whether this machine has what it was
    begun with shows when it is gone on with; so does which pixels a clip or a picture has.

    Args:
        shot: one that has parts.
        tree: where they lie.
        kinds: what is asked of it besides.

    Raises:
        ConfigError: naming what it was begun with.
        CheckpointError: as :meth:`~pavdm_dist.farm.kinds.Kinds.asked`.
    """
    output, config = tree.output(shot.id), kinds.kind_of(shot).config
    begun = identity_begun_with(output)
    if begun is None or _version(begun) != versions()["pavdm_dist"]:  # what its facts are called is another's affair
        return
    sides = (without_pixels(begun), kinds.asked_of_begun(shot, output, begun))
    other = changes(*({name: fact for name, fact in side.items() if not is_of_machine(name, config)} for side in sides))
    if other:
        parts = parts_folder(output)
        raise ConfigError(
            f"id={shot.id} was begun with {other}; give the same to go on, give what is changed another id, or remove"
            f" {parts}, and it is begun anew"
        )


def check_unchanged(shot: Shot, tree: Tree, kinds: Kinds) -> None:
    """Refuses a complete shot that is asked for otherwise than it was made.

    Args:
        shot: one that has a sidecar.
        tree: where it lies.
        kinds: what is asked of it besides.

    Raises:
        ConfigError: naming what it was made with, or that it lacks latents or is gone; or its sidecar is none of this
            program's, or damaged.
        CheckpointError: as :meth:`~pavdm_dist.farm.kinds.Kinds.asked`.
    """
    sidecar = tree.sidecar(shot.id)
    if sidecar is None:
        raise ConfigError(f"id={shot.id}: {tree.folder(shot.id)}/{SIDECAR} is none of this program's, or damaged")
    made, asked = sidecar.get("identity"), kinds.asked(shot)
    if not isinstance(made, Mapping) or not made:  # brought here: such a record has a few facts alone
        made, asked = ({name: facts.get(name) for name in ("prompt", "seed")} for facts in (sidecar, asked))
    other = difference(tree.output(shot.id), without_pixels(made), asked, kinds.kind_of(shot).config)
    if other:
        raise ConfigError(f"id={shot.id} {other}; give what is changed another id, or remove {tree.folder(shot.id)}")


def _version(begun: Mapping[str, Any]) -> object:
    versions = begun.get("versions")
    return versions.get("pavdm_dist") if isinstance(versions, Mapping) else None
