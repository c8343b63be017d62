"""P3: kill the harvest at any point, run the same command again, get the same dataset."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.pipeline import make_alone, pipeline_config
from winnow.common.config_file import load_config
from winnow.store.check.verify import verify
from winnow.store.objects import open_store

UNITS = 12


def command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "winnow", "harvest", str(config), "--json", *arguments]


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


MOMENTS = {
    "while the tokens are written": lambda root: any(root.glob("tokens/c/*/0")),
    "before the first receipt": lambda root: any(root.glob("activations/*/c/*/0")),
    "in the middle": lambda root: len(list(root.glob("receipts/*.json"))) >= UNITS // 2,
}


def test_killed_at_one_moment_after_another_it_gives_the_same_dataset(whole, tmp_path):
    config, digest = whole
    root = tmp_path / "data"
    kept = dict[str, str]()
    for reached in MOMENTS.values():
        process = subprocess.Popen(
            command(config, "--set", f"root={root}"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(lambda reached=reached: reached(root), process)
        kill_tree(process)
        before, kept = kept, attempts(root)
        assert before.items() <= kept.items(), "a unit that had a receipt was made again"
        assert len(kept) < UNITS, "killed too late to show anything"
    result = subprocess.run(
        command(config, "--set", f"root={root}"), capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["dataset_sha256"] == digest
    after = attempts(root)
    assert len(after) == UNITS
    assert kept.items() <= after.items(), "a unit that had a receipt was made again"
    assert not verify(open_store(str(root)), level="full")


def test_a_killed_worker_is_replaced_and_its_units_are_made(whole, tmp_path):
    config, digest = whole
    root = tmp_path / "data"
    process = subprocess.Popen(
        command(config, "--set", f"root={root}"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: any(root.glob("receipts/*.json")), process)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.name().startswith("ray::") and "UnitWorker" in " ".join(child.cmdline())
    ]
    assert workers
    os.kill(workers[0].pid, signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["dataset_sha256"] == digest
    assert "failed" in err
    assert load_config(config).root != str(root)
