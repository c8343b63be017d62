"""A driver out of memory: one sentence, nothing lost, and the same command ends with the same digest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import winnow.harvester.plan.planner
import winnow.harvester.run.driver
from tests.faults.test_follow import make_alone
from tests.support.pipeline import pipeline_config
from winnow.cli.main import app
from winnow.common.config_file import load_config
from winnow.harvester.run.worker import UnitWorker
from winnow.store.check.verify import verify
from winnow.store.objects import open_store
from winnow.store.read.reader import load_plan, receipts_present

UNITS = 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("whole")
    config = pipeline_config(folder, units=UNITS - 1)
    return config, make_alone(load_config(config))[1]


def harvest_here(config: Path, root: Path) -> Any:
    arguments = ["harvest", str(config), "--single-writer", "--json", "--set", f"root={root}"]
    return CliRunner().invoke(app, arguments)


def refused(error: str) -> bool:
    words = " ".join(error.split())
    return "ran out of memory" in words and "run the same command again" in words and "Traceback" not in words


def test_under_a_real_limit(whole: tuple[Path, str], tmp_path: Path) -> None:
    config, digest = whole
    root = tmp_path / "data"
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.starved", "2", "harvest", str(config), "--set", f"root={root}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert refused(result.stderr), result.stderr
    assert "Unable to allocate" in result.stderr, "it is the system's refusal that is told"
    store = open_store(str(root))
    kept = receipts_present(store, load_plan(store))
    assert 2 <= len(kept) < UNITS
    again = harvest_here(config, root)
    assert again.exit_code == 0, again.stderr
    assert digest in again.stdout
    assert f"{UNITS - len(kept)} of {UNITS} units to do" in again.stderr
    assert not verify(store, level="full")


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (winnow.harvester.plan.planner, "put_tokens"),
        (UnitWorker, "_rows"),
        (winnow.harvester.run.driver, "seal"),
        (winnow.harvester.run.driver, "settle_account"),
    ],
)
def test_wherever_it_happens(
    whole: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str
) -> None:
    config, digest = whole
    real, calls = getattr(where, name), []

    def starve(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == 1:
            raise MemoryError
        return real(*arguments, **named)

    monkeypatch.setattr(where, name, starve)
    first = harvest_here(config, tmp_path)
    assert first.exit_code == 1
    assert refused(first.stderr), first.stderr
    again = harvest_here(config, tmp_path)
    assert again.exit_code == 0, again.stderr
    assert digest in again.stdout
    assert not verify(open_store(str(tmp_path)), level="full")
