"""The trainer service: kill -9 and start again, drain, failures, stop and resume. Real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest
from typer.testing import CliRunner

from tests.support.planted import OTHER_HOOK, planted_config, planted_rows
from winnow.cli.main import app
from winnow.common.config_file import load_config
from winnow.jobs import service as service_module
from winnow.jobs.prometheus import service_registry
from winnow.jobs.queue import Queue, job_facts
from winnow.jobs.service import Service, machine_id, slots
from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.store.testing import write_plan, write_unit
from winnow.trainer.run.loop import train

EPOCHS = 40
STEPS = 16 * EPOCHS


def submit(config: Path, root: Path, out: Path, *sets: str) -> str:
    arguments = ["submit", str(config), "--to", str(root), "--json", "--set", f"train.out={out}"]
    arguments += [word for value in sets for word in ("--set", value)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["job"]


def start(root: Path, log: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "winnow", "serve-trainer", str(root), "--gpus", "none", "--poll", "0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        return subprocess.Popen([*command, *options], stdout=file, stderr=file, env=environment)


def wait(
    what: Callable[[], object], process: subprocess.Popen[bytes] | None = None, seconds: float = 200
) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process is None or process.poll() is None, "the service ended"
        assert time.monotonic() < end, "the awaited moment never came"
        time.sleep(0.02)


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in out.glob("checkpoints/*/index.json"))


def facts_of(root: Path) -> dict[str, dict]:
    return {fact["job"]: fact for fact in job_facts(open_store(str(root)))}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return planted_config(tmp_path_factory.mktemp("service"), epochs=EPOCHS, checkpoint_seconds=0)


def test_killed_with_two_running_and_one_waiting_all_three_finish_once(config, tmp_path, monkeypatch):
    root, log = tmp_path / "root", tmp_path / "log"
    outs = [tmp_path / f"run{number}" for number in range(3)]
    epochs = [EPOCHS, EPOCHS, 2]
    names = [
        submit(config, root, out, f"train.seed={number}", f"train.epochs={epochs[number]}")
        for number, out in enumerate(outs)
    ]
    twice = submit(config, root, outs[0], "train.seed=0", f"train.epochs={EPOCHS}")
    assert twice == names[0], "submitted twice is one job"
    process = start(root, log, "--workers", "2")
    wait(lambda: all(len(checkpoints(out)) > 1 for out in outs[:2]), process)
    queue = Queue(open_store(str(root)))
    beat = queue.read_beat(names[1], 0)
    assert beat is not None
    os.kill(process.pid, signal.SIGKILL)  # the service; and one of its workers, so that it saves nothing
    os.kill(beat.pids[0], signal.SIGKILL)
    process.wait()
    assert not (outs[2] / "status.json").exists(), "the third was to wait"
    before = [checkpoints(out)[-1] for out in outs[:2]]

    again = start(root, log, "--workers", "2", "--until-empty")
    assert again.wait(300) == 0, log.read_text()
    facts = facts_of(root)
    assert [facts[name]["state"] for name in names] == ["finished"] * 3, facts
    assert [facts[name]["attempts"] for name in names] == [2, 2, 1]
    assert [facts[name]["failed_attempts"] for name in names] == [0, 0, 0]
    for number, out in enumerate(outs):
        steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        expected = range(10, 16 * epochs[number] + 1, 10)
        assert steps[: len(expected)] == list(expected), "every step once"
        if number < 2:
            assert 0 < before[number] < STEPS
    alone = load_config(
        config, [f"train.out={tmp_path / 'alone'}", "train.seed=1", "train.checkpoint_seconds=60"]
    )
    train(alone)
    weights = "sae.safetensors"
    assert (outs[1] / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()

    monkeypatch.setattr(service_module.subprocess, "Popen", FakeWorker)
    idle = make(queue)
    assert idle.turn() is False
    assert not idle.attempts, "nothing is trained twice"


def test_sigterm_drains_stop_holds_a_run_and_resume_lets_it_go(config, tmp_path, monkeypatch):
    root, log, out = tmp_path / "root", tmp_path / "log", tmp_path / "run"
    name = submit(config, root, out)
    process = start(root, log, "--port", "0")
    wait(lambda: checkpoints(out), process)
    address = "http://127.0.0.1:" + log.read_text().split("http://127.0.0.1:")[1].split()[0]
    with urllib.request.urlopen(f"{address}/healthz", timeout=10) as reply:
        assert reply.status == 200
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    assert 'winnow_jobs{state="running"} 1' in text
    assert 'winnow_devices{state="busy"} 1' in text
    assert f'winnow_run_steps{{job="{name}",run="{out}"}} {STEPS}' in text
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 0, log.read_text()
    assert facts_of(root)[name]["state"] == "waiting"
    assert 0 < checkpoints(out)[-1] < STEPS
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"

    run = CliRunner()
    assert run.invoke(app, ["stop", str(out)]).exit_code == 0
    assert facts_of(root)[name]["state"] == "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(service_module.subprocess, "Popen", FakeWorker)
        idle = make(Queue(open_store(str(root))))
        assert idle.turn() is False
        assert not idle.attempts, "a stopped run is not taken up"
    shown = run.invoke(app, ["runs", str(tmp_path), "--json"])
    assert json.loads(shown.stdout)["runs"][0]["state"] == "stopped"
    assert run.invoke(app, ["resume", str(out)]).exit_code == 0
    last = start(root, log, "--until-empty")
    assert last.wait(200) == 0
    assert facts_of(root)[name]["state"] == "finished"
    assert run.invoke(app, ["stop", str(out)]).exit_code == 2
    assert "finished" in run.invoke(app, ["watch", str(out), "--once"]).stdout
    table = run.invoke(app, ["runs", str(tmp_path)])
    assert table.exit_code == 0
    assert "finished" in table.stdout


def test_a_mesh_that_follows_a_harvest_loses_a_rank_and_goes_on_from_its_checkpoint(config, tmp_path):
    """Submitted before the harvest begins; while it is under way one of its two ranks is killed."""
    settings = load_config(config)
    plan, late = ActivationStore.open(settings.root).plan, open_store(str(tmp_path / "late"))
    root, out = tmp_path / "root", tmp_path / "run"
    mesh = ("train.mesh.latent=2", "train.follow=true", "train.follow_seconds=600", "train.group_units=4")
    rest = ("train.epochs=2", "train.log_every_steps=1", "train.activation=batchtopk")
    rest += (f"train.with_hooks=[{OTHER_HOOK}]", "train.normalize=dataset")
    name = submit(config, root, out, f"root={late.uri}", *mesh, *rest)
    queue = Queue(open_store(str(root)))
    service = Service(queue.store, ("cpu0", "cpu1"), {**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert service.turn(), "there is something left to do"
        assert not service.attempts, "no device waits for a harvest that has not begun"
        write_plan(late, plan)
        for unit in range(5):  # the validation unit and a group
            write_unit(late, plan, unit, planted_rows)
        service.turn()
        assert [attempt.slots for attempt in service.attempts] == [["cpu0", "cpu1"]]
        wait(lambda: [service.turn(), len(checkpoints(out)) > 1 and checkpoints(out)[-1] >= 4][1])
        os.kill(service.attempts[0].processes[1].pid, signal.SIGKILL)
        wait(lambda: [service.turn(), queue.was_ended(name, 0)][1])
        seen = checkpoints(out)[-1]
        assert facts_of(root)[name]["cause"].endswith("(signal 9)"), (
            "what the rank that was left says hides it"
        )
        for unit in range(5, plan.units):
            write_unit(late, plan, unit, planted_rows)
        wait(lambda: not service.turn())
    finally:
        for attempt in service.attempts:
            attempt.signal(signal.SIGKILL)
    fact = facts_of(root)[name]
    assert (fact["state"], fact["attempts"], fact["failed_attempts"]) == ("finished", 2, 1), fact
    told = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == [*range(1, 33)], "every step once"
    assert seen < 32
    assert told[-1]["bytes_sent"] > 0, "it was a mesh"
    alone = [f"train.out={tmp_path / 'alone'}", "train.group_units=4", *rest, "train.checkpoint_seconds=60"]
    whole = train(load_config(config, alone))
    found = json.loads((out / "summary.json").read_text())
    assert found["tokens"] == whole["tokens"]
    for figure in ("fvu", "l0"):
        assert found[figure] == pytest.approx(whole[figure], rel=0.02)
    sae, right = Sae.load(out), Sae.load(tmp_path / "alone")
    assert sae.threshold.item() == pytest.approx(right.threshold.item(), rel=0.05)


# Without processes of their own


class FakeWorker:
    """Stands for a worker process: ends when told, with the code told."""

    pid = 2**22 + 1
    stdin = None
    logs = []

    def __init__(self, *args, **kwargs):
        self.code = None
        self.signals = []
        kwargs["stderr"].write(b"noise\nerror: the cause\n")
        self.logs.append(kwargs["stderr"])

    def poll(self):
        return self.code

    def send_signal(self, number):
        self.signals.append(number)


@pytest.fixture
def queue(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module.subprocess, "Popen", FakeWorker)
    yield Queue(open_store(str(tmp_path / "root")))
    while FakeWorker.logs:
        FakeWorker.logs.pop().close()


def make(queue: Queue, devices=("cpu0",)) -> Service:
    return Service(queue.store, devices, {})


def add(queue: Queue, tmp_path: Path, name: str, **train) -> str:
    spec = {"out": str(tmp_path / name), "hook": "h.1", "latents": 8, "k": 2, **train}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"root": "data", "train": spec}))
    return queue.submit(load_config(path), 2)[0]


def test_a_job_that_fails_is_tried_so_often_and_then_has_failed_with_its_cause(queue, tmp_path):
    name = add(queue, tmp_path, "a")
    service = make(queue)
    for _ in range(2):
        service.turn()
        service.attempts[0].processes[0].code = 1
    assert service.turn() is False
    fact = job_facts(queue.store)[0]
    assert (fact["state"], fact["attempts"], fact["cause"]) == ("failed", 2, "the cause (exit code 1)")
    permanent = add(queue, tmp_path, "b")
    service.turn()
    service.attempts[0].processes[0].code = service_module.PERMANENT
    assert service.turn() is False
    assert {fact["job"]: fact["attempts"] for fact in job_facts(queue.store)} == {name: 2, permanent: 1}


def test_of_a_group_the_code_that_says_most_counts(queue, tmp_path):
    name = add(queue, tmp_path, "a", mesh={"latent": 2})
    service = make(queue, ("cpu0", "cpu1"))
    for codes in ((service_module.STOPPED, -9), (service_module.STOPPED, 0)):
        service.turn()
        for process, code in zip(service.attempts[0].processes, codes, strict=True):
            process.code = code
        service._reap()
    (fact,) = job_facts(queue.store)
    assert (fact["state"], fact["attempts"], fact["failed_attempts"]) == ("waiting", 2, 1)
    assert fact["cause"].endswith("(signal 9)")
    service.turn()
    one, other = service.attempts[0].processes
    one.code, other.code = 1, service_module.PERMANENT
    assert service.turn() is False
    assert {fact["job"]: fact["state"] for fact in job_facts(queue.store)} == {name: "failed"}


@pytest.mark.parametrize("killed_is_seen_first", [False, True])
def test_the_cause_is_the_rank_that_was_killed_not_the_one_that_missed_it(
    queue, tmp_path, killed_is_seen_first
):
    name = add(queue, tmp_path, "a", mesh={"latent": 2})
    service = make(queue, ("cpu0", "cpu1"))
    service.turn()
    one, other = service.attempts[0].processes
    other.code = -9
    if killed_is_seen_first:
        service._reap()
        assert one.signals == [signal.SIGTERM]
    one.code = 1
    service._reap()
    (fact,) = job_facts(queue.store)
    assert (fact["job"], fact["state"], fact["cause"]) == (name, "waiting", "the cause (signal 9)")


def test_a_rank_killed_while_the_service_looks_at_the_others_is_the_cause(queue, tmp_path):
    add(queue, tmp_path, "a", mesh={"latent": 2})
    service = make(queue, ("cpu0", "cpu1"))
    service.turn()
    one, other = service.attempts[0].processes

    class DiesAfterItWasAsked(FakeWorker):
        """It runs when it is asked; before the next one is asked, it is killed, and the other misses it."""

        def poll(self):
            before, self.code, other.code = self.code, -9, 1
            return before

    one.__class__ = DiesAfterItWasAsked
    service._reap()
    (fact,) = job_facts(queue.store)
    assert fact["cause"] == "the cause (signal 9)"


@pytest.mark.parametrize("code", [1, -6])
def test_a_rank_that_falls_with_another_does_not_hide_why(queue, tmp_path, code):
    add(queue, tmp_path, "a", mesh={"latent": 2})
    service = make(queue, ("cpu0", "cpu1"))
    service.turn()
    one, other = service.attempts[0].processes
    other.code = 3
    service._reap()
    one.code = code
    service._reap()
    (fact,) = job_facts(queue.store)
    assert fact["cause"] == "the cause (exit code 3)"


def test_a_job_without_a_harvest_holds_no_device_and_no_other_job(queue, tmp_path, told):
    add(queue, tmp_path, "a", follow=True)
    name = add(queue, tmp_path, "b")
    service = make(queue)
    assert service.turn()
    assert [attempt.job.name for attempt in service.attempts] == [name]
    assert any("waits for its harvest" in line for line in told)


def test_a_job_whose_folder_is_out_of_reach_is_left_to_its_worker_and_stops_no_other(queue, tmp_path):
    names = [add(queue, tmp_path, "a", out="gs://nowhere/run"), add(queue, tmp_path, "b")]
    service = make(queue, ("cpu0", "cpu1"))
    assert service.turn()
    assert [attempt.job.name for attempt in service.attempts] == names
    assert [fact["state"] for fact in job_facts(queue.store)] == ["running", "running"]
    assert 'winnow_jobs{state="running"} 2' in generate_latest(service_registry(service)).decode()


def test_first_come_first_served_on_the_devices_there_are(queue, tmp_path):
    names = [add(queue, tmp_path, name) for name in "abc"]
    service = make(queue, ("cpu0", "cpu1"))
    service.turn()
    assert [(a.job.name, a.slots) for a in service.attempts] == [(names[0], ["cpu0"]), (names[1], ["cpu1"])]
    service.attempts[0].processes[0].code = 0
    service.turn()
    assert [a.job.name for a in service.attempts] == names[1:]
    other = make(queue)
    other.turn()
    assert not other.attempts, "every job is claimed"


def test_a_lease_that_is_not_renewed_is_taken_over_after_its_time(queue, tmp_path, monkeypatch):
    name = add(queue, tmp_path, "a")
    (job,) = queue.jobs()
    assert queue.claim(job, "elsewhere", "another machine", 1) == 0
    service = make(queue)
    clock = [1000.0]
    monkeypatch.setattr(service_module.time, "monotonic", lambda: clock[0])
    service.turn()
    clock[0] += service_module.LEASE_SECONDS - 1
    queue.beat(name, 0, service_module.JobBeat(service="elsewhere", beat=1))
    service.turn()
    clock[0] += service_module.LEASE_SECONDS - 1
    assert service.turn()
    assert not service.attempts, "it showed life in between"
    clock[0] += 2
    service.turn()
    assert [a.number for a in service.attempts] == [1]
    assert queue.was_ended(name, 0)


def test_a_claim_of_a_dead_process_here_is_taken_over_at_once(queue, tmp_path):
    add(queue, tmp_path, "a")
    (job,) = queue.jobs()
    queue.claim(job, "before", machine_id(), 2**22 + 1)
    service = make(queue)
    service.turn()
    assert [a.number for a in service.attempts] == [1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("all", 0, 2), ["cpu0", "cpu1"]),
        (("none", 4, 1), ["cpu0"]),
        (("all", 2, 1), ["0", "1"]),
        (("1", 2, 1), ["1"]),
    ],
)
def test_devices(arguments, expected):
    assert slots(*arguments) == expected


@pytest.mark.parametrize("gpus", ["2", "0,0", "x"])
def test_a_gpu_that_is_not_there_is_refused(gpus):
    with pytest.raises(ConfigError, match="--gpus"):
        slots(gpus, 2, 1)
