"""The ``pavdm`` command: its verbs and their flags, and what its exit status says.

``pavdm VERB [PROMPT] [CONFIG.yaml] [key=value ...]``; flags change how the command behaves, keys change what is
rendered or trained.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pavdm_dist import __version__
from pavdm_dist.commands.terminal import complain
from pavdm_dist.commands.words import add_print_config
from pavdm_dist.errors import FailedVideosError, PAVDMError
from pavdm_dist.farm.verbs import add_export, add_farm
from pavdm_dist.values.names import UnknownSettingError
from pavdm_dist.verbs import (
    configs,
    convert,
    data,
    env,
    evaluate,
    export,
    farm,
    no_such_setting,
    plan,
    sample,
    serve,
    simulate,
    text_cache,
    train,
)

EXIT_BAD_INPUT = 2
# So many more than this failed; below what shells use for themselves (126 and more), 125 stands for all from 25 on.
EXIT_FAILED_VIDEOS, MOST_COUNTED = 100, 25

_EPILOG = """\
Settings are dataclass defaults <- CONFIG.yaml <- key=value. `pavdm sample --print-config` shows all of them,
with what each means, and so with other verbs; `pavdm configs ls` lists the shipped files, which are found by these
names wherever no file of that name is. Examples:

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
    status = _status(argv)
    if argv is None:
        _leave(status)
    return status


def _leave(status: int) -> None:
    """Ends the process here where a renderer's thread is still at work, as when it was told to end while one came up.

    All is saved and said. The interpreter would take that thread down in the middle of reading weights, which ends the
    process by SIGABRT; and to wait for it may take minutes.
    """
    crew = sys.modules.get("pavdm_dist.farm.crew")  # what was never imported has begun nothing
    if crew is None or not crew.is_at_work():
        return
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def _status(argv: Sequence[str] | None) -> int:
    """Runs the command line; see :func:`main`."""
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
        return complain(str(error), EXIT_FAILED_VIDEOS + min(error.count, MOST_COUNTED))
    except UnknownSettingError as error:
        return complain(no_such_setting(error), EXIT_BAD_INPUT)
    except PAVDMError as error:
        return complain(str(error), EXIT_BAD_INPUT)
    except KeyboardInterrupt as interrupt:
        # Whoever was interrupted says in the exception where finished work lies.
        status = 128 + signal_of(interrupt)  # as a shell says it
        return complain(f"interrupted{': ' if str(interrupt) else ''}{interrupt}", status)
    except BrokenPipeError:
        # The reader of a pipe (head, less) has seen enough; closing stderr too keeps Python from reporting it.
        sys.stderr.close()
        return 0
    return 0


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
    add_print_config(verb)
    verb.add_argument("--json", action="store_true", help="print the result as one JSON object")

    verb = add(plan, "pavdm plan [CONFIG.yaml] [key=value ...] [chunks=K] [flags]")
    verb.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value")
    add_print_config(verb)
    verb.add_argument("--json", action="store_true", help="print one JSON object")

    verb = add(serve, "pavdm serve [CONFIG.yaml] [key=value ...] --out DIR [flags]")
    verb.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value")
    verb.add_argument("--out", metavar="DIR", help="folder of the videos; a server on it goes on where one ended")
    add_print_config(verb)

    verb = add(simulate, "pavdm simulate [CONFIG.yaml] [key=value ...] [flags]")
    verb.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value")
    add_print_config(verb)
    verb.add_argument("--json", action="store_true", help="print one JSON object")

    verb = add(train, "pavdm train CONFIG.yaml [key=value ...] [flags]")
    verb.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value")
    add_print_config(verb)
    verb.add_argument("--dry-run", action="store_true", help="say what memory and time a step takes, and stop")
    verb.add_argument("--json", action="store_true", help="print what --dry-run says as one JSON object")

    verb = add(data)
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")
    prepare = actions.add_parser("prepare", help="cut videos into clips and cache their latents", allow_abbrev=False)
    prepare.add_argument("words", nargs="*", metavar="SOURCE | CONFIG.yaml | key=value")
    add_print_config(prepare)
    prepare.add_argument("--json", action="store_true", help="print one JSON object")

    verb = add(convert, "pavdm convert FILE [CONFIG.yaml] base=MODEL output=FOLDER [key=value ...] [flags]")
    verb.add_argument("words", nargs="*", metavar="FILE | CONFIG.yaml | key=value")
    verb.add_argument("--overwrite", action="store_true", help="replace an earlier folder of a model")
    add_print_config(verb)
    verb.add_argument("--json", action="store_true", help="print one JSON object")

    verb = add(text_cache, "pavdm text-cache PROMPTS model=MODEL [key=value ...] [flags]")
    verb.add_argument("words", nargs="*", metavar="PROMPTS | key=value")
    add_print_config(verb)
    verb.add_argument("--json", action="store_true", help="print one JSON object")

    verb = add(evaluate, "pavdm eval DIR|FILE... [key=value ...] [flags]", "eval")
    verb.add_argument("words", nargs="*", metavar="DIR | FILE | key=value")
    verb.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    add_print_config(verb)
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
