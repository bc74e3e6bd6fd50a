"""Models that are broken, far away or large, and what callers say of them."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from cases import PROMPT, environment, model, pavdm, python, sentence, went_well

# The command line in a process that has a cluster, whose own processes live in another folder.
ELSEWHERE = """
import os, sys, ray
folder = os.getcwd()
os.chdir("/")
ray.init(address="local", num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False,
         logging_level="ERROR")
os.chdir(folder)
from pavdm_dist.cli import main
status = main(sys.argv[1:])
ray.shutdown()
sys.exit(status)
"""
# A driver whose package lies where no other machine has one: the model's folder is gone once stages are placed.
FAR = """
import importlib, shutil
from pathlib import Path
import ray
import pavdm_dist
from pavdm_dist import PAVDMPipeline, checkpoint
from pavdm_dist.errors import PAVDMError
groups = importlib.import_module("ray.util.placement_group")
mine = Path("mine/embedded").absolute()
shutil.copytree(Path(pavdm_dist.__file__).parent / "embedded", mine)
checkpoint.EMBEDDED = mine
pipeline = PAVDMPipeline.from_pretrained("embedded", num_stages=1)
pipeline.checkpoint.text_encoder, pipeline.checkpoint.null_text
ray.init(address="local", num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False,
         logging_level="ERROR")
real = groups.placement_group
def placed(*arguments, **more):
    mine.rename("hidden")
    return real(*arguments, **more)
groups.placement_group = placed
try:
    print(len(pipeline("a red three", num_frames=5, num_inference_steps=6).frames[0]), "frames", mine.exists())
except PAVDMError as error:
    print(error, ray.util.get_node_ip_address())
"""


def weights_that_are_no_numbers_make_no_video(folder: Path) -> None:
    """C1: of the transformer or of the codec: a sentence, no sidecar, nothing that looks finished."""
    words = ["sample", PROMPT, model(folder), "num_frames=9"]
    good = folder / "model"
    for part in ("transformer", "vae"):
        bad = folder / f"bad-{part}"
        shutil.copytree(good, bad)
        (file,) = (bad / part).glob("*.safetensors")
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if part == "transformer" or name.startswith("decoder."):
                tensor.view(-1)[0] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
        said = sentence(pavdm(folder, *words, f"model={bad}", f"output={part}.mp4"), 101)
        assert re.search(r"not finite|no numbers?|NaN|non-finite", said), said
        assert not list(folder.glob(f"{part}.json")) and not (folder / f"{part}.mp4").exists()


def a_relative_model_is_the_same_for_stages(folder: Path) -> None:
    """C3: also on a cluster whose processes were started in another folder."""
    model(folder)
    words = ["model=model", "num_stages=1", "num_frames=9", "output=video.mp4"]
    went_well(python(folder, ELSEWHERE, "sample", PROMPT, *words))
    assert (folder / "video.json").exists()


def the_models_name_is_sent_and_not_the_drivers_folder(folder: Path) -> None:
    """C4: a node finds what it has under that name, or is named itself."""
    ended = python(folder, FAR)
    went_well(ended)
    said = ended.stdout.strip().splitlines()[-1]
    named = said.split()[-1] in said.rpartition(" ")[0] or socket.gethostname() in said
    assert said == "5 frames False" or named, said


MISTYPED = """
from pavdm_dist import PAVDMPipeline
from pavdm_dist.errors import PAVDMError
for model in ("embedded", "somebody/something"):
    try:
        PAVDMPipeline.from_pretrained(model, revison="main")
    except PAVDMError as error:
        print(error)
"""


def a_mistyped_argument_is_named(folder: Path) -> None:
    """C7: for folders and for hub ids, by an error of the package's own."""
    ended = python(folder, MISTYPED)
    went_well(ended)
    said = ended.stdout.splitlines()
    assert len(said) == 2 and all("revison" in line and "revision" in line for line in said), said


READ = """
import sys
from pavdm_dist.cli import main
status = main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/io") if line.startswith("rchar")))
sys.exit(status)
"""


def a_large_checkpoint_is_not_read_for_every_video(folder: Path) -> None:
    """C8: a second short task reads no more of it than it uses, or says what takes so long."""
    size, tiny = 2 * 10**9, model(folder)
    with open(folder / "model/unused.safetensors", "wb") as file:
        file.truncate(size)  # takes no room
    words = ["sample", PROMPT, tiny, "num_frames=9", "output=video.mp4", "--overwrite"]
    given = environment(XDG_CACHE_HOME=str(folder / "cache"))
    ended = [python(folder, READ, *words, env=given) for _ in range(2)]
    said = [went_well(one) for one in ended]
    read = int(ended[1].stdout.split()[-1])
    assert read < size / 2 or re.search("(?i)checksum|sha-?256|weights", said[1]), (read, said)


ONE_GENERATOR = """
import json, sys, torch
from pavdm_dist import PAVDMPipeline
pipeline = PAVDMPipeline.from_pretrained(sys.argv[1])
def made(generator):
    return pipeline("a red three", num_frames=5, generator=generator).frames[0]
one = torch.Generator().manual_seed(7)
first, second = made(one), made(one)
again = made(torch.Generator().manual_seed(7))
print(bool((first == second).all()), bool((first == again).all()))
"""


def one_generator_gives_another_video_every_time(folder: Path) -> None:
    """D4: as with the library its name comes from; a fresh one gives the same again."""
    ended = python(folder, ONE_GENERATOR, str(Path(model(folder).partition("=")[2])))
    went_well(ended)
    assert ended.stdout.split() == ["False", "True"], ended.stdout


def blank_negative_prompts_are_none(folder: Path) -> None:
    """D3: what every form sends that nothing was written into changes nothing."""
    made: dict[str, Any] = {}
    for number, more in enumerate(([], ["negative_prompt="], ["negative_prompt= "])):
        words = [model(folder / str(number)), "num_frames=9", "seed=1", f"output={number}.mp4", "--json"]
        ended = pavdm(folder, "sample", PROMPT, *words, *more)
        went_well(ended)
        made["".join(more)] = json.loads(ended.stdout)["videos"][0]["latents_sha256"]
    assert len(set(made.values())) == 1, made
