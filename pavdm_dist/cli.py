"""The ``pavdm`` command: one function per verb, each calling one library function.

``pavdm VERB [PROMPT] [CONFIG.yaml] [key=value ...]``; flags change how the command behaves, keys change what is
rendered or trained. Heavy packages are imported inside the verbs, so ``pavdm --help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from typing import Any

from pavdm_dist import __version__
from pavdm_dist.commands.words import is_override, run_config, sort_settings, sort_words
from pavdm_dist.errors import ConfigError, FailedVideosError, PAVDMError
from pavdm_dist.farm.verbs import add_export, add_farm, export_report, farm_report, run_settings
from pavdm_dist.redaction import hide_secrets

EXIT_BAD_INPUT = 2
# So many more than this failed; below what shells use for themselves (126 and more), 125 stands for all from 25 on.
EXIT_FAILED_VIDEOS, MOST_COUNTED = 100, 25

_EPILOG = """\
Settings are dataclass defaults <- CONFIG.yaml <- key=value. `pavdm sample --print-config` shows all of them,
`pavdm configs ls` lists the shipped files. Examples:

  pavdm sample "a red three drifting up and to the left" seconds=10 output=three.mp4
  pavdm plan configs/sample/opensora-240p.yaml chunks=22 num_stages=4 --json
  pavdm plan seconds=60 cluster.devices=8 cluster.videos=3 cluster.chart=plan.png
  pavdm train configs/train/embedded.yaml max_seconds=600
  pavdm data prepare videos/ 'buckets=[240x424x35@24]' output=prepared processes=8
  pavdm farm run shots.jsonl --out renders num_stages=2 streams=2
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 all is done; 2 bad input, or the run as a whole ended; 100 + n: n videos failed (125: 25 or more), all others are
    complete; 128 + the number of the signal that ended it (130, 143).
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.verb is None:
        parser.print_help()
        return 0
    if rest:
        # argparse takes positionals only up to the first flag; words behind a flag end up here.
        flags = [word for word in rest if word.startswith("-")]
        if flags or not hasattr(arguments, "words"):
            parser.error(f"unrecognized arguments: {' '.join(flags or rest)} (settings are written key=value)")
        arguments.words += rest
    from pavdm_dist.commands.signals import Signals, signal_of

    try:
        with Signals(of_process=argv is None):
            from pavdm_dist.commands.progress import setup_logging

            setup_logging(arguments.verbose)
            arguments.run(arguments)
    except FailedVideosError as error:
        return _complain(str(error), EXIT_FAILED_VIDEOS + min(error.count, MOST_COUNTED))
    except PAVDMError as error:
        return _complain(str(error), EXIT_BAD_INPUT)
    except KeyboardInterrupt as interrupt:
        # Whoever was interrupted says in the exception where finished work lies.
        status = 128 + signal_of(interrupt)  # as a shell says it
        return _complain(f"interrupted{': ' if str(interrupt) else ''}{interrupt}", status)
    except BrokenPipeError:
        # The reader of a pipe (head, less) has seen enough; closing stderr too keeps Python from reporting it.
        sys.stderr.close()
        return 0
    return 0


def sample(arguments: argparse.Namespace) -> None:
    """Render one prompt, or a file of prompts, to mp4."""
    from pavdm_dist.config import SampleConfig

    needs_prompt = not arguments.print_config
    failed: list[PAVDMError] = []
    if arguments.resume is None:
        configs = [run_config(SampleConfig, arguments.words, needs_prompt)]
    else:
        from pavdm_dist.commands.resume import configs_to_resume

        config_file, overrides = sort_settings(arguments.words)
        given = [config_file] if config_file else [word for word in overrides if word.startswith("output=")]
        if given:
            raise ConfigError(f"{given[0]}: --resume {arguments.resume} goes on where and as that was; leave it out")
        configs, failed = configs_to_resume(arguments.resume, overrides, needs_prompt=needs_prompt)
    if arguments.print_config:
        for config in configs:
            _print_config(config)
    elif arguments.dry_run:
        from pavdm_dist.commands.plan import plan_report

        for config in configs:
            _print_report(plan_report(config), arguments.json)
    else:
        from pavdm_dist.commands.progress import PROGRESS
        from pavdm_dist.commands.sample import render_command

        progress = PROGRESS[configs[0].progress]
        with redirect_stdout(sys.stderr):  # where Ray tells of dead workers; what comes out here is the result alone
            if arguments.resume is None:
                result = render_command(configs[0], overwrite=arguments.overwrite, progress=progress)
            else:
                from pavdm_dist.commands.resume import resume_command

                result = resume_command(configs, failed, progress)
        if arguments.json and result is not None:
            _say(json.dumps(result))


