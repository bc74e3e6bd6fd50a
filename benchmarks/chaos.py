"""Actors and whole commands killed or frozen at random moments of videos: what it costs, and whether results are equal.

    python benchmarks/chaos.py [--quick] [--json] [--kills N] [--seed S]

A tiny untrained model with its codec, two videos in flight, every mode on 1 to 3 stages. Victims are the first, a
middle and the last stage, the decode actor and the driver (a whole `pavdm sample`, which is given again); signals are
SIGKILL and SIGSTOP (not for the driver). Moments are uniform over the shifts of the run, the growing window included.
One at which nothing was left to lose is drawn again, from the seed, the kill's number and how often that happened.
Latents and frames are compared with those of the sampler's loop in this process. Ends with status 1, and says why,
where a kill hits nothing at all, a result differs, more rows are repeated than allowed, or a time is above its bound
(times are not judged with ``--quick``, which a test runs beside others). Per kill:

* ``redrawn``: moments before this one that hit nothing;
* ``detected_s``: until the driver took the loss for one (null for the driver itself); at most 5 s after SIGKILL, the
  link timeout and 5 s after SIGSTOP;
* ``streaming_again_s``: until the next shift of a stream that was in flight, at most 15 s, and the link timeout after
  SIGSTOP. For the driver from the start of the second command to its first chunk, its interpreter and its own Ray
  included: at most 15 s, too;
* ``rows_repeated``: rows of the stream that was being run which the next gang ran again (null where that stream was
  over by then), and ``rows_allowed``: D S + 1
  for D = 2 shifts on their way; in mode displaced those since the last exact one too. For the decoder, which costs no
  rows, 0. For the driver, whose state is on disk at every closed segment, D S + 1 and the rows of one segment's
  chunks, S for each;
* ``equal``: latents and frames are those of an undisturbed run, bit for bit (of the driver's, packets and timestamps).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import machine, machine_line, parser

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers import reference_chunks, tiny_checkpoint, tiny_model, tiny_stream

from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.engine.events import Finished
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.order import Unit
from pavdm_dist.engine.ray_engine import RayEngine
from pavdm_dist.io.latents import read_latents
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.method.schedule import Mode
from pavdm_dist.method.stream import Stream

CUTS = {1: [(0, 4)], 2: [(0, 2), (2, 4)], 3: [(0, 1), (1, 3), (3, 4)]}
MODES: tuple[Mode, ...] = ("window", "causal", "displaced")
VICTIMS = ("middle", "decoder", "driver", "last", "first")
SHIFTS_ON_THE_WAY, STEPS_PER_SHIFT, RESYNC, CHUNKS, SEGMENT, LINK_TIMEOUT_S = 2, 2, 6, 24, 3, 4.0
DETECTED_S, AGAIN_S, DRAWS = 5.0, 15.0, 6
PROMPT = "a red three drifting up"


@dataclass
class Kill:
    """What is to happen, and what came of it."""

    victim: str
    moment: float
    signal: str
    mode: Mode
    num_stages: int
    redrawn: int = 0
    detected_s: float | None = None
    streaming_again_s: float | None = None
    rows_repeated: int | None = None
    rows_allowed: int | None = None
    hit: bool = False  # something was left to lose
    equal: bool = False


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--kills", type=int, help="how many (20; 3 with --quick)")
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    count = arguments.kills or (3 if arguments.quick else 20)
    rng = random.Random(arguments.seed)
    drawn = [_drawn(rng, number) for number in range(count)]
    kills = []
    import ray

    # Ray tells of dead workers on standard output.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        model = tiny_checkpoint(Path(folder) / "model")
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        undisturbed: dict[Any, list[str]] = {}

        def strike(kill: Kill) -> None:
            if kill.victim == "driver":
                return _kill_driver(kill, model, Path(folder))
            if kill.mode not in undisturbed:
                undisturbed[kill.mode] = _reference(model, kill.mode)
            kill.equal = _digest(_run(model, kill)) == undisturbed[kill.mode]
            kill.hit = kill.detected_s is not None

        for number, first in enumerate(drawn):
            kills.append(struck(first, strike, f"{arguments.seed} {number}"))
            print(kills[-1], file=sys.stderr, flush=True)
        ray.shutdown()
    rows = [vars(kill) for kill in kills]
    report = {"machine": machine(), "seed": arguments.seed, "link_timeout_s": LINK_TIMEOUT_S, "kills": rows}
    print(json.dumps(report) if arguments.json else _table(report))
    found = [f"kill {number}: {fault}" for number, kill in enumerate(kills) for fault in faults(kill, arguments.quick)]
    if found:
        raise SystemExit("\n".join(["not all is kept:", *found]))


def struck(drawn: Kill, strike: Callable[[Kill], None], seed: str) -> Kill:
    """A kill after it happened, its moment drawn again while it hits nothing.

    Args:
        drawn: what is to happen.
        strike: does it, and notes what came of it.
        seed: of further moments.
    """
    kill = replace(drawn)
    strike(kill)
    while not kill.hit and kill.equal and kill.redrawn < DRAWS - 1:
        times = kill.redrawn + 1
        kill = replace(drawn, moment=round(random.Random(f"{seed} {times}").random(), 3), redrawn=times)
        strike(kill)
    return kill


def faults(kill: Kill, quick: bool = False) -> list[str]:
    """What of a kill is not as it must be, in words; with ``quick`` the clock is not asked."""
    frozen = LINK_TIMEOUT_S if kill.signal == "SIGSTOP" else 0
    bounds: list[tuple[str, float | None, float]] = [("rows_repeated", kill.rows_repeated, kill.rows_allowed or 0)]
    if not quick:
        bounds += [
            ("detected_s", kill.detected_s, DETECTED_S + frozen),
            ("streaming_again_s", kill.streaming_again_s, AGAIN_S + frozen),
        ]
    found = [] if kill.equal else ["the result differs"]
    found += [f"{name}={value}: at most {most:g}" for name, value, most in bounds if value is not None and value > most]
    if not kill.hit:
        found.append(f"nothing was hit in {kill.redrawn + 1} draws")
    elif kill.streaming_again_s is None:
        found.append("nothing streamed again")
    return found


def _drawn(rng: random.Random, number: int) -> Kill:
    victim = VICTIMS[number % len(VICTIMS)]
    stages = {"middle": 3, "driver": rng.choice((0, 2))}.get(victim, rng.choice((1, 2, 3)))
    how = "SIGKILL" if victim == "driver" else rng.choice(("SIGKILL", "SIGKILL", "SIGSTOP"))
    return Kill(victim, round(rng.random(), 3), how, rng.choice(MODES), stages)


class _Watch(logging.Handler):
    """Hears what the engine says, in the thread that drives it, and so sees the driver as it is at that moment."""

    def __init__(self, engine: RayEngine, kill: Kill) -> None:
        super().__init__()
        self._engine, self._kill = engine, kill
        self._struck: float | None = None
        self._ran: Unit | None = None
        self._going_on = False

    def strike(self) -> None:
        """Kills or freezes the victim."""
        import ray

        gang, kill = self._engine._gang, self._kill
        if kill.victim == "decoder":
            assert gang._cast.decoding is not None and gang._cast.decoding.place is not None
            pid = gang._cast.decoding.place.pid
        else:
            pid = gang._cast.places[{"first": 0, "middle": 1, "last": kill.num_stages - 1}[kill.victim]].pid
        self._ran = ray.get(gang._cast.stages[-1].progress.remote())
        self._struck = time.monotonic()
        os.kill(pid, getattr(signal, kill.signal))

    def emit(self, record: logging.LogRecord) -> None:
        said, kill = record.getMessage(), self._kill
        if self._struck is None:
            return
        if kill.detected_s is None and ("; restart 1 of" in said or "another takes over" in said):
            kill.detected_s = round(time.monotonic() - self._struck, 3)
            self._going_on = kill.victim == "decoder"
        if said.startswith("generation "):
            self._going_on = True
            flights = self._engine._driver._flights
            if self._ran is not None and self._ran.stream in flights:
                point = flights[self._ran.stream].stream.resume
                # Until the loss was noticed the others may have ended a further shift, which is not run again.
                kill.rows_repeated = max(0, self._ran.row + 1 - (0 if point is None else point.snapshot.row))

    def streamed(self) -> None:
        """An output has come."""
        if self._struck is not None and self._going_on and self._kill.streaming_again_s is None:
            self._kill.streaming_again_s = round(time.monotonic() - self._struck, 3)


def _streams(mode: Mode) -> list[Stream]:
    displaced = Displaced(RESYNC, exact_growing=False)
    settings: dict[str, Any] = {"mode": mode, "displaced": displaced, "num_chunks": CHUNKS}
    return [tiny_stream(0, 1, 3.0, **settings), tiny_stream(1, 2, 1.0, start="clip", **settings)]


def _run(model: Path, kill: Kill) -> list[Finished]:
    chosen = EngineOptions(kill.num_stages, link_timeout_s=LINK_TIMEOUT_S, restart_backoff_s=0.2)
    finished, streams, seen = [], _streams(kill.mode), 0
    plan = streams[0].plan
    kill.rows_repeated = 0 if kill.victim == "decoder" else None
    kill.rows_allowed = 0 if kill.victim == "decoder" else _rows_allowed(kill.mode, plan.steps_per_shift)
    shifts = sum(stream.plan.num_rows // stream.plan.steps_per_shift for stream in streams)
    with RayEngine(str(model / "transformer"), CUTS[kill.num_stages], chosen, str(model / "vae")) as engine:
        watch = _Watch(engine, kill)
        logging.getLogger("pavdm_dist").addHandler(watch)

        def count(*_: object) -> None:
            nonlocal seen
            seen += 1
            watch.streamed()
            if seen == 1 + int(kill.moment * (shifts - 4)):
                watch.strike()

        for chunk in engine.run(streams, 2, on_grown=count):
            finished.append(chunk)
            count()
        logging.getLogger("pavdm_dist").removeHandler(watch)
    return finished


def _reference(model: Path, mode: Mode) -> list[str]:
    """What the sampler's loop and one decoder a video give, in this process."""
    codec, found = WanCodec.from_pretrained(model / "vae"), []
    for stream in _streams(mode):
        decoder = codec.decoder()
        for clean in reference_chunks(tiny_model(), stream):
            found.append(_hash(clean.latents, decoder.decode(clean.latents)))
    return found


