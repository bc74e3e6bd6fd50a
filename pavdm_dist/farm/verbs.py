"""``pavdm farm`` and ``pavdm export`` on the command line: words in, a report out. Heavy rooms are imported late."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any

from pavdm_dist.commands.words import add_print_config, is_override
from pavdm_dist.errors import ConfigError
from pavdm_dist.io import shipped

if TYPE_CHECKING:
    from pavdm_dist.farm.settings import FarmConfig
    from pavdm_dist.farm.vbench import Form


def add_farm(verb: argparse.ArgumentParser) -> None:
    """The arguments of ``pavdm farm``."""
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, about: str) -> argparse.ArgumentParser:
        found = actions.add_parser(name, help=about, description=about, allow_abbrev=False)
        found.add_argument("--json", action="store_true", help="print the result as one JSON object")
        return found

    run = action("run", "render the shots of a manifest (.jsonl, .csv, .tsv, .txt)")
    run.add_argument("words", nargs="*", metavar="MANIFEST | CONFIG.yaml | key=value")
    run.add_argument("--out", required=True, metavar="DIR", help="where videos go, and what has become of each shot")
    run.add_argument("--address", metavar="ADDRESS", help="of a Ray cluster; the same as ray_address=ADDRESS")
    run.add_argument(
        "--dry-run", action="store_true", help="check everything, print what it would take, render nothing"
    )
    add_print_config(run)
    run.add_argument("--openjd", action="store_true", help="print openjd_progress lines for a render farm's scheduler")
    retry = action("retry", "render failed shots again")
    retry.add_argument("out", metavar="DIR")
    retry.add_argument("words", nargs="*", metavar="ID | key=value")
    retry.add_argument(
        "--openjd", action="store_true", help="print openjd_progress lines for a render farm's scheduler"
    )
    status = action("status", "how many shots are where, how fast it goes, what failed and why")
    status.add_argument("out", metavar="DIR")
    report = action("report", "write index.html: players, contact sheets, timings, failures")
    report.add_argument("out", metavar="DIR")


def add_export(verb: argparse.ArgumentParser) -> None:
    """The arguments of ``pavdm export``."""
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")
    about = "a folder of videos as VBench expects it, from a farm's"
    vbench = actions.add_parser("vbench", help=about, description=about, allow_abbrev=False)
    vbench.add_argument("tree", metavar="DIR", help="of `pavdm farm run --out`")
    vbench.add_argument("--out", required=True, metavar="FOLDER", help="new folder")
    form = vbench.add_mutually_exclusive_group()
    form.add_argument("--custom", action="store_true", help="short names, and prompts.json for VBench's --prompt_file")
    form.add_argument("--vbench2", action="store_true", help="as VBench-2.0 cuts prompts, a folder per dimension")
    vbench.add_argument("--dimensions", action="store_true", help="a folder per dimension, by tags dimension:NAME")
    vbench.add_argument("--json", action="store_true", help="print the result as one JSON object")


def farm_report(arguments: argparse.Namespace) -> dict[str, Any]:
    """Does what ``pavdm farm`` was asked for.

    Raises:
        PAVDMError: see the functions behind the actions.
    """
    if arguments.action == "status":
        from pavdm_dist.farm.status import status_report

        return status_report(arguments.out)
    if arguments.action == "report":
        from pavdm_dist.farm.report import write_report

        return write_report(arguments.out)
    if arguments.action == "retry":
        from pavdm_dist.farm.settings import validate_farm
        from pavdm_dist.farm.status import failed_shots, settings_of_run
        from pavdm_dist.farm.tree import Tree

        ids = [word for word in arguments.words if not is_override(word)]
        overrides = [word for word in arguments.words if is_override(word)]
        config = settings_of_run(Tree(arguments.out), overrides)
        validate_farm(config)
        said = {word.partition("=")[0].partition(".")[0] for word in overrides}
        return _run(config, None, arguments, failed_shots(arguments.out, ids, config, said))
    manifest, config = run_settings(arguments)
    if arguments.dry_run:
        from pavdm_dist.farm.forecast import dry_run

        return dry_run(config, manifest, arguments.out)
    return _run(config, manifest, arguments, None)


def export_report(arguments: argparse.Namespace) -> dict[str, Any]:
    """Does what ``pavdm export`` was asked for.

    Raises:
        PAVDMError: as :func:`~pavdm_dist.farm.vbench.export_vbench`.
    """
    from pavdm_dist.farm.vbench import export_vbench

    form: Form = "custom" if arguments.custom else "vbench2" if arguments.vbench2 else "standard"
    return export_vbench(arguments.tree, arguments.out, form, arguments.dimensions)


def run_settings(arguments: argparse.Namespace) -> tuple[str | None, FarmConfig]:
    """The manifest and the checked settings of ``pavdm farm run``.

    Raises:
        ConfigError: words that are neither, or settings that cannot be.
    """
    from pavdm_dist.farm.formats import SUFFIXES
    from pavdm_dist.farm.settings import FarmConfig, validate_farm
    from pavdm_dist.values.merging import load_config

    manifest: str | None = None
    config_file: str | None = None
    overrides = []
    for word in arguments.words:
        if is_override(word):
            overrides.append(word)
        elif word.lower().endswith((".yaml", ".yml")) and config_file is None:
            config_file = shipped.config_file(word)
        elif word.lower().endswith(SUFFIXES) and manifest is None:
            manifest = word
        else:
            raise ConfigError(f"{word!r}: give one manifest ({', '.join(SUFFIXES)}), one .yaml file, and key=value")
    if arguments.address is not None:
        overrides.append(f"ray_address={arguments.address}")
    config = load_config(FarmConfig, config_file, overrides)
    validate_farm(config)
    return manifest, config


def _run(
    config: FarmConfig, manifest: str | None, arguments: argparse.Namespace, only: list[str] | None
) -> dict[str, Any]:
    from pavdm_dist.farm.progress import FarmProgress
    from pavdm_dist.farm.run import run_command

    # The setting is that of every command, whose lines go where its log does; the option has its own place.
    openjd = sys.stdout if arguments.openjd else sys.stderr if config.progress == "openjd" else None
    progress = partial(FarmProgress, openjd=openjd, deadline=sys.stderr if config.progress == "deadline" else None)
    with redirect_stdout(sys.stderr):  # where Ray tells of dead workers
        return run_command(config, manifest, arguments.out, progress, only)
