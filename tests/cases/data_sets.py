"""Folders of videos as they come from other machines, and data sets that grow."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from cases import LISTED, environment, film, pavdm, python, sentence, went_well

PREPARE = ("data", "prepare", "films")
# The command line where the system says no to whoever asks for a lock.
LOCKLESS = """
import errno, fcntl, os, sys
def refuse(*_):
    raise OSError(getattr(errno, sys.argv[1]), os.strerror(getattr(errno, sys.argv[1])))
fcntl.flock = fcntl.lockf = refuse
from pavdm_dist.cli import main
sys.exit(main(sys.argv[2:]))
"""
# On the path of every interpreter: a decoder that takes its process with it, as some did.
DEADLY = """
import os, av
usual = av.open
def deadly(file, *arguments, **more):
    if "deadly" in str(getattr(file, "name", file)):
        os._exit(139)
    return usual(file, *arguments, **more)
av.open = deadly
"""


def what_a_mac_or_a_nas_hides_is_no_video(folder: Path) -> None:
    """B1: companions with a dot, the trash and thumbnails are passed over, and counted."""
    film(folder / "films/a.mp4", 20)
    (folder / "films/a.txt").write_text("a red three")
    (folder / "films/._a.mp4").write_bytes(bytes(4096))
    (folder / "films/._a.txt").write_bytes(b"\0\5\26\7" + bytes(100) + b"\xb0\xff")
    for hidden in (".Trash-0", "@eaDir"):
        (folder / "films" / hidden).mkdir()
        shutil.copy(folder / "films/a.mp4", folder / "films" / hidden / "old.mp4")
    report = pavdm(folder, *PREPARE, *LISTED, "strict=true")
    said = went_well(report)
    assert json.loads(report.stdout)["videos"] == 1 and "3 hidden files and folders are passed over" in said, said


def a_file_system_without_locks_is_worked_on(folder: Path) -> None:
    """B2: no lock, whatever the system calls it, is a warning."""
    film(folder / "films/a.mp4", 20)
    for name in ("ENOSYS", "ENOTSUP", "ENOLCK", "EBADF"):
        said = went_well(python(folder, LOCKLESS, name, *PREPARE, "captions=stem", *LISTED, f"output={name}"))
        assert (folder / name / "clips-0.jsonl").exists() and "WARNING" in said and "lock" in said, said


def a_film_that_kills_its_reader_is_passed_over(folder: Path) -> None:
    """B4: the run, or the next one, goes on without it, and it is named."""
    film(folder / "films/c0.mp4", 20)
    for number in range(1, 12):
        os.link(folder / "films/c0.mp4", folder / f"films/c{number}{'-deadly' if number == 5 else ''}.mp4")
    (folder / "path").mkdir()
    (folder / "path/sitecustomize.py").write_text(DEADLY)
    given = environment()
    given["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder / "path"), given.get("PYTHONPATH")]))
    for processes in (1, 2):
        words = [*PREPARE, "captions=stem", *LISTED, f"processes={processes}", f"output={processes}"]
        tries = [pavdm(folder, *words, env=given)]
        while tries[-1].returncode and len(tries) < 3:
            tries.append(pavdm(folder, *words, env=given))
        said = "".join(ended.stderr for ended in tries)
        assert tries[-1].returncode == 0 and "Traceback" not in said and "c5-deadly.mp4" in said, said
        taken = {json.loads(line)["video"] for line in (folder / f"{processes}/clips-0.jsonl").read_text().splitlines()}
        assert len(taken) == 11, taken


def a_set_grows_by_a_folder_of_its_own(folder: Path) -> None:
    """B6: new videos are told where they can go, and training takes several folders."""
    words = [*PREPARE, "captions=stem", *LISTED]
    film(folder / "films/a.mp4", 20)
    went_well(pavdm(folder, *words))
    before = (folder / "set/clips-0.jsonl").read_bytes()
    film(folder / "films/b.mp4", 20)
    said = sentence(pavdm(folder, *words))
    assert "b.mp4" in said and "besides=[set]" in said.replace(str(folder) + "/", ""), said
    went_well(pavdm(folder, *words, "output=more", "besides=[set]"))
    assert (folder / "set/clips-0.jsonl").read_bytes() == before
    clips = (folder / "more/clips-0.jsonl").read_text().splitlines()
    assert {json.loads(line)["video"] for line in clips} == {"b.mp4"}
    settings = pavdm(folder, "train", "data.folder=[set, more]", "--print-config")
    went_well(settings)
    assert "- set\n" in settings.stdout and "- more\n" in settings.stdout
