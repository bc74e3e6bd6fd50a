"""One process against a straightforward loop on the same weights: CPU time per model call, and what saves it.

    python benchmarks/single_process.py [--quick] [--json] [--rounds N] [--text-tokens L]

Depth 8, width 384, latents 16 x 16, a full window of 35 latents (5 context + 30 noisy), guidance on. In every round
each variant does one row, which is two model calls, in turn; ratios are taken within a round and their medians
reported. A saving is measured by switching it alone on in the straightforward loop: the part of the call's time it
takes away, and its share of the whole difference; ``rest`` is what the four do not add up to (they interact, and it
holds the noise). Where the whole difference is not above zero in every round, no shares are given.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from common import endless_stream, machine, machine_line, parser, random_model, small_config
from straightforward import Savings, StraightforwardLoop
from torch import Tensor

from pavdm_dist.method.denoiser import ModelDenoiser
from pavdm_dist.method.sampler import guide
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.method.stream import Stream
from pavdm_dist.models.stdit3 import STDiT3, STDiT3Config

BRANCHES = 2
PLAN = WindowPlan(num_inference_steps=30, window_chunks=6, latent_chunk_size=5, context_chunks=1, start="clip")
SAVINGS = tuple(field.name for field in fields(Savings))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, help="rounds to take medians over (9; 5 with --quick)")
    options.add_argument("--text-tokens", type=int, default=16, help="length of the prompt and of the null text (16)")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    depth, hidden, heads = (2, 192, 6) if arguments.quick else (8, 384, 12)
    config = small_config(depth, hidden, heads, 128, arguments.text_tokens)
    report = measure(config, 16, arguments.rounds or (5 if arguments.quick else 9))
    print(json.dumps(report) if arguments.json else table(report))


def measure(config: STDiT3Config, cells: int, rounds: int) -> dict[str, Any]:
    """Times all variants for ``rounds`` rows after one row of warm-up, and compares where they arrived.

    Args:
        config: the model's shape.
        cells: height and width of the latents.
        rounds: rows that are timed; at least ``T / W - 1``, so that a chunk becomes clean.
    """
    if rounds < PLAN.steps_per_shift - 1:
        raise SystemExit(f"--rounds {rounds}: at least {PLAN.steps_per_shift - 1}, or no chunk becomes clean")
    model = random_model(config)
    stream = endless_stream(model, PLAN, cells, cells)
    loops = {"straightforward": StraightforwardLoop(model, stream)}
    loops |= {name: StraightforwardLoop(model, stream, Savings(**{name: True})) for name in SAVINGS}
    loops["all_four"] = StraightforwardLoop(model, stream, Savings(True, True, True, True))
    package = _Package(model, stream)
    steps: dict[str, Callable[[], Tensor | None]] = {name: loop.step for name, loop in loops.items()}
    steps["package"] = package.step
    clean: dict[str, list[Tensor]] = {name: [] for name in steps}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(1 + rounds):
        for name in _rotated(list(steps), turn):
            before = time.process_time()
            chunk = steps[name]()
            if turn:
                times[name].append((time.process_time() - before) / BRANCHES)
            if chunk is not None:
                clean[name].append(chunk)
    goal = clean["package"]
    differences = {name: max(_difference(a, b) for a, b in zip(clean[name], goal, strict=True)) for name in loops}
    in_flight = {name: _difference(loop.window[0], package.window()) for name, loop in loops.items()}
    plain, fast = times["straightforward"], times["package"]

    saved = {name: _saved(plain, times[name]) for name in SAVINGS} | {"together": _saved(plain, fast)}
    together = saved["together"]
    shares: dict[str, float] | None = None
    if together["lowest"] > 0:
        shares = {name: saved[name]["median"] / together["median"] for name in SAVINGS}
        shares["rest"] = 1 - sum(shares.values())
    ratios = [p / f for p, f in zip(plain, fast, strict=True)]
    return {
        "machine": machine(),
        "shape": {
            "depth": config.depth,
            "half_blocks": model.spec.num_blocks,
            "hidden_size": config.hidden_size,
            "num_heads": config.num_heads,
            "latents": list(stream.latent_shape),
            "window_latents": (PLAN.window_chunks + PLAN.context_chunks) * PLAN.latent_chunk_size,
            "text_tokens": config.model_max_length,
            "guidance": True,
        },
        "rounds": rounds,
        "cpu_s_per_call": {name: statistics.median(values) for name, values in times.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "saved_part_of_call": saved,
        "share_of_saving": shares,
        "ratio_all_four_to_package": statistics.median(a / f for a, f in zip(times["all_four"], fast, strict=True)),
        "clean_chunks": len(goal),
        "relative_difference": {name: max(differences[name], in_flight[name]) for name in loops},
        "same_latents": all(max(differences[name], in_flight[name]) <= 1e-4 for name in loops),
    }


class _Package:
    """The package's sampler loop, one row at a time."""

    def __init__(self, model: STDiT3, stream: Stream) -> None:
        self._window, self._plan, self._scale = stream.window(), stream.plan, stream.guidance_scale
        self._denoise = ModelDenoiser(model, stream)

    def step(self) -> Tensor | None:
        row = self._plan.row(self._window.row)
        x, levels = self._window.inputs(row)
        velocity = guide([self._denoise(x, levels, row, branch) for branch in range(BRANCHES)], self._scale)
        clean = self._window.update(row, velocity)
        return clean[0].latents if clean else None

    def window(self) -> Tensor:
        """What the model would see at the next row, ``[C, F, h, w]``."""
        return self._window.inputs(self._plan.row(self._window.row))[0][0]


def _saved(plain: list[float], other: list[float]) -> dict[str, float]:
    """What part of the straightforward call's time a variant saves: median and range over the rounds."""
    parts = [1 - o / p for p, o in zip(plain, other, strict=True)]
    return {"median": statistics.median(parts), "lowest": min(parts), "highest": max(parts)}


def _rotated(names: list[str], by: int) -> list[str]:
    """Another order every round, so that no variant always runs behind the same one."""
    return names[by % len(names) :] + names[: by % len(names)]


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def table(report: dict[str, Any]) -> str:
    lines = [machine_line(report["machine"]), str(report["shape"]), ""]
    lines += ["| variant | CPU s per model call | saved, part of the straightforward call | share of the saving |"]
    lines += ["|---|---|---|---|"]
    saved = report["saved_part_of_call"] | {"package": report["saved_part_of_call"]["together"]}
    shares = report["share_of_saving"] or {}
    for name, seconds in report["cpu_s_per_call"].items():
        part, share = saved.get(name), shares.get(name)
        span = "" if part is None else f"{part['median']:.1%} ({part['lowest']:.1%} to {part['highest']:.1%})"
        lines.append(f"| {name} | {seconds:.4f} | {span} | {'' if share is None else f'{share:.0%}'} |")
    if not shares:
        lines += ["", "No shares: the whole difference was not above zero in every round, so they would be noise."]
    else:
        lines.append(f"| rest | | | {shares['rest']:.0%} |")
    low, high = report["ratio_range"]
    lines += [
        "",
        f"ratio {report['ratio']:.3f} ({low:.3f} to {high:.3f} over {report['rounds']} rounds); "
        f"all four switched on in the loop over the package: {report['ratio_all_four_to_package']:.3f}",
        f"largest relative difference of the latents {max(report['relative_difference'].values()):.1e}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
