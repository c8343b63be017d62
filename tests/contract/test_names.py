"""One import name: files of the user's that are called like our rooms are none of our business."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ROOMS = sorted(path.name for path in (ROOT / "winnow").iterdir() if path.is_symlink())
WORKER = """
import json, os, ray
from winnow.cluster.crew import CrewSettings, Named, cluster

@ray.remote
def look():
    import winnow.store, winnow.trainer
    return [m.__file__ for m in (winnow.store, winnow.trainer)], os.getcwd()

with cluster(CrewSettings(Named("test", "actors", "threads", "gpus", "address"))):
    found = ray.get(look.remote())
print(json.dumps(found))
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working directory with a file called like each of our rooms."""
    for name in ROOMS:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a file of the user was imported')\n")
    return tmp_path


def start(folder: Path, *command: str) -> tuple[int, str, str]:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_every_room_is_a_relative_link_to_its_folder():
    assert ROOMS
    for name in ROOMS:
        assert (ROOT / "winnow" / name).readlink() == Path("..") / name
        assert (ROOT / name / "__init__.py").is_file()


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        ((str(BIN / "winnow"), "info", "absent"), 2, "error: "),
        ((sys.executable, "-m", "winnow", "info", "absent"), 2, "error: "),
        ((sys.executable, "-m", "winnow.trainer", "--help"), 0, "Usage"),
        ((sys.executable, "-m", "winnow.jobs.worker"), 1, "list index out of range"),
        (
            (
                str(BIN / "torchrun"),
                "--standalone",
                "--nproc-per-node",
                "1",
                "-m",
                "winnow.trainer",
                "--help",
            ),
            0,
            "Usage",
        ),
    ],
    ids=["winnow", "-m winnow", "-m winnow.trainer", "-m winnow.jobs.worker", "torchrun"],
)
def test_commands_run_where_files_are_called_like_our_rooms(work, command, code, told):
    got, out, err = start(work, *command)
    assert (got, told in out + err, "a file of the user" in err) == (code, True, False), err


def test_ray_workers_import_our_rooms_and_keep_their_working_directory(work):
    code, out, err = start(work, sys.executable, "-P", "-c", WORKER)
    assert code == 0, err
    files, folder = json.loads(out.splitlines()[-1])
    assert {Path(file).resolve().parents[1] for file in files} == {ROOT}
    assert folder == str(work)
