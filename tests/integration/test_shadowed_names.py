"""Files of the user's that are called like a package of ours stand where commands are started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from winnow.schemas.names import HOME, hidden_by

BIN = Path(sys.executable).parent
NAMES = (
    "store.py",
    "trainer.py",
    "schemas.py",
    "harvester.py",
    "evaluator/__init__.py",
    "explorer/__init__.py",
)
FOREIGN = "raise RuntimeError('a file of the user was imported')\n"
WORKER = """
import json, os, ray
from winnow.cluster.crew import cluster
from winnow.schemas.config import Config

@ray.remote
def look():
    import evaluator, explorer, harvester, schemas, store, trainer
    return [m.__file__ for m in (evaluator, explorer, harvester, schemas, store, trainer)], os.getcwd()

with cluster(Config(root="x")):
    found = ray.get(look.remote())
print(json.dumps(found))
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working directory of the user's, with files named like each of our packages."""
    folder = tmp_path / "work"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(FOREIGN)
    return folder


def start(folder: Path, *command: str, **environment: str) -> tuple[int, str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_runs_where_files_are_called_like_packages(work: Path) -> None:
    code, _, err = start(work, str(BIN / "winnow"), "info", "absent")
    assert (code, "error: " in err, "a file of the user" in err) == (2, True, False), err


def test_ray_workers_import_our_packages_and_keep_their_working_directory(work: Path) -> None:
    code, out, err = start(work, sys.executable, "-P", "-c", WORKER)
    assert code == 0, err
    files, folder = json.loads(out.splitlines()[-1])
    assert {Path(file).parents[1] for file in files} == {HOME}
    assert folder == str(work)


@pytest.mark.parametrize("module", ["trainer", "winnow.jobs.worker"])
def test_a_module_of_ours_finds_its_siblings(work: Path, module: str) -> None:
    (work / "trainer.py").unlink()
    code, out, err = start(work, sys.executable, "-m", module, *([] if "worker" in module else ["--help"]))
    assert "a file of the user" not in err
    assert ("list index out of range" in err) if "worker" in module else (code == 0 and "Usage" in out), err


def test_torchrun_starts_our_trainer_where_another_stands(work: Path) -> None:
    command = (str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "1", "-m", "trainer", "--help")
    code, out, err = start(work, *command, PYTHONSAFEPATH="1")
    assert (code, "Usage" in out) == (0, True), err


@pytest.mark.parametrize("name", NAMES)
def test_what_pythonpath_puts_before_ours_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(FOREIGN)
    code, _, err = start(tmp_path, str(BIN / "winnow"), "info", "x", PYTHONPATH=".")
    assert code == 1
    assert f"error: {tmp_path / name.removesuffix('/__init__.py')}" in err
    assert "would be imported as Winnow's own package" in err
    assert "off PYTHONPATH" in err
    assert "Traceback" not in err


def test_what_hides_a_package(work: Path, tmp_path: Path) -> None:
    assert hidden_by(HOME) is None
    assert hidden_by(tmp_path) is None
    (tmp_path / "store").mkdir()  # data, say: a folder without __init__.py is no package of its own
    assert hidden_by(tmp_path) is None
    assert hidden_by(work) == work / "schemas.py"
