"""The recipes under cluster/: checked as far as a machine without Kubernetes and containers can."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kuberay
import pytest
import yaml

from pavdm_dist import __version__
from pavdm_dist.commands.words import run_config
from pavdm_dist.config import SampleConfig
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.values.merging import load_config

ROOT = Path(__file__).parent.parent
KUBERAY = ROOT / "cluster" / "kuberay"
MANIFEST = KUBERAY / "rayjob.yaml"


def manifest(path: Path = MANIFEST) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, package
    return found[1]


MANIFESTS = sorted(KUBERAY.glob("*.yaml"))


def groups() -> list[dict[str, Any]]:
    """Groups of pods of all manifests."""
    return [group for path in MANIFESTS for group in kuberay.groups_of(manifest(path))]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_the_manifests_are_valid(path: Path) -> None:
    assert kuberay.problems(manifest(path)) == []


def _cluster(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["rayClusterSpec"]


def _rename(mapping: dict[str, Any], old: str, new: str) -> None:
    mapping[new] = mapping.pop(old)


def _worker(job: dict[str, Any]) -> dict[str, Any]:
    return _cluster(job)["workerGroupSpecs"][0]["template"]["spec"]


def _container(job: dict[str, Any]) -> dict[str, Any]:
    return _worker(job)["containers"][0]


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda job: _cluster(job)["workerGroupSpecs"][0].pop("template"), "'template' is a required property"),
        (lambda job: _rename(_cluster(job)["workerGroupSpecs"][0], "replicas", "replica"), "'replica' was unexpected"),
        (lambda job: _cluster(job).pop("headGroupSpec"), "'headGroupSpec' is a required property"),
        (lambda job: job.update(apiVersion="ray.io/v1alpha1"), "ray.io/v1"),
        (lambda job: job["spec"].update(backoffLimits=3), "'backoffLimits' was unexpected"),
        (lambda job: job["spec"].update(ttlSecondsAfterFinished="600"), "ttlSecondsAfterFinished"),
        (lambda job: _cluster(job)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "num-cpus"),
        (lambda job: _rename(_container(job), "image", "imagee"), "imagee"),
        (lambda job: _container(job)["resources"].update(limit={}), "limit"),
        (lambda job: _container(job).pop("name"), "name"),
        (lambda job: _container(job)["volumeMounts"][0].update(name="outputs"), "no volume 'outputs'"),
        (lambda job: _worker(job).pop("restartPolicy"), "needs restartPolicy: Never"),
        (lambda job: _cluster(job)["workerGroupSpecs"][0].update(replicas=9), "replicas=9 is not within"),
    ],
)
def test_a_spoilt_rayjob_is_refused(spoil: Callable[[dict[str, Any]], Any], named: str) -> None:
    job = copy.deepcopy(manifest())
    spoil(job)
    found = kuberay.problems(job)
    assert any(named in problem for problem in found), found


def test_ray_is_one_version_everywhere() -> None:
    """Head, workers, the submitter and the tested set: Ray refuses to mix versions."""
    ray = pinned("ray")
    assert {kuberay.cluster_of(manifest(path))["rayVersion"] for path in MANIFESTS} == {ray}
    bases = re.findall(r"rayproject/ray:(\d+\.\d+\.\d+)", (ROOT / "cluster" / "Dockerfile").read_text())
    assert set(bases) == {ray}


def test_torch_is_the_tested_one_everywhere() -> None:
    for path in ("Makefile", "cluster/Dockerfile"):
        assert set(re.findall(r"torch==(\S+)", (ROOT / path).read_text())) == {pinned("torch")}, path


def test_the_manifests_run_images_that_the_dockerfile_builds() -> None:
    containers = [group["template"]["spec"]["containers"][0] for group in groups()]
    built = set(re.findall(r"-t (\S+)", (ROOT / "cluster" / "Dockerfile").read_text()))
    assert (
        {one["image"] for one in containers} == built == {f"pavdm-dist:{__version__}", f"pavdm-dist:{__version__}-gpu"}
    )


def test_the_rayjob_entrypoint_is_a_command_that_fits_its_cluster() -> None:
    program, verb, *words = shlex.split(manifest()["spec"]["entrypoint"])
    assert (program, verb) == ("pavdm", "sample")
    config = run_config(SampleConfig, [word for word in words if not word.startswith("--")], needs_prompt=True)
    cpu = manifest()["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    per_pod = int(cpu["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
    assert 0 < config.num_stages * config.cpus_per_stage <= per_pod * cpu["maxReplicas"]
    # Nothing is there when it begins.
    assert config.placement_timeout_s >= 600


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_cluster_grows_from_zero_and_asks_for_its_token(path: Path) -> None:
    cluster = kuberay.cluster_of(manifest(path))
    assert cluster["authOptions"] == {"mode": "token"} and cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
    gpus = [
        group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        for group in cluster["workerGroupSpecs"]
    ]
    assert gpus == [None, 1]
    # Nothing but the driver is to run on the head, or the autoscaler would think that there is room.
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def in_bytes(quantity: str) -> int:
    """Of Kubernetes' words for memory."""
    assert quantity.endswith("Gi"), quantity
    return int(quantity.removesuffix("Gi")) << 30


