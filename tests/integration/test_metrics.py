"""What Prometheus reads from a harvest and a training run."""

from __future__ import annotations

import json
import re
import socket
import threading
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from tests.support.pipeline import pipeline_config
from winnow.cli.main import app
from winnow.common.metrics import LOOPBACK, serving_metrics
from winnow.harvester.run import single
from winnow.schemas.errors import StoreError
from winnow.trainer.run import member

Samples = dict[str, list[tuple[dict[str, str], float]]]


def scrape(address: str) -> Samples:
    """Samples by name: labels and value."""
    with urllib.request.urlopen(address, timeout=10) as reply:
        assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = reply.read().decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    (found,) = [value for has, value in samples.get(name, []) if labels.items() <= has.items()]
    return found


def run(*words: object) -> tuple[dict, str]:
    result = CliRunner().invoke(app, [*map(str, words), "--json", "--metrics-port", "0"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return pipeline_config(tmp_path_factory.mktemp("metrics"), train={"log_every_steps": 1})


@pytest.fixture
def announced(monkeypatch):
    """Addresses that commands have announced."""
    found: list[str] = []
    monkeypatch.setattr(
        "winnow.cli.console.say",
        lambda line: found.extend(re.findall(r"^metrics: (http://127\.0\.0\.1:\d+/metrics)$", line)),
    )
    return found


def test_a_harvest_and_a_run_are_seen_while_they_last(config, announced, monkeypatch):
    seen: list[Samples] = []
    original = single.LocalRun._collect

    def collect(self, future, unit):
        original(self, future, unit)
        seen.append(scrape(announced[0]))

    monkeypatch.setattr(single.LocalRun, "_collect", collect)
    facts, _ = run("harvest", config, "--single-writer")
    root = {"root": facts["root"], "part": "0/1"}
    assert [value(one, "winnow_harvest_committed_units_total", **root) for one in seen] == [1, 2, 3, 4, 5]
    last = seen[-1]
    assert value(last, "winnow_harvest_tokens_total", **root) == facts["tokens"]
    assert value(last, "winnow_harvest_written_bytes_total", **root) == facts["bytes"]
    assert value(last, "winnow_harvest_units", **root) == 5
    assert value(last, "winnow_harvest_lm_seconds_total", **root) > 0
    assert value(last, "winnow_harvest_batch_windows", **root) == 16

    seen.clear()
    take = member.Member.take

    def step(self, batch):
        if self.step == 7:
            seen.append(scrape(announced[1]))
        return take(self, batch)

    monkeypatch.setattr(member.Member, "take", step)
    finished: list[Samples] = []
    write = member.StatusWriter.write

    def status(self, state, cause=""):
        written = write(self, state, cause)
        if state == "finished":
            finished.append(scrape(announced[1]))
        return written

    monkeypatch.setattr(member.StatusWriter, "write", status)
    summary, _ = run("train", config)
    out = {"run": str(config.parent / "run")}
    lines = [json.loads(line) for line in (config.parent / "run/metrics.jsonl").read_text().splitlines()]
    assert value(seen[0], "winnow_run_loss", **out) == lines[6]["loss"]
    assert value(seen[0], "winnow_run_active_latents", **out) == lines[6]["l0"]
    assert value(seen[0], "winnow_run_state", state="training", **out) == 1
    assert value(finished[0], "winnow_run_state", state="finished", **out) == 1
    assert value(finished[0], "winnow_run_state", state="training", **out) == 0
    assert value(finished[0], "winnow_run_step", **out) == summary["steps"]
    assert value(finished[0], "winnow_run_rows", **out) == summary["tokens"]
    assert value(finished[0], "winnow_run_fvu_ratio", **out) == summary["fvu"]
    with pytest.raises(urllib.error.URLError):
        scrape(announced[1])


@pytest.mark.parametrize("command", ["harvest", "train"])
def test_a_port_in_use_is_a_sentence_and_nothing_is_written(command, tmp_path):
    config = pipeline_config(tmp_path)
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, [command, str(config), "--metrics-port", port])
    assert result.exit_code == 2
    assert f"port {port} of 127.0.0.1: expected a free one" in " ".join(result.stderr.split())
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "run").exists()


def test_health_paths_and_a_queue_out_of_reach():
    class OutOfReach:
        def collect(self):
            raise StoreError("the queue", expected="an answer", got="none")

    registry, healthy = CollectorRegistry(), threading.Event()
    registry.register(OutOfReach())
    with serving_metrics(0, registry=registry, healthy=healthy.is_set) as port:

        def code(path: str) -> int:
            try:
                with urllib.request.urlopen(f"http://{LOOPBACK}:{port}{path}", timeout=10) as reply:
                    return reply.status
            except urllib.error.HTTPError as error:
                error.close()
                return error.code

        assert [code(path) for path in ("/healthz", "/metrics", "/")] == [503, 503, 404]
        healthy.set()
        assert code("/healthz") == 200
