"""Recipes for Slurm, ``ray up`` and render farms, checked without any of these: by the schemas and parsers of those who
read them, and by running what is a script."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jsonschema
import pytest
import yaml
from farms import write_manifest
from helpers import tiny_checkpoint

from pavdm_dist.commands.words import run_config
from pavdm_dist.config import SampleConfig

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"


def stand_in(path: Path, script: str) -> Path:
    """A program of this name that does what the script says."""
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path


def sample_config(words: list[str]) -> SampleConfig:
    """The settings that a command of a recipe makes: words behind ``sample``."""
    return run_config(SampleConfig, words, needs_prompt=True)


# --- Slurm ---------------------------------------------------------------------------------------------------------


def slurm(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs ``ray.sbatch`` with Slurm's programs stood in for: ``srun`` says what it was called with, its token and its
    cores."""
    stand_in(tmp_path / "scontrol", "echo node07; echo node08")
    stand_in(
        tmp_path / "srun",
        'if [[ "$*" == *hostname* ]]; then echo "fe80::1 10.1.2.7 10.9.9.9 "; else'
        ' printf "%s\\n" "$RAY_AUTH_MODE" "${#RAY_AUTH_TOKEN}" "$SRUN_CPUS_PER_TASK" "$@"; fi',
    )
    stand_in(tmp_path / "python", "exit 9")
    return subprocess.run(
        ["bash", CLUSTER / "slurm" / "ray.sbatch", *words],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SLURM_JOB_NODELIST": "node[07-08]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "64",
            "SLURM_GPUS_ON_NODE": "8",
        },
    )


def test_slurm_starts_a_ray_cluster_over_the_nodes_with_a_command_that_reads(tmp_path: Path) -> None:
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import symmetric_run

    done = slurm(tmp_path, "sample", "a red three", "num_stages=16", "output=/shared/a b.mp4")
    mode, token, cores, *words = done.stdout.splitlines()
    assert (mode, token, cores) == ("token", "64", "64")
    ray = words.index("symmetric-run")
    assert words[ray - 3 : ray] == ["python", "-m", "ray.scripts.scripts"]
    options, entrypoint = words[ray + 1 : words.index("--")], words[words.index("--") + 1 :]
    params = symmetric_run.make_context("symmetric-run", list(options)).params
    # The first node's first IPv4 address: names may mean the loopback there.
    assert (params["address"], params["min_nodes"]) == ("10.1.2.7:6379", 2)
    # What it does not know itself goes to `ray start`, which must know it.
    started = start.make_context("start", ["--head", *params["ray_args_and_entrypoint"]]).params
    assert (started["num_cpus"], started["num_gpus"], started["disable_usage_stats"]) == (64, 8, True)
    assert entrypoint[:2] == ["bash", "-c"]
    del entrypoint[:4]  # a shell that says its number, and becomes what follows
    assert entrypoint[:5] == ["env", "RAY_ADDRESS=auto", "python", "-m", "pavdm_dist"]
    config = sample_config(entrypoint[6:])
    assert (entrypoint[5], config.prompt, config.num_stages, config.output) == (
        "sample", "a red three", 16, "/shared/a b.mp4",
    )  # fmt: skip


@pytest.mark.parametrize(("early", "status"), [(False, 3), (True, 143)], ids=["running", "starting"])
def test_slurms_warning_reaches_the_command(early: bool, status: int, tmp_path: Path) -> None:
    """It goes to the batch script alone; what Ray puts between that and the command knows no signals. Where the command
    is not there yet, the step ends."""
    stand_in(tmp_path / "scontrol", "echo node07")
    runs = 'while [[ "$1" != -- ]]; do shift; done; shift; "$@"; exit $?'
    waits = f"trap 'kill %1; exit 143' TERM; sleep 60 & touch '{tmp_path}/up'; wait"
    stand_in(
        tmp_path / "srun", f'if [[ "$*" == *hostname* ]]; then echo 10.1.2.7; exit; fi; {waits if early else runs}'
    )
    saves = f"trap 'sleep 0.5; touch \"{tmp_path}/saved\"; exit 3' TERM; touch '{tmp_path}/up'"
    stand_in(tmp_path / "python", f"{saves}; while :; do sleep 0.1; done")
    batch = subprocess.Popen(
        ["bash", CLUSTER / "slurm" / "ray.sbatch", "sample", "a red three"],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "TMPDIR": str(tmp_path),
            "SLURM_JOB_NODELIST": "node07",
            "SLURM_JOB_NUM_NODES": "1",
        },
    )
    try:
        end = time.monotonic() + 20
        while not (tmp_path / "up").exists():
            assert time.monotonic() < end and batch.poll() is None
            time.sleep(0.05)
        batch.send_signal(signal.SIGTERM)
        assert batch.wait(timeout=20) == status
    finally:
        batch.kill()
    assert (tmp_path / "saved").exists() is not early
    assert not list(tmp_path.glob("tmp.*"))