def test_every_pod_has_shared_memory_and_the_output() -> None:
    for group in groups():
        spec = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert "persistentVolumeClaim" in volumes[mounts["/output"]]
        # By itself Ray takes 30 % of the pod's memory for its store, and the disk where /dev/shm has less.
        store = int(group["rayStartParams"]["object-store-memory"])
        assert 0 < 2 * store <= in_bytes(volumes[mounts["/dev/shm"]]["emptyDir"]["sizeLimit"])
        memory = spec["containers"][0]["resources"]["limits"]["memory"]
        assert 4 * in_bytes(volumes[mounts["/dev/shm"]]["emptyDir"]["sizeLimit"]) <= in_bytes(memory)


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """An interpreter stand-in that writes down its arguments and whether a token is to be sent."""
    script = tmp_path / "python-stand-in"
    script.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([os.environ.get('RAY_AUTH_MODE'), *sys.argv[1:]]))\n"
    )
    script.chmod(0o755)
    return script


def submit(
    recorder: Path, *words: str, script: Path = ROOT / "cluster" / "ray_job" / "submit.sh", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", script, *words],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(recorder), **environment},
    )


def test_submit_sends_the_working_tree_and_names_the_interpreter(recorder: Path, tmp_path: Path) -> None:
    output = tmp_path / "a b.mp4"
    done = submit(recorder, "seed=7", OUTPUT=str(output), RAY_API_SERVER_ADDRESS="http://head:8265")
    assert done.returncode == 0, done.stderr
    token, *words = json.loads(done.stdout)
    assert token is None
    split = words.index("--")
    options, entrypoint = words[:split], words[split + 1 :]
    assert options[options.index("--address") + 1] == "http://head:8265"
    assert options[options.index("--working-dir") + 1] == str(ROOT)
    assert json.loads(options[options.index("--runtime-env-json") + 1])["env_vars"] == {"OMP_NUM_THREADS": "1"}
    assert entrypoint[:4] == [str(recorder), "-m", "pavdm_dist", "sample"]
    config = run_config(SampleConfig, [word for word in entrypoint[4:] if not word.startswith("--")], needs_prompt=True)
    assert (config.output, config.seed, config.num_stages) == (str(output), 7, 2)


def parsed(command: Any, words: list[str]) -> dict[str, Any]:
    """What one of Ray's own commands makes of its words; words that it does not know are refused."""
    return command.make_context(command.name, list(words)).params


def test_submit_is_a_command_that_rays_own_parser_takes(recorder: Path) -> None:
    from ray.dashboard.modules.job.cli import submit as ray_job_submit

    done = submit(recorder, "sample", "a red three", "output=s3://bucket/a.mp4", SUBMISSION_ID="three-1")
    _, *words = json.loads(done.stdout)
    assert words[:4] == ["-m", "ray.scripts.scripts", "job", "submit"]
    params = parsed(ray_job_submit, words[4:])
    assert params["working_dir"] == str(ROOT) and params["submission_id"] == "three-1" and not params["no_wait"]
    # Ray gives the words to a shell, quoted.
    assert params["entrypoint"][1:] == ("-m", "pavdm_dist", "sample", "a red three", "output=s3://bucket/a.mp4")