def _rows_allowed(mode: Mode, steps: int) -> int:
    return SHIFTS_ON_THE_WAY * steps + 1 + (RESYNC if mode == "displaced" else 0)


def _digest(finished: Sequence[Finished]) -> list[str]:
    """Of every chunk's latents and frames, by stream and chunk; chunks must be whole and in order."""
    found = []
    for stream in sorted({f.stream for f in finished}):
        mine = [f for f in finished if f.stream == stream]
        assert [f.clean.index for f in mine] == list(range(CHUNKS)), "a chunk is missing, doubled or out of order"
        for f in mine:
            assert f.frames is not None
            found.append(_hash(f.clean.latents, f.frames))
    return found


def _hash(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def _command(model: Path, output: Path, kill: Kill) -> list[str]:
    settings = {
        "model": model, "output": output, "mode": kill.mode, "num_frames": 8 * CHUNKS - 3, "save_latents": "true",
        "chunks_per_segment": SEGMENT, "num_stages": kill.num_stages, "allow_untrained_causal": "true",
    }  # fmt: skip
    if kill.mode == "displaced":
        settings |= {"displaced.resync_every_steps": RESYNC, "displaced.exact_growing": "false"}
    words = [PROMPT, *(f"{name}={value}" for name, value in settings.items())]
    return [sys.executable, "-m", "pavdm_dist", "sample", *words]


def _kill_driver(kill: Kill, model: Path, folder: Path) -> None:
    """A whole command, killed and given again, unless it had ended before."""
    whole, cut = folder / f"whole-{kill.mode}.mp4", folder / f"cut-{time.monotonic_ns()}.mp4"
    if not whole.exists():
        subprocess.run(_command(model, whole, kill), check=True, capture_output=True)
    process = subprocess.Popen(_command(model, cut, kill), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    target = int(kill.moment * (CHUNKS - 4))
    for line in process.stderr:
        if _chunk(line) == target:
            break
    process.kill()
    process.communicate()
    kill.hit = process.returncode == -signal.SIGKILL
    if kill.hit:
        _again(kill, model, cut, target)
    else:
        assert process.returncode == 0, "it ended by itself, and not well"
    same = torch.equal(*(read_latents(path.with_suffix(".safetensors")) for path in (whole, cut)))
    kill.equal = same and _packets(whole) == _packets(cut)


def _again(kill: Kill, model: Path, cut: Path, target: int) -> None:
    """The command that was killed after chunk ``target``, given again."""
    started = time.monotonic()
    again = subprocess.Popen(_command(model, cut, kill), stderr=subprocess.PIPE, text=True)
    assert again.stderr is not None
    first = 0
    for line in again.stderr:
        if found := re.search(r"goes on at chunk (\d+)", line):
            first = int(found[1])
        if kill.streaming_again_s is None and _chunk(line) is not None:
            kill.streaming_again_s = round(time.monotonic() - started, 3)
    again.wait()
    assert again.returncode == 0
    steps = STEPS_PER_SHIFT
    kill.rows_repeated = steps * max(0, target + 1 - first)
    kill.rows_allowed = _rows_allowed(kill.mode, steps) + steps * SEGMENT


def _chunk(line: str) -> int | None:
    """Number of the chunk that a line of the log tells the end of."""
    found = re.search(r"INFO chunk (\d+)", line)
    return int(found[1]) if found else None


def _packets(path: Path) -> list[tuple[int, int, bytes]]:
    import av

    with av.open(str(path)) as container:
        return [(p.pts, p.dts, bytes(p)) for p in container.demux(container.streams.video[0]) if p.size]


def _table(report: dict[str, Any]) -> str:
    lines = [machine_line(report["machine"]), ""]
    names = list(report["kills"][0])
    cells = [[str(kill[name]) for name in names] for kill in report["kills"]]
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(names)]
    for row in (names, *cells):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    main()
