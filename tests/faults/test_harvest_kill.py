"""P3: kill the harvest at any point, run the same command again, get the same dataset."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.gated_worker import FREE, GATE
from tests.support.pipeline import make_alone, pipeline_config
from winnow.common.config_file import load_config
from winnow.store.check.verify import verify
from winnow.store.objects import open_store

UNITS = 12


def command(config: Path, root: Path, module: str = "winnow") -> list[str]:
    return [sys.executable, "-m", module, "harvest", str(config), "--json", "--set", f"root={root}"]


@contextmanager
def gated(config: Path, root: Path, free: int) -> Iterator[subprocess.Popen[str]]:
    """A harvest that makes so many units and stops at the next ones until `<root>-gate/open` is there."""
    gate = Path(f"{root}-gate")
    gate.mkdir(exist_ok=True)
    process = subprocess.Popen(
        command(config, root, "tests.support.gated_worker"),
        cwd=Path(__file__).parents[2],
        env={**os.environ, GATE: str(gate), FREE: str(free)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process)
        for pipe in (process.stdout, process.stderr):
            pipe.close()


def wait_for(done, process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, "the harvest ended before it could be killed"
        assert time.monotonic() < end, "the awaited moment never came"
        time.sleep(0.002)


def attempts(root: Path) -> dict[str, str]:
    return {path.name: json.loads(path.read_text())["attempt"]["id"] for path in root.glob("receipts/*.json")}


def kill_tree(process: subprocess.Popen) -> None:
    """Kill -9 of the driver and of everything it started."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            os.kill(member.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=30)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The config, and the digest that its dataset has without Ray and without a kill."""
    config = pipeline_config(tmp_path_factory.mktemp("whole"), units=UNITS - 1)
    return config, make_alone(load_config(config))[1]


# What has been reached, and how many units the workers make without being told to go on.
MOMENTS = {
    "while the tokens are written": (lambda root: any(root.glob("tokens/c/*/0")), 0),
    "before the first receipt": (lambda root: any(root.glob("activations/*/c/*/0")), 1),
    "in the middle": (lambda root: len(list(root.glob("receipts/*.json"))) >= UNITS // 2, UNITS // 2),
}


def test_killed_at_one_moment_after_another_it_gives_the_same_dataset(whole, tmp_path):
    config, digest = whole
    root = tmp_path / "data"
    kept = dict[str, str]()
    for reached, free in MOMENTS.values():
        with gated(config, root, free) as process:
            wait_for(lambda reached=reached: reached(root), process)
            kill_tree(process)
        before, kept = kept, attempts(root)
        assert before.items() <= kept.items(), "a unit that had a receipt was made again"
        assert len(kept) < UNITS, "killed too late to show anything"
    result = subprocess.run(command(config, root), capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["dataset_sha256"] == digest
    after = attempts(root)
    assert len(after) == UNITS
    assert kept.items() <= after.items(), "a unit that had a receipt was made again"
    assert not verify(open_store(str(root)), level="full")


def test_a_killed_worker_is_replaced_and_its_units_are_made(whole, tmp_path):
    config, digest = whole
    root = tmp_path / "data"
    gate = Path(f"{root}-gate")
    with gated(config, root, 1) as process:
        wait_for(lambda: any(root.glob("receipts/*.json")) and len(list(gate.iterdir())) > 1, process)
        family = psutil.Process(process.pid).children(recursive=True)
        [worker] = [child for child in family if "ray::GatedWorker" in " ".join(child.cmdline())]
        os.kill(worker.pid, signal.SIGKILL)  # it waits in the middle of a unit
        (gate / "open").touch()
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["dataset_sha256"] == digest
    assert "failed" in err
    assert load_config(config).root != str(root)