def plan(arguments: argparse.Namespace) -> None:
    """Show the window plan, its cost and the layer split, and with cluster.devices=N how to use N devices."""
    from pavdm_dist.config import PlanConfig

    words = [word for word in arguments.words if not word.startswith("chunks=")]
    config = run_config(PlanConfig, words, needs_prompt=False)
    if arguments.print_config:
        return _print_config(config)
    chunks = None
    for text in (word.partition("=")[2] for word in arguments.words if word not in words):
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(f"chunks={text}: must be a whole number above 0")
        chunks = int(text)
    if chunks is not None and (config.num_frames is not None or config.seconds is not None):
        raise ConfigError(f"chunks={chunks}: stands for num_frames or seconds, give one of the three")
    from pavdm_dist.commands.plan import plan_report

    _print_report(plan_report(config, chunks=chunks), arguments.json)


def serve(arguments: argparse.Namespace) -> None:
    """Take videos by HTTP (OpenAI's /v1/videos), render them, and let them be watched on a page."""
    from pavdm_dist.merging import load_config
    from pavdm_dist.serve.settings import ServeConfig, validate_serve

    prompt, config_file, overrides = sort_words(arguments.words)
    if prompt is not None:
        raise ConfigError(f"{prompt!r} is neither a .yaml file nor key=value")
    config = load_config(ServeConfig, config_file, overrides)
    if arguments.print_config:
        return _print_config(config)
    validate_serve(config)
    if not arguments.out:
        raise ConfigError("--out DIR is missing: the folder that videos are kept in")
    from pavdm_dist.serve.run import serve_command

    with redirect_stdout(sys.stderr):  # where Ray tells of dead workers
        serve_command(config, arguments.out)


def simulate(arguments: argparse.Namespace) -> None:
    """Model a pipeline of stages, links and queues: makespan, utilisation and a chart, without a cluster."""
    from pavdm_dist.commands.simulate import SimulateConfig, simulate_report
    from pavdm_dist.merging import load_config

    prompt, config_file, overrides = sort_words(arguments.words)
    if prompt is not None:
        raise ConfigError(f"{prompt!r} is neither a .yaml file nor key=value")
    config = load_config(SimulateConfig, config_file, overrides)
    if arguments.print_config:
        return _print_config(config)
    _print_report(simulate_report(config), arguments.json)


def train(arguments: argparse.Namespace) -> None:
    """Train the codec or the model of a config file; run again to go on where it stopped."""
    from pavdm_dist.merging import load_config
    from pavdm_dist.train.settings import TrainConfig

    prompt, config_file, overrides = sort_words(arguments.words)
    if prompt is not None:
        raise ConfigError(f"{prompt!r} is neither a .yaml file nor key=value")
    config = load_config(TrainConfig, config_file, overrides)
    if arguments.print_config:
        return _print_config(config)
    from pavdm_dist.commands.train import dry_run_command, train_command

    if arguments.dry_run:
        return _print_report(dry_run_command(config), arguments.json)
    train_command(config, arguments.words)


def data(arguments: argparse.Namespace) -> None:
    """Prepare training clips from videos and captions; run again to go on where it stopped."""
    from pavdm_dist.data.prepare import PrepareConfig, prepare_command
    from pavdm_dist.merging import load_config

    overrides = [word for word in arguments.words if is_override(word)]
    files = [word for word in arguments.words if word.endswith((".yaml", ".yml")) and word not in overrides]
    if len(files) > 1:
        raise ConfigError(f"two config files, {files[0]} and {files[1]}: give one")
    sources = [word for word in arguments.words if word not in overrides and word not in files]
    config = load_config(PrepareConfig, files[0] if files else None, overrides)
    if sources:
        config.source = [*sources, *(config.source if any(word.startswith("source=") for word in overrides) else [])]
    if arguments.print_config:
        return _print_config(config)
    _print_report(prepare_command(config), arguments.json)