def test_slurm_gives_every_script_one_task_a_node_and_a_warning_before_the_end() -> None:
    for script in (CLUSTER / "slurm").iterdir():
        options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script.read_text(), re.MULTILINE))
        assert options["ntasks-per-node"] == "1" and re.fullmatch(r"(B:)?TERM@\d+", options["signal"]), script


# --- ray up --------------------------------------------------------------------------------------------------------


def ray_up_files() -> list[Path]:
    return sorted((CLUSTER / "ray_up").glob("*.yaml"))


@pytest.mark.parametrize("path", ray_up_files(), ids=lambda path: path.stem)
def test_ray_up_takes_the_clusters(path: Path) -> None:
    import ray

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load(path.read_text())
    jsonschema.Draft7Validator(schema).validate(cluster)
    if "available_node_types" in cluster:
        assert cluster["head_node_type"] in cluster["available_node_types"]
        workers = {name: one for name, one in cluster["available_node_types"].items() if name != "head"}
        assert all(one["min_workers"] == 0 for one in workers.values())
        assert sum(one["max_workers"] for one in workers.values()) == cluster["max_workers"]
    with pytest.raises(jsonschema.ValidationError, match="worker_count"):
        jsonschema.Draft7Validator(schema).validate({**cluster, "worker_count": 3})


