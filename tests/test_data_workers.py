"""Worker processes of data preparation, on this machine and on Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pavdm_dist.data.workers import WorkerDied, worker_number, workers
from pavdm_dist.errors import ConfigError, EngineError


@pytest.mark.timeout(60)
def test_what_no_node_has_is_refused(ray_cluster: None) -> None:
    for cpus, gpu, sentence in ((10_000, False, "threads=10000: no node"), (1, True, "threads=1 with device=cuda: no")):
        with pytest.raises(ConfigError, match=sentence), workers(1, "auto", cpus, gpu):
            pass


@pytest.mark.timeout(60)
def test_workers_are_numbered(tmp_path: Path) -> None:
    with workers(2, None, 1, False) as run:
        found = set(run(_number_after_a_while, [()] * 20))
    assert found == {0, 1}


@pytest.mark.timeout(60)
def test_workers_run_no_scripts_of_the_current_folder(tmp_path: Path) -> None:
    for name in ("pickle", "struct"):  # what they import before they are told where from
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a script of somebody else')")
    program = """
import operator, os, sys
sys.path[:] = [folder for folder in sys.path if folder not in ("", os.getcwd())]
from pavdm_dist.data.readers import survived
from pavdm_dist.data.workers import workers
if __name__ == "__main__":
    with workers(2, None, 1, False) as run:
        print(*run(operator.neg, [(5,)]), survived(operator.neg, 7), os.environ.get("PYTHONSAFEPATH"))
"""
    (tmp_path / "in").mkdir()
    script = tmp_path / "in" / "script.py"
    script.write_text(program)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "-5 -7 None\n", done.stderr


def _number_after_a_while() -> int:
    time.sleep(0.2)  # so that every worker gets something to do
    return worker_number()


@pytest.mark.timeout(120)
def test_a_dead_worker_is_reported() -> None:
    with (
        pytest.raises(EngineError, match=r"a worker process died.*run again to go on"),
        workers(2, None, cpus=1, gpu=False) as run,
    ):
        list(run(os._exit, [(1,)]))


def _for_an_hour(folder: str, name: str) -> int:
    note = Path(folder, name)
    try:  # the end may come in the middle of the next line
        note.touch()
        for _ in range(36_000):
            time.sleep(0.1)
    finally:
        note.unlink(missing_ok=True)
    return 0


def _given(task: tuple[str, ...]) -> int:
    if len(task) == 2:
        return _for_an_hour(*task)
    if task[0] == "fault":
        time.sleep(float(task[2]))  # the other process is there already, or is not
        raise ConfigError("a fault of one task")
    return 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("first", "kind"),
    [(("interrupt",), KeyboardInterrupt)] + [(("fault", "after", at), ConfigError) for at in ("0", "0.5", "3")],
)
def test_the_end_of_a_run_waits_for_no_task(first: tuple[str, ...], kind: type[BaseException], tmp_path: Path) -> None:
    """Two run and two wait for a process; what they have begun they leave as for any error."""

    def run_all() -> None:
        tasks = [first, *[(str(tmp_path), str(number)) for number in range(4)]]
        with workers(2, None, cpus=1, gpu=False) as run:
            for _ in run(_given, [(task,) for task in tasks]):
                while len(list(tmp_path.iterdir())) < 2:
                    time.sleep(0.05)
                raise KeyboardInterrupt

    with pytest.raises(kind):
        run_all()
    assert not list(tmp_path.iterdir())


def _ended_or_for_an_hour(folder: str, name: str) -> int:
    if name != "ended":
        return _for_an_hour(folder, name)
    while len(list(Path(folder).iterdir())) < 2:
        time.sleep(0.05)
    os._exit(1)


@pytest.mark.timeout(120)
def test_readers_on_ray_have_left_when_the_death_of_one_is_told(ray_cluster: None, tmp_path: Path) -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a cluster's workers do not import tests
    tasks = [(str(tmp_path), name) for name in ("ended", "one", "two")]
    with workers(1, "auto", cpus=1, gpu=False) as run:
        with pytest.raises(WorkerDied, match=r"ray_address='auto': .*run again to go on"):
            list(run(_ended_or_for_an_hour, tasks))
        assert not list(tmp_path.iterdir())
