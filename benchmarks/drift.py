"""Does it hold? The paper's comparison: PA-VDM and its baselines on the same held-out prompts with the same noise.

    python benchmarks/drift.py --work FOLDER [--methods NAME ...] [--models NAME=FOLDER ...] [--variants NAME:key=value,... ...]
                               [--prompts N] [--seeds N] [--digits N] [--seconds S] [--guidance-scale G]
                               [--workers N] [--minutes M] [--no-report] [--output FOLDER] [--shown N] [--quick] [--json]

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

import json
import os
import sys
from pathlib import Path

from common import machine, parser
from drift_report import measure_all, result_of, table, write_all
from drift_videos import METHODS, REFERENCES, Outcome, is_there, jobs_of, make_all, missing, tell, variants_of

from pavdm_dist.commands.signals import Signals, signal_of
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
    options.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one per core)")
    options.add_argument("--minutes", type=float, help="no video is begun that would end later")
    options.add_argument("--no-report", action="store_true", help="only render")
    options.add_argument("--output", type=Path, help="folder for the report; an earlier report there is replaced")
    options.add_argument("--shown", type=int, default=6, help="prompts whose frames the report shows (6)")
    args = options.parse_args()
    count, seeds = args.prompts or (1 if args.quick else 32), args.seeds or (1 if args.quick else 2)
    frames = round((args.seconds or (6 if args.quick else 60)) * FPS)
    if min(count, seeds, args.workers, frames - 1) < 1:
        options.error("--prompts, --seeds and --workers: at least 1; --seconds: at least two frames")
    common = [] if args.guidance_scale is None else [f"guidance_scale={args.guidance_scale}"]
    try:
        variants = variants_of(args.methods, args.variants, args.models, common)
        jobs = jobs_of(args.work, variants, count, seeds, frames, args.digits)
        if args.output is not None:
            check_new_report(args.output, overwrite=True)
        left = missing(jobs)
    except PAVDMError as error:
        raise SystemExit(str(error)) from None
    outcomes: list[Outcome] = []
    print(f"{len(jobs) - len(left)} of {len(jobs)} videos are there", file=sys.stderr)
    if left:
        try:
            with Signals(of_process=True):
                outcomes = make_all(left, min(args.workers, len(left)), args.minutes, tell)
        except KeyboardInterrupt as interrupt:
            raise SystemExit(128 + signal_of(interrupt)) from None
        print(f"{sum(is_there(job) for job in jobs)} of {len(jobs)} videos are there", file=sys.stderr)
    failed = [outcome.error for outcome in outcomes if outcome.error is not None]
    if not args.no_report:
        videos = measure_all(args.work, jobs, args.workers)
        result = {"machine": machine(), "seconds": frames / FPS, "failed": failed, **result_of(videos, jobs)}
        result["settings"] = {one.name: list(one.words) for one in variants}
        if args.output is not None and videos:
            try:
                write_all(args.output, result, videos, args.shown)
            except PAVDMError as error:
                raise SystemExit(str(error)) from None
        print(json.dumps(result) if args.json else table(result))
    if failed:
        raise SystemExit(f"{len(failed)} videos failed; the first: {failed[0]}")


if __name__ == "__main__":
    main()
