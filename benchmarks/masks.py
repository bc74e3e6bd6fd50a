"""Loss of models under the full and the chunk-causal mask, on windows of held-out clips.

    python benchmarks/masks.py MODEL [MODEL ...] [--quick] [--json]

Every model sees the same clips, windows, levels and noise (embedded codec and world; EMA weights as exported). For
docs/training.md: a bidirectional model, and the same after `pavdm train configs/train/causal.yaml`.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from common import machine, machine_line, parser

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.text import WordTextEncoder
from pavdm_dist.digits.batches import INFO
from pavdm_dist.digits.world import render, sample_scene, scene_prompt
from pavdm_dist.train.loss import noised, velocity_loss
from pavdm_dist.train.model import Text, TextToVideo
from pavdm_dist.train.objective import Objective, draw_levels, draw_window

LATENTS = 40
FRAMES = 4 * (LATENTS - 1) + 1


def main() -> None:
    options = parser(__doc__)
    options.add_argument("models", nargs="*", default=["embedded"], help="model folders (the embedded one)")
    options.add_argument("--clips", type=int, help="held-out clips (32; 4 with --quick)")
    options.add_argument("--windows", type=int, help="windows per clip (8; 2 with --quick)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    clips, windows = args.clips or (4 if args.quick else 32), args.windows or (2 if args.quick else 8)
    result: dict[str, Any] = {"machine": machine(), "clips": clips, "windows_per_clip": windows}
    result["models"] = {name: losses(name, clips, windows) for name in args.models}
    if args.json:
        print(json.dumps(result))
        return
    print(machine_line(result["machine"]))
    print(f"{'full':>8} {'causal':>8}  model ({clips * windows} windows)")
    for name, found in result["models"].items():
        print(f"{found['full']:8.4f} {found['causal']:8.4f}  {name}")


@torch.no_grad()
def losses(name: str, clips: int, windows: int) -> dict[str, float]:
    """Mean loss under both masks."""
    opened, objective = Checkpoint.open(name), Objective(shift_scale=0.4, prompt_dropout=0.0)
    encoder = opened.text_encoder
    if not isinstance(encoder, WordTextEncoder):
        raise SystemExit(f"{name}: its text encoder is a pretrained one; give models that were trained on the digits")
    model = TextToVideo(opened.backbone, encoder).eval()
    found: dict[str, list[float]] = {"full": [], "causal": []}
    chunk = objective.latent_chunk_size
    for number in range(clips):
        scene = sample_scene(np.random.default_rng((31, number)), "heldout")
        latents = opened.codec.encode(torch.from_numpy(render(scene, 0, FRAMES)))[None]
        rng, generator = np.random.default_rng((32, number)), torch.Generator().manual_seed(number)
        for _ in range(windows):
            window = draw_window(rng, objective, LATENTS // chunk)
            levels = draw_levels(window, objective, 1, generator)
            first, context = window.offset * chunk, len(window.row.context) * chunk
            clean = latents[:, :, first : first + levels.shape[1]]
            x, target = noised(clean, levels, context, 0.0, generator)
            text = Text([scene_prompt(scene)])
            for mask, size in (("full", None), ("causal", chunk)):
                velocity = model(x, levels, text, [False], INFO, size)
                found[mask].append(velocity_loss(velocity, target, levels, context)[0].item())
    return {mask: float(np.mean(values)) for mask, values in found.items()}


if __name__ == "__main__":
    main()
