"""Commands that end while a renderer still comes up: its thread reads weights, and is not waited for."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from farms import write_manifest
from helpers import tiny_checkpoint
from needs import needs

from pavdm_dist.serve.tokens import TOKEN

needs("needs pavdm-dist[serve]", "fastapi", "multipart", "prometheus_client", "uvicorn", "websockets")

# A large model: its weights take minutes to read, in torch's own code as those of a tiny one do.
SLOW = """
import sys, torch
from pavdm_dist.cli import main
from pavdm_dist.pipeline import PAVDMPipeline

def enter(_):
    while True:
        a = torch.randn(800, 800)
        (a @ a).to(torch.bfloat16)

PAVDMPipeline.__enter__ = enter
sys.exit(main())
"""


@pytest.mark.parametrize("verb", ["farm", "serve"])
def test_a_signal_while_a_renderer_comes_up_ends_in_order_and_at_once(verb: str, tmp_path: Path) -> None:
    """In an interpreter of its own: how that ends is what is looked at."""
    manifest = write_manifest(tmp_path / "shots.jsonl", [{"id": "a", "prompt": "a red three", "num_frames": 13}])
    verbs = {"farm": ["farm", "run", str(manifest)], "serve": ["serve", "http.port=0"]}
    out = tmp_path / "out"
    words = [*verbs[verb], f"model={tiny_checkpoint(tmp_path / 'model')}", "guidance_scale=1", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != TOKEN}
    with (tmp_path / "said").open("w+") as said:
        program = [sys.executable, "-c", SLOW, *words]
        started = subprocess.Popen(program, stdout=said, stderr=subprocess.STDOUT, env=environment)
        try:
            end = time.monotonic() + 120
            while not re.search("coming up", (tmp_path / "said").read_text()):
                assert started.poll() is None and time.monotonic() < end, (tmp_path / "said").read_text()
                time.sleep(0.02)
            time.sleep(0.3)  # in the middle of it
            started.send_signal(signal.SIGTERM)
            status = started.wait(30)
        finally:
            started.kill()
            started.wait()
    text = (tmp_path / "said").read_text()
    expected, words = {"farm": (143, "1 shots are left"), "serve": (0, "what is under way is saved")}[verb]
    assert status == expected and "Traceback" not in text and "terminate" not in text, (status, text)
    # What is printed last has come through.
    assert words in text, text
