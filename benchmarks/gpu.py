"""What one GPU does with this program, in at most five minutes: random weights, bfloat16, one process, no Ray needed.

    python benchmarks/gpu.py [--quick] [--json] [--part units|sampling|staged|decode|training|ray] [--minutes M]
                             [--shape NAME] [--mode NAME] [--latents N] [--eager] [--compiled]
                             [--recompute R ...] [--batch N] [--peak-tflops X]

units     the stage loop that users run, one stage, full windows: seconds of a micro-batch by the chunks it holds, plain
          and compiled in turn, per mode and size; kernels' time beside the wall's, launches and waits for the device.
          With the rehearsal's seconds and the error of compiled blocks against plain ones.
sampling  seconds of whole videos (425 latents: a minute at 24 frames per second with the 1.2 codec's stride), without
          decoding, and their FLOP over time and the device's matrix peak.
staged    two stages on the one card, over gloo through pinned main memory, beside one stage: the same bits.
decode    seconds of decoding a chunk in bfloat16.
training  windows of 30 latents: loss, backward pass, AdamW and averaged weights under ZeRO stage 1.
ray       the sampling of `pavdm sample num_stages=1`, with Ray's start; where Ray is installed.

Shapes: stdit3-xl (default), skyreels-v2-df-1.3b-540p, wan2.2-ti2v-5b, rolling (Rolling Forcing's). What does not fit
into the minutes, or into memory, is named under "skipped"; what fails under "failed", with the others going on and
status 1 at the end. --quick is a tiny model on whatever device is there, to see that everything runs.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import machine, machine_line, parser
from gpu_sampling import Runner, decoded, staged, units, whole
from gpu_shapes import CASES, QUICK, TINY, Case

from pavdm_dist.method.schedule import Mode
from pavdm_dist.models.stdit3 import STDiT3Config

PARTS = ("units", "sampling", "staged", "decode", "training", "ray")
MODES = ("window", "causal", "displaced")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--part", choices=PARTS, help="only this one")
    options.add_argument("--minutes", type=float, default=5.0, help="nothing is begun after so many (5)")
    options.add_argument("--shape", choices=CASES, default="stdit3-xl", help="what is sampled")
    options.add_argument("--mode", choices=MODES, help="only this one")
    options.add_argument("--latents", type=int, help="of whole videos (425; 15 with --quick)")
    options.add_argument("--eager", action="store_true", help="compile nothing")
    options.add_argument("--compiled", action="store_true", help="nothing plain beside it, on GPUs")
    options.add_argument("--steps", type=int, help="training steps that are timed (5; 2 with --quick)")
    options.add_argument(
        "--recompute", nargs="+", help="training: zero.recompute (none every:1; or every:N, budget:GiB)"
    )
    options.add_argument("--batch", type=int, default=1, help="training: windows a step")
    options.add_argument("--peak-tflops", type=float, default=989.0, help="of dense bfloat16 products (H100 SXM: 989)")
    args = options.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.quick:
        raise SystemExit("benchmarks/gpu.py: there is no GPU here; --quick runs a tiny model on the CPU")
    torch.set_num_threads(args.threads)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    report: dict[str, Any] = {"machine": {**machine(), "device": name}, "peak_tflops": args.peak_tflops, "skipped": []}
    failed = list[str]()
    for part, measured, call in calls(args, QUICK if args.quick else CASES[args.shape], device):
        if time.perf_counter() - STARTED > 60 * args.minutes:
            report["skipped"].append(f"{part} {measured}: no time left")
            continue
        try:
            report.setdefault(part, {})[measured] = call()
        except torch.OutOfMemoryError:
            report["skipped"].append(f"{part} {measured}: out of memory")
        except Exception as error:  # time on a GPU is dear: the others are measured all the same
            traceback.print_exc()
            failed.append(f"{part} {measured}: {type(error).__name__}: {error}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report["failed"] = failed
    print(json.dumps(report) if args.json else text(report))
    if failed:
        raise SystemExit(1)


def calls(args: Any, case: Case, device: torch.device) -> list[tuple[str, str, Callable[[], Any]]]:
    """All measurements: part, name, and what makes it; the most wanted first."""
    peak, latents = args.peak_tflops, args.latents or (15 if args.quick else 425)
    runners: dict[bool, Runner] = {}

    def runner(compiled: bool) -> Runner:
        if compiled not in runners:
            runners.clear()  # one model at a time
            runners[compiled] = Runner(case, device, compiled)
        return runners[compiled]

    # Compiled on a GPU; torch's kernels for a CPU take a minute to build, and --quick has none.
    compiles = [False] if args.eager or device.type == "cpu" else [True] if args.compiled else [False, True]
    modes = [mode for mode in case.modes if args.mode in (None, mode)]
    last, width, short = compiles[-1], case.plan.window_chunks, min(latents, 8 * case.plan.latent_chunk_size)

    # Models are made when it is their turn.
    def of_units(compiled: bool, mode: Mode, size: int) -> dict[str, Any]:
        return units(runner(compiled), mode, size, peak)

    def of_a_video(mode: Mode) -> dict[str, Any]:
        return whole(runner(last), mode, latents, 1 if mode == "window" else width, peak)

    def of_two_stages(mode: Mode) -> dict[str, Any]:
        return staged(runner(last), mode, short, 1)

    def of_ray() -> dict[str, float]:
        return _on_ray(runner(False), latents)

    made: list[tuple[str, str, Callable[[], Any]]] = []
    for mode in modes:
        for size in [1] if mode == "window" else sorted({1, 3, width}):
            for compiled in compiles:
                made.append(("units", f"{mode} {size} {_word(compiled)}", partial(of_units, compiled, mode, size)))
    made += [("sampling", mode, partial(of_a_video, mode)) for mode in modes]
    made += [("staged", mode, partial(of_two_stages, mode)) for mode in modes]
    if case.codec is not None:
        made.append(("decode", case.codec, partial(decoded, case, device, 5)))
    for compiled in compiles:
        for recompute in args.recompute or ("every:1", "none"):
            measured = f"recompute={recompute} {_word(compiled)}"
            made.append(("training", measured, partial(_training, args, compiled, recompute)))
    if device.type == "cuda" and _has_ray() and case.name == "stdit3-xl":
        made.append(("ray", "window", of_ray))
    # Plain and compiled units take turns by model, not by size: loading one takes a second.
    made.sort(key=lambda entry: (PARTS.index(entry[0]), entry[1].endswith("compiled")))
    return [entry for entry in made if args.part in (None, entry[0])]


def _training(args: Any, compiled: bool, recompute: str) -> dict[str, float | None]:
    from gpu_training import training

    config, cells = (TINY, (4, 6)) if args.quick else (STDiT3Config(pred_sigma=False), (30, 53))
    steps = args.steps or (2 if args.quick else 5)
    return training(config, cells, steps, args.peak_tflops, compiled, recompute, args.batch)


def _on_ray(runner: Runner, latents: int) -> dict[str, float]:
    """One stage as an actor, from a folder of weights; with what Ray's start, loading and compiling take."""
    import tempfile

    from pavdm_dist.engine.options import EngineOptions
    from pavdm_dist.engine.ray_engine import RayEngine
    from pavdm_dist.engine.rehearsal import rehearsal

    case, model = runner.case, runner.model
    stream = case.stream(model, "window", latents // case.plan.latent_chunk_size)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, torch.bfloat16)
        blocks, began = [(0, model.spec.num_blocks)], time.perf_counter()
        options = EngineOptions(1, gpus_per_stage=1, dtype="bfloat16")
        prepared = rehearsal(model, stream.plan, stream.latent_shape, stream.info)
        with RayEngine(folder, blocks, options, rehearsal=prepared) as engine:
            up = time.perf_counter()
            for _ in engine.run([stream]):
                pass
            return {"seconds": time.perf_counter() - up, "seconds_until_up": up - began}


def _has_ray() -> bool:
    from importlib.util import find_spec

    return find_spec("ray") is not None


def _word(compiled: bool) -> str:
    return "compiled" if compiled else "plain"


def text(report: dict[str, Any]) -> str:
    lines = [machine_line(report["machine"])]
    for part in PARTS:
        for name, found in report.get(part, {}).items():
            lines.append(f"{part:9} {name:28} " + "  ".join(_shown(found)))
    return "\n".join([*lines, *(f"{kind}: {what}" for kind in ("skipped", "failed") for what in report[kind])])


def _shown(found: dict[str, Any], prefix: str = "") -> list[str]:
    words = []
    for key, value in found.items():
        if isinstance(value, dict):
            words += _shown(value, f"{prefix}{key}.") if key not in ("kernels", "longest_kernels") else []
        elif value is not None:
            words.append(f"{prefix}{key} {value:.4g}" if isinstance(value, float) else f"{prefix}{key} {value}")
    return words


STARTED = time.perf_counter()

if __name__ == "__main__":
    main()