def convert(arguments: argparse.Namespace) -> None:
    """Turn a published file of weights (.pt, .safetensors) into a model folder."""
    from pavdm_dist.commands.convert import ConvertConfig, convert_command
    from pavdm_dist.merging import load_config

    source, config_file, overrides = sort_words(arguments.words)
    if source is not None:
        overrides.insert(0, f"source={source}")
    config = load_config(ConvertConfig, config_file, overrides)
    if arguments.print_config:
        return _print_config(config)
    _print_report(convert_command(config, arguments.overwrite), arguments.json)


def text_cache(arguments: argparse.Namespace) -> None:
    """Encode a file of prompts with a model's large text encoder, so that rendering needs none."""
    from pavdm_dist.commands.text_cache import TextCacheConfig, text_cache_report
    from pavdm_dist.merging import load_config

    prompts, config_file, overrides = sort_words(arguments.words)
    if prompts is not None:
        overrides.insert(0, f"prompts={prompts}")
    config = load_config(TextCacheConfig, config_file, overrides)
    _print_report(text_cache_report(config), arguments.json)


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure how videos hold over time: drift of every measure, tables, plots, one page."""
    from pavdm_dist.evaluate.command import eval_report, for_people
    from pavdm_dist.evaluate.settings import EvalConfig
    from pavdm_dist.merging import load_config

    overrides = [word for word in arguments.words if is_override(word)]
    config = load_config(EvalConfig, None, overrides)
    config.videos = [*(word for word in arguments.words if word not in overrides), *config.videos]
    if arguments.print_config:
        return _print_config(config)
    report, failure = eval_report(config, arguments.overwrite)
    _print_report(report if arguments.json else for_people(report), arguments.json)
    if failure is not None:
        raise failure


def configs(arguments: argparse.Namespace) -> None:
    """List the shipped config files, or copy one to edit."""
    from pavdm_dist.commands.configs import copy_config, describe_configs

    if arguments.action == "ls":
        found = describe_configs()
        width = max(len(name) for name, _ in found)
        _say("\n".join(f"{name:{width}}  {about}".rstrip() for name, about in found))
    else:
        _say(str(copy_config(arguments.name, arguments.target, overwrite=arguments.overwrite)))


def farm(arguments: argparse.Namespace) -> None:
    """Render the shots of a manifest on a pool of renderers; run again to go on with what is left."""
    if arguments.action == "run" and arguments.print_config:
        return _print_config(run_settings(arguments)[1])
    report = farm_report(arguments)
    if arguments.json or arguments.action != "run" or arguments.dry_run:
        _print_report(report, arguments.json)


def export(arguments: argparse.Namespace) -> None:
    """Lay finished videos out as evaluation toolkits expect them."""
    _print_report(export_report(arguments), arguments.json)


def env(arguments: argparse.Namespace) -> None:
    """Versions, processors and Ray's state, for bug reports; starts nothing."""
    from pavdm_dist.commands.env import environment

    _print_report(environment(), arguments.json)


def _print_config(config: Any) -> None:
    from pavdm_dist.merging import to_yaml

    _say(to_yaml(config).removesuffix("\n"))


def _print_report(report: dict[str, Any], as_json: bool) -> None:
    """A report as one JSON object, or as lines for people."""
    from pavdm_dist.commands.printing import report_lines

    _say(json.dumps(report) if as_json else "\n".join(report_lines(report)))


def _say(text: str) -> None:
    """What a command was asked for, on standard output, which may be a file on a disk that is full."""
    try:
        print(_printable(text), flush=True)
    except BrokenPipeError:
        raise
    except UnicodeEncodeError as error:
        raise PAVDMError(
            f"standard output takes {error.encoding} only, not {error.object[error.start : error.end]!a}; set"
            " PYTHONIOENCODING=utf-8"
        ) from error
    except OSError as error:
        # What is still held back would be tried again at the end, and complained about without a name.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        raise PAVDMError(f"standard output cannot be written: {error.strerror}") from error


def _printable(text: str) -> str:
    """Names of files that are no text show their bytes."""
    return text.encode(errors="backslashreplace").decode()