@pytest.mark.parametrize("word", ["output=here.mp4", "run_dir=runs/a", "output=", "trace=run.json", "--resume=parts"])
def test_submit_refuses_what_would_vanish_with_the_job(recorder: Path, word: str) -> None:
    done = submit(recorder, "sample", "a red three", word)
    assert done.returncode == 2 and f"submit.sh: {word} must be absolute" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sample", "a red three", "num_stages=2"], "sample needs output=PATH on the command line, absolute or in a"),
        (["sample"], "sample needs output=PATH"),
        (["sample", "configs/sample/demo.yaml", "output=null"], "sample needs output=PATH"),
        (["sample", "configs/sample/demo.yaml", "run_dir=/s/a"], "sample needs output=PATH"),
        (["train", "configs/train/embedded.yaml", "max_seconds=5", "export=/s/m"], "train needs run_dir=PATH"),
        (["data", "prepare", "/s/videos", "buckets=[240x424x35@24]"], "data needs output=PATH"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_submit_refuses_defaults_that_would_vanish_with_the_job(recorder: Path, words: list[str], said: str) -> None:
    done = submit(recorder, *words)
    assert done.returncode == 2 and done.stderr.startswith(f"submit.sh: {said}"), done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["farm", "run", "/s/m.jsonl", "--out", "renders"], "--out renders must be absolute"),
        (["farm", "run", "/s/m.jsonl", "--out=renders", "num_stages=2"], "--out=renders must be absolute"),
        (["farm", "run", "shots.CSV", "--out", "/s/renders"], "shots.CSV must be absolute, and lie where"),
        (["farm", "retry", "renders", "shot-1"], "renders must be absolute: a job's"),
        (["farm", "retry", "--openjd", "renders"], "renders must be absolute: a job's"),
        (["serve", "--out", "videos"], "--out videos must be absolute"),
        (["export", "vbench", "--out", "/s/vbench", "renders"], "renders must be absolute: a job's"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_submit_refuses_folders_and_manifests_that_the_job_would_not_find(
    recorder: Path, words: list[str], said: str
) -> None:
    done = submit(recorder, *words)
    assert done.returncode == 2 and done.stderr.startswith(f"submit.sh: {said}"), done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["farm", "run", "s3://b/m.jsonl", "configs/a.yaml", "--out", "s3://b/renders", "text_cache=a.txt"],
        ["farm", "retry", "/s/renders", "shot-1.txt", "num_stages=2"],
        ["farm", "status", "--json", "/s/renders"],
        ["export", "vbench", "--out", "/s/vbench", "/s/renders", "--custom"],
        ["sample", "a list of words.txt", "output=/s/a.mp4"],
        ["sample", "prompt=output=three", "output=/s/a.mp4"],
        ["sample", "--resume", "/s/a.mp4.parts", "num_stages=2"],
        ["sample", "--resume=s3://b/renders"],
        ["sample", "configs/sample/demo.yaml", "--dry-run"],
        ["train", "configs/train/embedded.yaml", "run_dir=/s/runs/a", "export=null"],
        ["train", "--help"],
        ["data", "prepare", "/s/videos", "output=/s/prepared"],
        ["plan", "seconds=60", "cluster.devices=8"],
        ["eval", "/s/renders"],
        ["info"],
    ],
    ids=" ".join,
)
def test_submit_hands_on_what_the_job_will_find(recorder: Path, words: list[str]) -> None:
    done = submit(recorder, *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[-len(words) :] == words


def test_submit_sends_code_and_nothing_that_lies_beside_it(recorder: Path, tmp_path: Path) -> None:
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
    from ray._private.runtime_env.packaging import create_package

    checkout = tmp_path / "checkout"
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("pavdm_dist", "configs", "cluster"):
        shutil.copytree(ROOT / name, checkout / name, ignore=skip)
    for name in ("prepared/bucket-0-00000.safetensors", "holiday.mp4", ".venv/bin/python", "tests/x.py", "x"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("")
    done = submit(recorder, script=checkout / "cluster" / "ray_job" / "submit.sh", OUTPUT=str(tmp_path / "a.mp4"))
    options = json.loads(done.stdout)
    about = json.loads(options[options.index("--runtime-env-json") + 1])
    folder, package = options[options.index("--working-dir") + 1], tmp_path / "sent.zip"
    create_package(folder, package, include_gitignore=True, excludes=about["excludes"])
    sent = {info.filename for info in zipfile.ZipFile(package).infolist() if not info.is_dir()}
    assert {"pavdm_dist/cli.py", "pavdm_dist/embedded/model_index.json", "configs/train/embedded.yaml"} <= sent
    assert {name.partition("/")[0] for name in sent} <= {"pavdm_dist", "configs", "x"}
    # What Ray would refuse after minutes of packing, and what it is: of zeros, too, as it compresses nothing.
    film = checkout / "pavdm_dist" / "holiday.mp4"
    film.write_bytes(bytes(2 << 20))
    code, package = package.stat().st_size, tmp_path / "film.zip"
    create_package(folder, package, include_gitignore=True, excludes=about["excludes"])
    assert package.stat().st_size > code + film.stat().st_size
    assert DASHBOARD_CLIENT_MAX_SIZE == 100 << 20
    with open(film, "r+b") as file:
        file.truncate((98 << 20) - code)
    done = submit(recorder, script=checkout / "cluster" / "ray_job" / "submit.sh", OUTPUT=str(tmp_path / "a.mp4"))
    assert done.returncode == 0, done.stderr
    with open(film, "r+b") as file:
        file.truncate(100 << 20)
    done = submit(recorder, script=checkout / "cluster" / "ray_job" / "submit.sh", OUTPUT=str(tmp_path / "a.mp4"))
    assert (
        done.returncode == 2
        and "submit.sh: pavdm_dist configs in " in done.stderr
        and "Ray takes 100" in done.stderr
        and "the largest is pavdm_dist/holiday.mp4" in done.stderr
    )


def test_no_recipe_throws_away_what_was_rendered() -> None:
    """A retry, or the same command again, goes on with what an earlier one left."""
    recipes = [path for path in (ROOT / "cluster").rglob("*") if path.is_file() and path.suffix != ".md"]
    assert len(recipes) > 9
    for recipe in recipes:
        commands = [line for line in recipe.read_text().splitlines() if not line.strip().startswith("#")]
        assert "--overwrite" not in "\n".join(commands), recipe


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({"RAY_AUTH_TOKEN": "x"}, "token"),
        ({"RAY_AUTH_TOKEN": "x", "RAY_AUTH_MODE": "disabled"}, "disabled"),
        ({"HOME": "home"}, "token"),
    ],
)
def test_submit_sends_a_token_that_is_there(
    recorder: Path, tmp_path: Path, environment: dict[str, str], mode: str
) -> None:
    token = tmp_path / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("x")
    if "HOME" in environment:
        environment = {"HOME": str(tmp_path / "home")}
    done = submit(recorder, OUTPUT="/tmp/a.mp4", **environment)
    assert json.loads(done.stdout)[0] == mode


