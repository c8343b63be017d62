"""Ranks that die or read damaged data: the others stop with a reason, and any mesh goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import free_port
from tests.support.planted import HOOK, planted_config
from tests.support.roots import roots_config
from winnow.common.config_file import load_config
from winnow.trainer.run.loop import train

EPOCHS, STEPS = 3, 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mesh-kill")


@pytest.fixture(scope="module")
def config(folder):
    fields = {"epochs": EPOCHS, "log_every_steps": 1, "checkpoint_seconds": 0, "latents": 97}
    return planted_config(folder, **fields, dead_after_tokens=400, auxk_k=8)


def start(config, out, mesh: dict[str, int], folder) -> list[subprocess.Popen]:
    """The ranks of a mesh, each telling into `log-<rank>`."""
    size = mesh.get("data", 1) * mesh.get("latent", 1)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    sets = [f"train.mesh.{axis}={ranks}" for axis, ranks in mesh.items()] + [f"train.out={out}"]
    command = [sys.executable, "-m", "winnow.trainer", str(config), "--json"]
    command += [word for item in sets for word in ("--set", item)]
    ranks = []
    for rank in range(size):
        env = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"log-{rank}").open("w") as log:
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    return ranks


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_rank_killed_in_mid_step_stops_the_other_and_another_mesh_goes_on(config, folder, tmp_path):
    out = tmp_path / "run"
    ranks = start(config, out, {"latent": 2}, tmp_path)
    try:
        end = time.monotonic() + 120
        # Early: a busy machine must not end the run before this process looks again.
        while not any(int(path.parent.name) >= 4 for path in out.glob("checkpoints/*/index.json")):
            assert all(rank.poll() is None for rank in ranks), (tmp_path / "log-0").read_text()
            assert time.monotonic() < end, "no checkpoint came"
            time.sleep(0.01)
        os.kill(ranks[1].pid, signal.SIGKILL)
        assert ranks[0].wait(timeout=240) == 1
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    told = " ".join((tmp_path / "log-0").read_text().split())
    assert "another rank of the mesh is lost" in told
    assert "it resumes from the newest checkpoint" in told
    assert not (out / "summary.json").exists()

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command += ["-m", "winnow.trainer", str(config), "--json"]
    command += ["--set", "train.mesh.latent=3", "--set", f"train.out={out}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads(result.stdout)
    whole = train(load_config(config, [f"train.out={folder / 'whole'}"]))
    for key in ("tokens", "steps", "left_out"):
        assert summary[key] == whole[key]
    assert whole["auxk_steps"] > 0
    assert summary["fvu"] == pytest.approx(whole["fvu"], rel=0.02)
    found, expected = lines(out), lines(folder / "whole")
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [*range(1, STEPS + 1)]
    assert [line["tokens"] for line in found] == [line["tokens"] for line in expected]
    assert all(0 <= line["second_rounds"] <= 2 for line in found)
    assert found[-1]["bytes_sent"] > found[-2]["bytes_sent"] > 0
    for line, right in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(right["loss"], rel=0.01), line["step"]


def test_damaged_data_on_one_rank_stops_both_with_its_cause(config, folder, tmp_path):
    damaged = next((folder / "data" / "activations" / HOOK).rglob("c/3/0"))
    before = damaged.read_bytes()
    data = bytearray(before)
    data[len(data) * 3 // 4] ^= 1  # in the slices of the second rank's lanes
    damaged.write_bytes(data)
    ranks = start(config, tmp_path / "run", {"data": 2}, tmp_path)
    try:
        codes = [rank.wait(timeout=240) for rank in ranks]
    finally:
        damaged.write_bytes(before)
        for rank in ranks:
            rank.kill()
            rank.wait()
    told = [" ".join((tmp_path / f"log-{rank}").read_text().split()) for rank in range(2)]
    assert codes == [1, 1], told
    assert "unit 3" in told[1]
    assert "rank 1 of the mesh failed, so all of them stop" in told[0]
    assert "unit 3" in told[0]


@pytest.mark.parametrize("mesh", [{"data": 2}, {"latent": 2}], ids=["2x1", "1x2"])
def test_a_crosscoder_of_two_subjects_sees_the_same_rows_on_a_mesh(tmp_path, mesh):
    fields = {"epochs": 1, "log_every_steps": 1}
    config = roots_config(tmp_path, out=str(tmp_path / "alone"), **fields)
    train(load_config(config))
    ranks = start(config, tmp_path / "run", mesh, tmp_path)
    for number, rank in enumerate(ranks):
        assert rank.wait(timeout=240) == 0, (tmp_path / f"log-{number}").read_text()[-3000:]
    alone, meshed = (lines(tmp_path / name) for name in ("alone", "run"))
    assert len(alone) == len(meshed) == 16
    for one, two in zip(alone, meshed, strict=True):
        assert two["tokens"] == one["tokens"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