def _complain(message: str, status: int) -> int:
    text = _printable(hide_secrets(" ".join(message.split())))
    with suppress(OSError):  # nobody may be left to read it
        print(f"pavdm: {text}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pavdm",
        description="Progressive autoregressive video diffusion: videos of any length at constant memory.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pavdm {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")

    def add(function: Any, usage: str | None = None, name: str | None = None) -> argparse.ArgumentParser:
        about = (function.__doc__ or "").strip()
        name = name or function.__name__.replace("_", "-")
        verb = verbs.add_parser(name, help=about, description=about, usage=usage, allow_abbrev=False)
        verb.set_defaults(run=function)
        verb.add_argument("--verbose", action="store_true", help="log more")
        return verb

    verb = add(sample, "pavdm sample [PROMPT] [CONFIG.yaml] [key=value ...] [flags]")
    verb.add_argument("words", nargs="*", metavar="PROMPT | CONFIG.yaml | key=value")
    again = verb.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="begin anew and replace existing outputs")
    again.add_argument(
        "--resume", metavar="DIR", help="finish the video of a .parts folder, or all unfinished ones in a folder"
    )
    verb.add_argument("--dry-run", action="store_true", help="check everything, print the plan, render nothing")
    verb.add_argument("--print-config", action="store_true", help="print the merged settings as YAML and stop")
    verb.add_argument("--json", action="store_true", help="print the result as one JSON object")

    verb = add(plan, "pavdm plan [CONFIG.yaml] [key=value ...] [chunks=K] [flags]")
    verb.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value")
    verb.add_argument("--print-config", action="store_true", help="print the merged settings as YAML and stop")
    verb.add_argument("--json", action="store_true", help="print one JSON object")

    verb = add(serve, "pavdm serve [CONFIG.yaml] [key=value ...] --out DIR [flags]")
    verb.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value")
    verb.add_argument("--out", metavar="DIR", help="folder of the videos; a server on it goes on where one ended")
    verb.add_argument("--print-config", action="store_true", help="print the merged settings as YAML and stop")

    verb = add(simulate, "pavdm simulate [CONFIG.yaml] [key=value ...] [flags]")
    verb.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value")
    verb.add_argument("--print-config", action="store_true", help="print the merged settings as YAML and stop")
    verb.add_argument("--json", action="store_true", help="print one JSON object")

    verb = add(train, "pavdm train CONFIG.yaml [key=value ...] [flags]")
    verb.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value")
    verb.add_argument("--print-config", action="store_true", help="print the merged settings as YAML and stop")
    verb.add_argument("--dry-run", action="store_true", help="say what memory and time a step takes, and stop")
    verb.add_argument("--json", action="store_true", help="print what --dry-run says as one JSON object")

    verb = add(data)
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")
    prepare = actions.add_parser("prepare", help="cut videos into clips and cache their latents", allow_abbrev=False)
    prepare.add_argument("words", nargs="*", metavar="SOURCE | CONFIG.yaml | key=value")
    prepare.add_argument("--print-config", action="store_true", help="print the merged settings as YAML and stop")
    prepare.add_argument("--json", action="store_true", help="print one JSON object")

    verb = add(convert, "pavdm convert FILE [CONFIG.yaml] base=MODEL output=FOLDER [key=value ...] [flags]")
    verb.add_argument("words", nargs="*", metavar="FILE | CONFIG.yaml | key=value")
    verb.add_argument("--overwrite", action="store_true", help="replace an earlier folder of a model")
    verb.add_argument("--print-config", action="store_true", help="print the merged settings as YAML and stop")
    verb.add_argument("--json", action="store_true", help="print one JSON object")

    verb = add(text_cache, "pavdm text-cache PROMPTS model=MODEL [key=value ...] [flags]")
    verb.add_argument("words", nargs="*", metavar="PROMPTS | key=value")
    verb.add_argument("--json", action="store_true", help="print one JSON object")

    verb = add(evaluate, "pavdm eval DIR|FILE... [key=value ...] [flags]", "eval")
    verb.add_argument("words", nargs="*", metavar="DIR | FILE | key=value")
    verb.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    verb.add_argument("--print-config", action="store_true", help="print the merged settings as YAML and stop")
    verb.add_argument("--json", action="store_true", help="print one JSON object")

    verb = add(configs)
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("ls", help="list the shipped config files")
    copy = actions.add_parser("cp", help="copy a shipped config file")
    copy.add_argument("name", help="as listed by ls")
    copy.add_argument("target", nargs="?", help="file or folder; default: the file's own name here")
    copy.add_argument("--overwrite", action="store_true", help="replace an existing file")

    add_farm(add(farm))
    add_export(add(export))

    verb = add(env)
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