def test_submit_refuses_an_output_that_would_vanish(recorder: Path) -> None:
    done = submit(recorder, OUTPUT="demo.mp4")
    assert done.returncode == 2
    assert "OUTPUT=demo.mp4 must be absolute" in done.stderr
    done = submit(recorder, OUTPUT="s3://bucket/demo.mp4")
    assert done.returncode == 0 and "output=s3://bucket/demo.mp4" in json.loads(done.stdout), done.stderr


def test_slurm_starts_one_torchrun_per_node_with_a_command_that_reads(tmp_path: Path) -> None:
    for name, answer in (
        ("scontrol", "echo node07; echo node08"),
        ("srun", 'printf "%s\\n" "$SRUN_CPUS_PER_TASK" "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "cluster" / "slurm" / "train.sbatch", "configs/train/embedded.yaml", "run_dir=/shared/a b"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SLURM_JOB_NODELIST": "node[07-08]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_ID": "77",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "64",
        },
    )
    cores, *words = done.stdout.splitlines()
    assert cores == "64"
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-id=77", "--rdzv-endpoint=node07:29500"} <= set(words)
    verb = words.index("train")
    assert words[verb - 2 : verb] == ["-m", "pavdm_dist"]
    config = load_config(TrainConfig, ROOT / words[verb + 1], words[verb + 2 :])
    assert config.run_dir == "/shared/a b"
