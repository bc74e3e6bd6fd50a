"""Does it hold? The paper's comparison: PA-VDM and its baselines on the same held-out prompts with the same noise.

    python benchmarks/drift.py --work FOLDER [--methods NAME ...] [--models NAME=FOLDER ...] [--variants NAME:key=value,... ...]
                               [--prompts N] [--seeds N] [--digits N] [--seconds S] [--guidance-scale G]
                               [--steps T] [--workers N] [--minutes M] [--no-report] [--output FOLDER] [--shown N] [--quick] [--json]

Methods: pavdm, causal and displaced (its modes), replacement, replacement-noise, fifo, autoregressive; real (the scenes
as the world draws them) and codec (those, encoded and decoded). Variants are further ways, by the settings that
``pavdm sample`` takes: ``steps15:num_inference_steps=15``. A method without a model of its own takes that of pavdm, and
that is the shipped one unless it is named.

Rendering can be stopped at any time and goes on by the same command; ``--minutes`` bounds a slice of it. A video that
was made with other settings or weights is refused, not mixed in. What is there is then measured (once; ``pavdm eval``
does it) and compared: JSON or a table, and with ``--output`` the report of ``pavdm eval`` with curves, ``drift.json``
and sheets of frames.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from common import machine, parser
from drift_measured import measure_all
from drift_report import result_of, table, write_all
from drift_videos import METHODS, REFERENCES, Job, Outcome, is_there, jobs_of, make_all, missing, tell, variants_of

from pavdm_dist.commands.signals import Signals, Stopped, signal_of
from pavdm_dist.digits.world import FPS
from pavdm_dist.errors import PAVDMError
from pavdm_dist.evaluate.command import check_new_report


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--work", type=Path, required=True, help="folder of the videos, gone on with")
    options.add_argument("--methods", nargs="+", default=[*REFERENCES, *METHODS], help="which (all)")
    options.add_argument("--variants", nargs="+", default=[], help="further ones, NAME:key=value,key=value")
    options.add_argument("--models", nargs="+", default=[], help="NAME=FOLDER (the shipped one for all)")
    options.add_argument("--prompts", type=int, help="held-out ones (32; 1 with --quick)")
    options.add_argument("--seeds", type=int, help="videos of each prompt (2; 1 with --quick)")
    options.add_argument("--digits", type=int, choices=(1, 2), help="digits in every prompt (one or two at random)")
    options.add_argument("--seconds", type=float, help="length of each video (60; 6 with --quick)")
    options.add_argument("--guidance-scale", type=float, help="of every method (the model's own)")
    options.add_argument("--steps", type=int, help="num_inference_steps of every method (the model's own)")
    options.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one per core)")
    options.add_argument("--minutes", type=float, help="no video is begun that would end later")
    options.add_argument("--no-report", action="store_true", help="only render")
    options.add_argument("--output", type=Path, help="folder for the report; an earlier report there is replaced")
    options.add_argument("--shown", type=int, default=6, help="prompts whose frames the report shows (6)")
    args = options.parse_args()
    args.prompts = (1 if args.quick else 32) if args.prompts is None else args.prompts
    args.seeds = (1 if args.quick else 2) if args.seeds is None else args.seeds
    args.seconds = (6 if args.quick else 60) if args.seconds is None else args.seconds
    if min(args.prompts, args.seeds, args.workers) < 1 or not 2 <= args.seconds * FPS < math.inf:
        options.error("--prompts, --seeds and --workers: at least 1; --seconds: at least two frames")
    if args.shown < 0:
        options.error("--shown: at least 0")
    try:
        with Signals(of_process=True):
            failed = _compared(args)
    except PAVDMError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt as stop:
        said = f"stopped: {stop}; " if str(stop) else "stopped: "
        print(f"{said}the same command goes on", file=sys.stderr)
        raise SystemExit(128 + signal_of(stop)) from None
    if failed:
        raise SystemExit(f"{len(failed)} videos failed; the first: {failed[0]}")


def _compared(args: argparse.Namespace) -> list[str]:
    """Makes what is missing, and reports; what became of videos that failed.

    Raises:
        PAVDMError: settings that cannot be, or a report that cannot be written.
        KeyboardInterrupt: a signal; what was made and measured is kept.
    """
    frames = round(args.seconds * FPS)
    given = {"guidance_scale": args.guidance_scale, "num_inference_steps": args.steps}
    common = [f"{name}={value}" for name, value in given.items() if value is not None]
    variants = variants_of(args.methods, args.variants, args.models, common)
    jobs = jobs_of(args.work, variants, args.prompts, args.seeds, frames, args.digits)
    if args.output is not None:
        check_new_report(args.output, overwrite=True)
    left = missing(jobs)
    outcomes: list[Outcome] = []
    print(f"{len(jobs) - len(left)} of {len(jobs)} videos are there", file=sys.stderr)
    if left:
        try:
            outcomes = make_all(left, min(args.workers, len(left)), args.minutes, tell)
        except KeyboardInterrupt as stop:
            raise Stopped(signal_of(stop), _there(jobs)) from stop
        print(_there(jobs), file=sys.stderr)
    failed = [outcome.error for outcome in outcomes if outcome.error is not None]
    if args.no_report:
        return failed
    videos, unmeasured = measure_all(args.work, jobs, args.workers)
    failed += unmeasured.values()
    result = {"machine": machine(), "seconds": frames / FPS, "failed": failed, **result_of(videos, jobs)}
    result["settings"] = {one.name: list(one.words) for one in variants}
    try:
        if args.output is not None and videos:
            write_all(args.output, result, videos, unmeasured, args.shown)
    finally:  # a report that cannot be made, or is not waited for, costs no numbers
        print(json.dumps(result) if args.json else table(result))
    return failed


def _there(jobs: Sequence[Job]) -> str:
    return f"{sum(is_there(job) for job in jobs)} of {len(jobs)} videos are there"


if __name__ == "__main__":
    main()
