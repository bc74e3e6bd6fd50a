"""The verbs of the command line: each sorts its words, calls one library function and prints.

Heavy packages are imported inside of them, so that ``pavdm --help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout

from pavdm_dist.commands.terminal import print_config, print_report, say
from pavdm_dist.commands.words import is_override, run_config, sort_settings, sort_words
from pavdm_dist.errors import ConfigError, PAVDMError
from pavdm_dist.farm.verbs import export_report, farm_report, run_settings
from pavdm_dist.io import shipped
from pavdm_dist.values.fields import show
from pavdm_dist.values.names import UnknownSettingError, own_names

# Where the settings of verbs are, for what is asked of all of them.
SETTINGS = {
    "sample": ("pavdm_dist.config", "SampleConfig"),
    "plan": ("pavdm_dist.config", "PlanConfig"),
    "farm run": ("pavdm_dist.farm.settings", "FarmConfig"),
    "serve": ("pavdm_dist.serve.settings", "ServeConfig"),
    "train": ("pavdm_dist.train.train_settings", "TrainConfig"),
    "data prepare": ("pavdm_dist.data.prepare", "PrepareConfig"),
    "eval": ("pavdm_dist.evaluate.settings", "EvalConfig"),
    "simulate": ("pavdm_dist.commands.simulate", "SimulateConfig"),
    "convert": ("pavdm_dist.commands.convert", "ConvertConfig"),
    "text-cache": ("pavdm_dist.commands.text_cache", "TextCacheConfig"),
}


def no_such_setting(error: UnknownSettingError) -> str:
    """What is said of a key that is none: whose setting it is, where other verbs have it."""
    having = [f"pavdm {verb}" for verb, place in SETTINGS.items() if error.name in own_names(*place)]
    known = error.bare is not None and having
    return f"{error.bare}, which is a setting of {', '.join(having)}" if known else str(error)


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
            print_config(config)
    elif arguments.dry_run:
        from pavdm_dist.commands.dry_run import dry_run

        reports = [dry_run(config, arguments.overwrite) for config in configs]
        if arguments.json and arguments.resume is not None:
            reports = [{"videos": reports}]
        for report in reports:
            print_report(report, arguments.json)
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
            say(json.dumps(result))


def plan(arguments: argparse.Namespace) -> None:
    """Show the window plan, its cost and the layer split, and with cluster.devices=N how to use N devices."""
    from pavdm_dist.config import PlanConfig

    words = [word for word in arguments.words if not word.startswith("chunks=")]
    config = run_config(PlanConfig, words, needs_prompt=False)
    if arguments.print_config:
        return print_config(config)
    chunks = None
    for text in (word.partition("=")[2] for word in arguments.words if word not in words):
        # Its digits are counted first: Python turns no text of thousands of them into a number.
        digits = text.lstrip("0") if text.isdecimal() else ""
        if not 1 <= len(digits) <= 12:
            raise ConfigError(f"chunks={show(text)}: must be a whole number above 0 and below {10**12:,}")
        chunks = int(digits)
    if chunks is not None and (config.num_frames is not None or config.seconds is not None):
        raise ConfigError(f"chunks={chunks}: stands for num_frames or seconds, give one of the three")
    from pavdm_dist.commands.plan import plan_command

    print_report(plan_command(config, chunks=chunks), arguments.json)


def serve(arguments: argparse.Namespace) -> None:
    """Take videos by HTTP (OpenAI's /v1/videos), render them, and let them be watched on a page."""
    from pavdm_dist.serve.settings import ServeConfig, validate_serve
    from pavdm_dist.values.merging import load_config

    prompt, config_file, overrides = sort_words(arguments.words)
    if prompt is not None:
        raise ConfigError(f"{prompt!r} is neither a .yaml file nor key=value")
    config = load_config(ServeConfig, config_file, overrides)
    if arguments.print_config:
        return print_config(config)
    validate_serve(config)
    if not arguments.out:
        raise ConfigError("--out DIR is missing: the folder that videos are kept in")
    from pavdm_dist.serve.run import serve_command

    with redirect_stdout(sys.stderr):  # where Ray tells of dead workers
        serve_command(config, arguments.out)


def simulate(arguments: argparse.Namespace) -> None:
    """Model a pipeline of stages, links and queues: makespan, utilisation and a chart, without a cluster."""
    from pavdm_dist.commands.simulate import SimulateConfig, simulate_report
    from pavdm_dist.values.merging import load_config

    prompt, config_file, overrides = sort_words(arguments.words)
    if prompt is not None:
        raise ConfigError(f"{prompt!r} is neither a .yaml file nor key=value")
    config = load_config(SimulateConfig, config_file, overrides)
    if arguments.print_config:
        return print_config(config)
    print_report(simulate_report(config), arguments.json)


def train(arguments: argparse.Namespace) -> None:
    """Train the codec or the model of a config file; run again to go on where it stopped."""
    from pavdm_dist.train.train_settings import TrainConfig
    from pavdm_dist.values.merging import load_config

    prompt, config_file, overrides = sort_words(arguments.words)
    if prompt is not None:
        raise ConfigError(f"{prompt!r} is neither a .yaml file nor key=value")
    config = load_config(TrainConfig, config_file, overrides)
    if arguments.print_config:
        return print_config(config)
    if not arguments.words:  # the settings' defaults are no recipe
        raise ConfigError("give a config: pavdm train CONFIG.yaml; `pavdm configs ls` lists the shipped ones")
    from pavdm_dist.commands.train import dry_run_command, train_command

    if arguments.dry_run:
        return print_report(dry_run_command(config), arguments.json)
    train_command(config, arguments.words)


def data(arguments: argparse.Namespace) -> None:
    """Prepare training clips from videos and captions; run again to go on where it stopped."""
    from pavdm_dist.data.prepare import PrepareConfig, prepare_command
    from pavdm_dist.values.merging import load_config

    overrides = [word for word in arguments.words if is_override(word)]
    files = [word for word in arguments.words if word.endswith((".yaml", ".yml")) and word not in overrides]
    if len(files) > 1:
        raise ConfigError(f"two config files, {files[0]} and {files[1]}: give one")
    sources = [word for word in arguments.words if word not in overrides and word not in files]
    config = load_config(PrepareConfig, shipped.config_file(files[0]) if files else None, overrides)
    if sources:
        config.source = [*sources, *(config.source if any(word.startswith("source=") for word in overrides) else [])]
    if arguments.print_config:
        return print_config(config)
    print_report(prepare_command(config), arguments.json)


def convert(arguments: argparse.Namespace) -> None:
    """Turn a published file of weights (.pt, .safetensors) into a model folder."""
    from pavdm_dist.commands.convert import ConvertConfig, convert_command
    from pavdm_dist.values.merging import load_config

    source, config_file, overrides = sort_words(arguments.words)
    if source is not None:
        overrides.insert(0, f"source={source}")
    config = load_config(ConvertConfig, config_file, overrides)
    if arguments.print_config:
        return print_config(config)
    print_report(convert_command(config, arguments.overwrite), arguments.json)


def text_cache(arguments: argparse.Namespace) -> None:
    """Encode a file of prompts with a model's large text encoder, so that rendering needs none."""
    from pavdm_dist.commands.text_cache import TextCacheConfig, text_cache_report
    from pavdm_dist.values.merging import load_config

    prompts, config_file, overrides = sort_words(arguments.words)
    if prompts is not None:
        overrides.insert(0, f"prompts={prompts}")
    config = load_config(TextCacheConfig, config_file, overrides)
    if arguments.print_config:
        return print_config(config)
    print_report(text_cache_report(config), arguments.json)


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure how videos hold over time: drift of every measure, tables, plots, one page."""
    from pavdm_dist.evaluate.command import eval_report, for_people
    from pavdm_dist.evaluate.settings import EvalConfig
    from pavdm_dist.values.merging import load_config

    overrides = [word for word in arguments.words if is_override(word)]
    config = load_config(EvalConfig, None, overrides)
    config.videos = [*(word for word in arguments.words if word not in overrides), *config.videos]
    if arguments.print_config:
        return print_config(config)
    report, failure = eval_report(config, arguments.overwrite)
    print_report(report if arguments.json else for_people(report), arguments.json)
    if failure is not None:
        raise failure


def configs(arguments: argparse.Namespace) -> None:
    """List the shipped config files, or copy one to edit."""
    from pavdm_dist.commands.configs import copy_config, describe_configs

    if arguments.action == "ls":
        found = describe_configs()
        width = max(len(name) for name, _ in found)
        say("\n".join(f"{name:{width}}  {about}".rstrip() for name, about in found))
    else:
        say(str(copy_config(arguments.name, arguments.target, overwrite=arguments.overwrite)))


def farm(arguments: argparse.Namespace) -> None:
    """Render the shots of a manifest on a pool of renderers; run again to go on with what is left."""
    if arguments.action == "run" and arguments.print_config:
        return print_config(run_settings(arguments)[1])
    report = farm_report(arguments)
    if arguments.json or arguments.action != "run" or arguments.dry_run:
        print_report(report, arguments.json)


def export(arguments: argparse.Namespace) -> None:
    """Lay finished videos out as evaluation toolkits expect them."""
    print_report(export_report(arguments), arguments.json)


def env(arguments: argparse.Namespace) -> None:
    """Versions, processors and Ray's state, for bug reports; starts nothing."""
    from pavdm_dist.commands.env import environment

    print_report(environment(), arguments.json)