@pytest.mark.parametrize("path", ray_up_files(), ids=lambda path: path.stem)
def test_what_ray_up_runs_on_the_machines_is_a_ray_start_with_a_token(path: Path) -> None:
    from ray.scripts.scripts import start

    cluster = yaml.safe_load(path.read_text())
    assert cluster["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    for role in ("head", "worker"):
        *before, command = cluster[f"{role}_start_ray_commands"]
        assert before[0].endswith("ray stop")
        words = shlex.split(command.partition(";")[2])
        ray = next(place for place, word in enumerate(words) if word == "ray" or word.endswith("/ray"))
        assert "RAY_AUTH_MODE=token" in words[:ray] and words[ray + 1] == "start"
        params = start.make_context("start", words[ray + 2 :]).params
        assert params["head"] == (role == "head") and params["disable_usage_stats"]
        if (
            "docker" in cluster
        ):  # by itself Ray takes 30 % of the memory for its store, and the disk where /dev/shm has less
            size = next(word for word in cluster["docker"]["run_options"] if word.startswith("--shm-size="))
            assert (
                0 < 2 * params["object_store_memory"] <= int(size.removeprefix("--shm-size=").removesuffix("g")) << 30
            )
        if role == "head":  # reached through the tunnel of `ray dashboard` only
            assert params["dashboard_host"] == "127.0.0.1" and params["autoscaling_config"]
        else:
            assert params["address"] == "$RAY_HEAD_IP:6379"


# --- render farms --------------------------------------------------------------------------------------------------


def task(tmp_path: Path, python: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``task.sh`` with an interpreter stood in for."""
    return subprocess.run(
        ["bash", CLUSTER / "farms" / "task.sh", *words],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(stand_in(tmp_path / "python", python)), **environment},
    )


def test_a_farms_task_is_the_command_with_lines_that_the_farm_reads(tmp_path: Path) -> None:
    done = task(tmp_path, 'printf "%s\\n" "$@"', "sample", "a red three", "output=/s/a b.mp4", PROGRESS="deadline")
    assert done.returncode == 0
    assert done.stdout.splitlines()[:3] == ["-m", "pavdm_dist", "sample"]
    config = sample_config(done.stdout.splitlines()[3:])
    assert (config.prompt, config.output, config.progress) == ("a red three", "/s/a b.mp4", "deadline")


@pytest.mark.parametrize(
    ("status", "default", "told", "said"),
    [
        (0, 0, 0, ""),
        (2, 2, 40, "refused"),
        (101, 1, 41, "1 video(s) failed"),
        (125, 1, 41, "25 video(s) failed"),
        (143, 1, 42, "the same task goes on"),
        (130, 1, 42, "the same task goes on"),
        (1, 1, 1, ""),
        (100, 100, 100, ""),
        (126, 126, 126, ""),
    ],
)
def test_what_a_farm_is_told_of_the_end(tmp_path: Path, status: int, default: int, told: int, said: str) -> None:
    done = task(tmp_path, f"exit {status}")
    assert done.returncode == default and said in done.stdout and bool(done.stdout) == bool(said)
    mapped = {"STATUS_REFUSED": "40", "STATUS_FAILED": "41", "STATUS_STOPPED": "42"}
    assert task(tmp_path, f"exit {status}", **mapped).returncode == told


def test_a_farm_that_takes_its_machine_back_lets_the_command_save_what_it_has(tmp_path: Path) -> None:
    python = stand_in(
        tmp_path / "python", 'trap "sleep 0.3; echo saved; exit 143" TERM; echo ready; while :; do sleep 0.05; done'
    )
    with subprocess.Popen(
        ["bash", CLUSTER / "farms" / "task.sh", "sample"],
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)},
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)  # farms say it more than once
        assert process.stdout.readline() == "saved\n" and process.wait(timeout=20) == 1


@pytest.mark.timeout(240)
@pytest.mark.parametrize("by", ["SIGTERM", "drain"])
def test_a_farm_of_shots_that_is_told_to_end_is_no_complete_task(tmp_path: Path, by: str) -> None:
    """A real one: whoever reads 0 gives the rest of the shots to nobody."""
    model, out = tiny_checkpoint(tmp_path / "model"), tmp_path / "out"
    manifest = write_manifest(tmp_path / "m.jsonl", [{"id": "long", "prompt": "a red three", "num_frames": 2000}])
    if by == "drain":
        out.mkdir()
        (out / "drain").touch()
    words = ["farm", "run", str(manifest), "--out", str(out), f"model={model}", "guidance_scale=1"]
    with subprocess.Popen(
        ["bash", CLUSTER / "farms" / "task.sh", *words, "chunks_per_segment=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "STATUS_STOPPED": "42"},
    ) as process:
        try:
            end = time.monotonic() + 180
            while by == "SIGTERM" and not list(out.glob("shots/long/video.mp4.parts/segment-*.mp4")):
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.05)
            if by == "SIGTERM":
                process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=60)
        finally:
            process.terminate()  # which it hands on
    assert process.returncode == 42, said
    assert said.splitlines()[-2:] == [
        "pavdm: interrupted: 1 shots are left, the same command goes on",
        "task.sh: stopped; the same task goes on",
    ]


def test_deadline_gets_a_task_a_seed_whose_command_reads(tmp_path: Path) -> None:
    recorder = tmp_path / "deadlinecommand"
    recorder.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    recorder.chmod(0o755)

    def submitted(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", CLUSTER / "farms" / "deadline.sh", *words],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env={"PATH": "/usr/bin:/bin", "DEADLINE": str(recorder), **environment},
        )

    done = submitted("a red three, up", "seconds=10", OUTPUT="/shared/a b", SEEDS="0-9", PYTHON="/opt/python")
    words = json.loads(done.stdout)
    options = dict(zip(words[1:11:2], words[2:11:2], strict=True))
    assert words[0] == "-SubmitCommandLineJob"
    assert (options["-executable"], options["-frames"], options["-chunksize"]) == ("bash", "0-9", "1")
    of_task = options["-arguments"].replace("<QUOTE>", '"').replace("<STARTFRAME%6>", "000007")
    script, verb, *settings = shlex.split(of_task.replace("<STARTFRAME>", "7"))
    assert (Path(script), verb) == (CLUSTER / "farms" / "task.sh", "sample")
    config = sample_config(settings)
    assert (config.prompt, config.seed, config.seconds, config.output) == (
        "a red three, up", 7, 10.0, "/shared/a b/000007.mp4",
    )  # fmt: skip
    assert {"EnvironmentKeyValue0=PYTHON=/opt/python", "EnvironmentKeyValue1=PROGRESS=deadline"} <= set(words)
    in_store = submitted("a", OUTPUT="s3://bucket/shots")
    assert "output=s3://bucket/shots/<STARTFRAME%6>.mp4" in in_store.stdout, in_store.stderr
    for wrong, environment, said in (
        (["a"], {"OUTPUT": "shots"}, "must be absolute"),
        (["a"], {}, "set OUTPUT"),
        (['a "red" three'], {"OUTPUT": "/s"}, "takes no"),
        ([], {"OUTPUT": "/s"}, "give a prompt"),
    ):
        refused = submitted(*wrong, **environment)
        assert refused.returncode != 0 and said in refused.stderr and not refused.stdout


# Children in the order of OpenCue's job specification (cjsl 1.15), those that must be there with a "!".
OPENCUE = {
    "spec": ["facility", "dept", "show!", "shot!", "user!", "email", "uid", "job"],
    "job": ["paused", "priority", "maxretries", "maxcores", "maxgpus", "autoeat", "localbook", "os", "env", "layers"],
    "env": ["key"],
    "layers": ["layer!"],
    "layer": [
        "cmd!", "range!", "chunk!", "cores", "threadable", "memory", "gpus", "gpu", "gpu_memory", "timeout",
        "timeout_llu", "tags", "limits", "env", "services", "outputs",
    ],
    "services": ["service!"],
}  # fmt: skip


def _opencue_problems(element: ElementTree.Element) -> list[str]:
    rule = OPENCUE.get(element.tag)
    if rule is None:
        return [f"{element.tag} holds {child.tag}" for child in element]
    names = [name.rstrip("!") for name in rule]
    given = [child.tag for child in element]
    found = [f"{element.tag}: unknown {name}" for name in given if name not in names]
    known = [name for name in given if name in names]
    found += [f"{element.tag}: out of order"] if known != sorted(known, key=names.index) else []
    found += [f"{element.tag}: no {name[:-1]}" for name in rule if name.endswith("!") and name[:-1] not in given]
    if element.tag in ("job", "layer") and not re.fullmatch(r"[\w.-]+", element.get("name", "")):
        found.append(f"{element.tag}: name={element.get('name')!r}")
    return found + [problem for child in element for problem in _opencue_problems(child)]


def test_opencue_gets_a_frame_a_seed_whose_command_reads() -> None:
    spec = ElementTree.parse(CLUSTER / "farms" / "opencue.xml").getroot()
    assert _opencue_problems(spec) == []
    command = spec.findtext("job/layers/layer/cmd") or ""
    words = shlex.split(command.replace("#IFRAME#", "7").replace("#ZFRAME#", "0007"))
    assert words[0].endswith("cluster/farms/task.sh") and words[1] == "sample"
    config = sample_config(words[2:])
    assert (config.seed, config.output) == (7, "/shared/shots/0007.mp4")
    layer = spec.find("job/layers/layer")
    assert layer is not None
    layer.insert(0, ElementTree.Element("ram"))
    layer.remove(layer.find("chunk"))  # type: ignore[arg-type]
    spec.append(ElementTree.Element("show"))
    assert {"layer: unknown ram", "layer: no chunk", "spec: out of order"} <= set(_opencue_problems(spec))


def test_the_dockerfile_copies_what_is_there_and_the_builder_gets_no_more() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[2:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    sent = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert sent[1] == "*" and [line[1:] for line in sent if line.startswith("!")] == copied
    # An image is a base with Ray, for CPUs or GPUs, and this project with the tested versions.
    (install,) = [line for line in lines if line.startswith("RUN ")]
    assert shlex.split(install)[1:5] == ["python", "-m", "pip", "install"] and "-c constraints.txt" in install


def test_the_image_has_what_stores_of_s3_need() -> None:
    """An `s3fs` asks for the fsspec of its own version, and for an older dateutil than others do."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r"'\.\[(.*)\]'", (CLUSTER / "Dockerfile").read_text())
    assert set(named.split(",")) <= set(extras) and "s3fs" in "".join(
        line for extra in named.split(",") for line in extras[extra]
    )
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pins["s3fs"] == pins["fsspec"] and pins["python-dateutil"] < "3"


def test_the_command_for_machines_that_come_and_go_is_taken(tmp_path: Path) -> None:
    """The one in the head of ``aws.yaml``: the interpreter and the output are the cluster's, and not this machine's."""
    text = (CLUSTER / "ray_up" / "aws.yaml").read_text()
    (command,) = re.findall(r"^#   (PYTHON=.*\\)\n#     (.*)$", text, re.MULTILINE)
    stand_in(tmp_path / "python", 'printf "%s\\n" "$@"')
    done = subprocess.run(
        ["bash", "-c", " ".join(command).replace("\\", "")],
        cwd=ROOT,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    words = words[words.index("--") + 1 :]
    assert words[:4] == ["python", "-m", "pavdm_dist", "sample"]
    config = sample_config(words[4:])
    assert config.output == "s3://BUCKET/demo.mp4" and config.gpus_per_stage == 1 and config.placement_timeout_s == 900


def openjd_words(name: str, given: dict[str, str], task: str, tasks: list[str], tmp_path: Path) -> list[str]:
    """What the script of a template's task runs, by the model of Open Job Description's reference implementation.

    Args:
        name: of the template.
        given: parameters of the job.
        task: name of the task's parameter.
        tasks: its values, which are checked; the script is that of the last one.
        tmp_path: a folder to run in.
    """
    model = pytest.importorskip("openjd.model", reason="needs openjd-model")
    template = model.decode_job_template(
        template=yaml.safe_load((CLUSTER / "openjd" / name / "template.yaml").read_text())
    )
    values = model.preprocess_job_parameters(
        job_template=template,
        job_parameter_values=given,
        job_template_dir=CLUSTER,
        current_working_dir=tmp_path,
    )
    (step,) = model.create_job(job_template=template, job_parameter_values=values).steps
    found = model.StepParameterSpaceIterator(space=step.parameterSpace)
    assert [one[task].value for one in found] == tasks
    assert step.script.actions.onRun.cancelation.mode.value == "NOTIFY_THEN_TERMINATE"
    # The script as a session would write it.
    stand_in(tmp_path / "python", 'printf "%s\\n" "$@"')
    references = {f"Param.{name}": value.value for name, value in values.items()}
    references |= {f"Task.Param.{task}": tasks[-1], "Param.Python": tmp_path / "python"}
    for file in step.script.embeddedFiles:
        references[f"Task.File.{file.name}"] = tmp_path / file.name
    for file in step.script.embeddedFiles:
        text = re.sub(r"\{\{\s*([\w.]+)\s*\}\}", lambda found: str(references[found[1]]), str(file.data))
        (tmp_path / file.name).write_text(text)
    done = subprocess.run(
        ["bash", tmp_path / "render"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    with pytest.raises(model.DecodeValidationError, match="Extra inputs are not permitted"):
        model.decode_job_template(template={"specificationVersion": "jobtemplate-2023-09", "name": "x", "step": []})
    return done.stdout.splitlines()


def test_openjd_gets_a_task_a_seed_whose_command_reads(tmp_path: Path) -> None:
    given = {"Prompt": 'a "red" three, $up', "Seeds": "3,7-8", "OutputDir": "/s/a b", "Settings": "seconds=2 fps=12"}
    words = openjd_words("seeds", given, "Seed", ["3", "7", "8"], tmp_path)
    assert words[:3] == ["-m", "pavdm_dist", "sample"]
    config = sample_config(words[3:])
    assert (config.prompt, config.seed, config.output) == ('a "red" three, $up', 8, "/s/a b/seed-8.mp4")
    assert (config.seconds, config.fps, config.progress) == (2.0, 12.0, "openjd")


def test_openjd_gets_a_task_a_machine_that_all_render_one_folder(tmp_path: Path) -> None:
    from pavdm_dist.cli import _parser
    from pavdm_dist.farm.verbs import run_settings

    manifest = tmp_path / "my shots.jsonl"
    manifest.write_text('{"prompt": "a red three"}\n')
    given = {"Manifest": str(manifest), "OutputDir": "/s/a b", "Machines": "1-3", "Settings": "seconds=2 streams=1"}
    words = openjd_words("farm", given, "Machine", ["1", "2", "3"], tmp_path)
    assert words[:2] == ["-m", "pavdm_dist"]
    arguments, rest = _parser().parse_known_args(words[2:])
    arguments.words += rest  # as main() does with words behind a flag
    named, config = run_settings(arguments)
    assert (arguments.action, arguments.out, arguments.openjd) == ("run", "/s/a b", True)
    assert (str(named), config.seconds, config.streams) == (str(manifest), 2.0, 1)
