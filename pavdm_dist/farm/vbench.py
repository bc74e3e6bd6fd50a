"""``pavdm export vbench``: a farm's finished videos under the names that VBench and its successors look for.

VBench takes a flat folder of ``{prompt}-{index}.mp4`` with nothing else in it, VBench-2.0 a folder per dimension with
prompts cut to 180 characters. Names hold the prompt that a video was made with. Scores are computed by those toolkits,
in environments of their own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.farm.prompts import prompt_of
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.status import standings
from pavdm_dist.farm.tree import Tree
from pavdm_dist.io.folders import whole_folder
from pavdm_dist.io.remote import is_remote
from pavdm_dist.io.storage import atomic_write, local_copy
from pavdm_dist.values.fields import show

Form = Literal["standard", "custom", "vbench2"]

DIMENSION = "dimension:"
# Of VBench-2.0; and of a name on nearly every file system.
_PROMPT_CHARACTERS, _NAME_BYTES = 180, 255


@dataclass(frozen=True)
class _Sample:
    """A video, its prompt, the folder that it goes into and its number among those of its prompt there."""

    shot: Shot
    prompt: str
    folder: str
    index: int
    seed: Any


def export_vbench(out: str, target: str, form: Form = "standard", by_dimension: bool = False) -> dict[str, Any]:
    """Makes the folder, of hard links where the file system allows it, else of copies; nothing else is in it.

    Beside it ``FOLDER.samples.json`` says which shot and seed each video is, and, where names are numbers,
    ``FOLDER.prompts.json`` what VBench's ``--prompt_file`` wants: from name to prompt.

    Args:
        out: a farm's folder, local or remote.
        target: a local folder that does not exist.
        form: ``standard``; ``custom``: numbers for names; ``vbench2``.
        by_dimension: a folder for each tag ``dimension:NAME``; always so with ``vbench2``.

    Returns:
        ``videos``, ``prompts``, the fewest and most ``samples`` of a prompt, ``form``, and a ``note`` where prompts are
        no names, so that it is ``custom``.

    Raises:
        ConfigError: nothing is finished, the folder exists, a tag is no name of a folder, or two prompts are cut to the
            same name.
        MediaError: the folder, or what is beside it, cannot be written.
    """
    if is_remote(target):
        raise ConfigError(f"out={target}: must be a local folder, toolkits read no stores")
    target = os.path.normpath(target)
    beside = {kind: f"{target}.{kind}.json" for kind in ("samples", "prompts")}
    for path in (target, *beside.values()):
        if os.path.lexists(path):
            raise ConfigError(f"out={target}: {path} exists; name a new folder")
    tree, nested = Tree(out), by_dimension or form == "vbench2"
    samples = list(_samples(tree, nested))
    if not samples:
        raise ConfigError(f"{out}: no shot is complete" + (f" and has a tag {DIMENSION}NAME" if nested else ""))
    why = None if form == "custom" else _why_no_names(samples, form)
    form = form if why is None else "custom"
    named = {_name(sample, form, number): sample for number, sample in enumerate(samples)}
    if len(named) < len(samples):
        raise ConfigError(f"{out}: prompts that differ behind {_PROMPT_CHARACTERS} characters only; use --custom")
    about: dict[str, Any] = {
        "samples": {name: {"id": s.shot.id, "prompt": s.prompt, "seed": s.seed} for name, s in named.items()}
    }
    if form == "custom":
        about["prompts"] = {name: sample.prompt for name, sample in named.items()}
    try:
        with whole_folder(target, replaces=False) as folder:
            for name, sample in named.items():
                place = folder / name
                place.parent.mkdir(parents=True, exist_ok=True)
                _link(tree.output(sample.shot.id), place)
        for kind, facts in about.items():
            with atomic_write(beside[kind], "w") as file:
                json.dump(facts, file, indent=2, ensure_ascii=False)
    except OSError as error:  # of a video that is gone, too
        what = f"{error.filename}: " if error.filename else ""
        raise MediaError(f"out={target}: cannot be made ({what}{error.strerror or error})") from error
    counts = Counter((sample.folder, sample.prompt) for sample in samples)
    return {
        "out": target,
        "form": form,
        "videos": len(samples),
        "prompts": len({prompt for _, prompt in counts}),
        "samples": [min(counts.values()), max(counts.values())],
        **(
            {"note": f"{why}: names are numbers, {beside['prompts']} has the prompts (--mode=custom_input)"}
            if why
            else {}
        ),
    }


def _samples(tree: Tree, nested: bool) -> Iterator[_Sample]:
    """Finished shots in the manifests' order; those of one prompt are numbered."""
    numbers: Counter[tuple[str, str]] = Counter()
    for one in standings(tree):
        if one.sidecar is None:
            continue
        prompt = prompt_of(one.shot, one.sidecar)
        tagged = dict.fromkeys(tag.removeprefix(DIMENSION) for tag in one.shot.tags if tag.startswith(DIMENSION))
        for folder in tagged if nested else [""]:
            if nested and (not folder.strip(".") or "/" in folder):
                raise ConfigError(f"id={one.shot.id}: tag {DIMENSION}{show(folder)}: is no name of a folder")
            if len(os.fsencode(folder)) > _NAME_BYTES:
                raise ConfigError(
                    f"id={one.shot.id}: tag {DIMENSION}{show(folder)}: {len(os.fsencode(folder))} bytes are too long"
                    f" for the name of a folder; use at most {_NAME_BYTES}"
                )
            key = folder, prompt
            yield _Sample(one.shot, prompt, folder, numbers[key], one.sidecar.get("seed"))
            numbers[key] += 1


def _name(sample: _Sample, form: Form, number: int) -> str:
    prompt = sample.prompt[:_PROMPT_CHARACTERS] if form == "vbench2" else sample.prompt
    name = f"{number:05d}.mp4" if form == "custom" else f"{prompt}-{sample.index}.mp4"
    return f"{sample.folder}/{name}" if sample.folder else name


def _why_no_names(samples: list[_Sample], form: Form) -> str | None:
    """Why a prompt cannot be the name of a file; None where all can."""
    for sample in samples:
        prompt = sample.prompt
        if "/" in prompt or prompt.startswith("."):
            return f"the prompt of {sample.shot.id} is no name of a file"
        if len(os.fsencode(_name(replace(sample, folder=""), form, 0))) > _NAME_BYTES:
            return f"the prompt of {sample.shot.id} is longer than a name of {_NAME_BYTES} bytes"
    return None


def _link(video: str, place: Path) -> None:
    with local_copy(video) as file:
        if not is_remote(video):
            with suppress(OSError):  # another disk, or one that knows no links
                os.link(file, place)
                return
        shutil.copyfile(file, place)
