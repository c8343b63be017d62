"""The queue's logic on a folder and on S3: one winner, nothing twice, nothing lost."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from winnow.cli.main import app
from winnow.jobs.queue import Queue, job_facts, job_rows
from winnow.schemas.base import validate
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError
from winnow.schemas.service import JobBeat
from winnow.store.objects import open_store
from winnow.store.testing import FaultyStore
from winnow.trainer.run.status import ask_to_stop


def config(out, **train) -> Config:
    spec = {"out": str(out), "hook": "h.1", "latents": 64, "k": 4, **train}
    return validate(Config, {"root": "data", "train": spec}, origin="test")


def only(queue: Queue):
    (job,) = queue.jobs()
    return job


def test_a_job_from_submission_to_outcome(root_uri, tmp_path):
    store = open_store(root_uri)
    queue = Queue(store)
    assert queue.jobs() == []
    name, new = queue.submit(config(tmp_path / "a"), max_attempts=2)
    assert new
    assert queue.submit(config(tmp_path / "a"), max_attempts=5) == (name, False)
    job = only(queue)
    assert (job.state, job.world, job.outs, job.job.max_attempts) == ("waiting", 1, [str(tmp_path / "a")], 2)
    assert job.job.config.root.endswith("/data"), "paths mean the same elsewhere"

    with ThreadPoolExecutor(8) as pool:  # eight services want it
        won = list(pool.map(lambda n: Queue(store).claim(job, f"s{n}", "machine", n), range(8)))
    assert [number for number in won if number is not None] == [0]
    assert queue.claim(job, f"s{won.index(0)}", "machine", 1) == 0, (
        "a claim whose reply was lost is still ours"
    )
    assert only(queue).state == "running"
    assert queue.read_beat(name, 0) is None
    queue.beat(name, 0, JobBeat(service="s", beat=3, pids=(7,)))
    beat = queue.read_beat(name, 0)
    assert beat is not None
    assert (beat.beat, beat.pids) == (3, (7,))

    queue.end(name, 0, "released", "killed")
    queue.end(name, 0, "finished", "too late: the first word stands")
    assert queue.was_ended(name, 0)
    job = only(queue)
    assert (job.state, queue.conclude(job)) == ("waiting", None)
    for number in (1, 2):
        assert queue.claim(job, "s", "machine", 1) == number
        queue.end(name, number, "failed", f"cause {number}")
        job = only(queue)
        outcome = queue.conclude(job)
    assert outcome is not None
    assert (outcome.state, outcome.cause) == ("failed", "cause 2")
    assert only(Queue(store)).state == "done"
    (fact,) = job_facts(store)
    assert (fact["state"], fact["attempts"], fact["failed_attempts"]) == ("failed", 3, 2)
    assert job_rows([fact])[0][:3] == [name, "failed", "3 (2 failed)"]
    assert queue.submit(config(tmp_path / "a")) == (name, False), "and is not trained again"


@pytest.mark.parametrize("fault", ["error_before", "error_after", "lost_reply"])
def test_a_reply_that_is_lost_changes_nothing(tmp_path, fault):
    """Each create-only put goes wrong once: it is settled by what stands, and the job takes its course."""
    root = open_store(str(tmp_path / "root"))

    def faulty() -> Queue:
        return Queue(FaultyStore(root, {1: fault}))

    name, new = faulty().submit(config(tmp_path / "a"))
    assert new == (fault == "error_before"), "else it stood already, as far as this call can know"
    job = only(Queue(root))
    assert faulty().claim(job, "ours", "m", 1) == 0
    assert faulty().claim(job, "theirs", "m", 2) is None
    faulty().end(name, 0, "finished", "")
    assert Queue(root).was_ended(name, 0)
    (job,) = Queue(root).jobs()
    queue = Queue(store := FaultyStore(root))
    store.faults[len(job.ends) + 1] = fault  # reads of the ends come before the put
    assert queue.conclude(job).state == "finished"
    assert ("put_new", f"jobs/{name}/outcome.json") in store.calls
    assert Queue(root).outcome(name).state == "finished"


def test_a_failure_that_would_come_again_is_final_and_success_stands(tmp_path):
    queue = Queue(open_store(str(tmp_path / "root")))
    for number in range(2):
        queue.submit(config(tmp_path / str(number)))
    first, second = queue.jobs()
    for job, state in ((first, "failed"), (second, "finished")):
        assert queue.claim(job, "s", "m", 1) == 0
        queue.end(job.name, 0, state, "NaN" if state == "failed" else "")
    first, second = queue.jobs()
    assert queue.conclude(first) is None
    assert queue.conclude(first, permanent=True).cause == "NaN"
    assert queue.conclude(second).state == "finished"
    assert queue.outcome(second.name).state == "finished"


def test_a_stopped_run_shows_and_foreign_objects_are_left_alone(tmp_path):
    store = open_store(str(tmp_path / "root"))
    queue = Queue(store)
    queue.submit(config(tmp_path / "a"))
    store.put("jobs/notes.txt", b"mine")
    store.put(f"jobs/{'0' * 16}/0000.claim.json", b"a claim without a job")
    ask_to_stop(open_store(str(tmp_path / "a")))
    assert [fact["state"] for fact in job_facts(store)] == ["stopped"]


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("root: data\ntrain: {out: runs/a, hook: h.1, latents: 64, k: 4}\n")
    return "run.yaml"


def winnow(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, " ".join(result.output.split())


def test_a_job_that_waits_is_stopped_and_resumed_by_its_run(run_yaml):
    assert winnow("submit", run_yaml, "--to", "queue")[0] == 0
    code, said = winnow("stop", "runs/a")
    assert code == 2
    assert "is no run" in said
    assert "--queue" in said
    code, said = winnow("stop", "runs/b", "--queue", "queue")
    assert code == 2
    assert "expected a job that trains into" in said
    assert winnow("stop", "runs/a/", "--queue", "queue/")[0] == 0
    (fact,) = job_facts(open_store("queue"))
    assert fact["state"] == "stopped"
    assert "and is stopped" in winnow("submit", run_yaml, "--to", "queue")[1]
    assert winnow("resume", "runs/a")[0] == 0
    (fact,) = job_facts(open_store("queue"))
    assert fact["state"] == "waiting"
    assert winnow("resume", "runs/a")[0] == 2


def test_a_job_that_has_failed_is_submitted_again_once_its_folder_is_deleted(run_yaml):
    store = open_store("queue")
    queue = Queue(store)
    name = winnow("submit", run_yaml, "--to", "queue") and only(queue).name
    queue.claim(only(queue), "s", "machine", 1)
    queue.end(name, 0, "failed", "the disk is full")
    queue.conclude(only(queue), permanent=True)
    code, said = winnow("submit", run_yaml, "--to", "queue")
    assert code == 0
    assert f"job {name} of the same config has failed (the disk is full)" in said
    folder = Path("queue/jobs") / name
    assert f"delete {folder} and submit it" in said
    shutil.rmtree(folder)
    assert "is in the queue" in winnow("submit", run_yaml, "--to", "queue")[1]
    job = only(queue)
    assert (job.name, job.state, job.claims) == (name, "waiting", 0)


def test_a_grid_is_one_job_and_a_wrong_one_never_gets_in(tmp_path):
    queue = Queue(open_store(str(tmp_path / "root")))
    base = config(tmp_path / "a").model_dump(mode="json")
    grid = {**base, "sweep": {"out": str(tmp_path / "grid"), "grid": {"k": [2, 4]}}}
    queue.submit(validate(Config, grid, origin="test"))
    assert [out.rsplit("/", 1)[1] for out in only(queue).outs] == ["k-2", "k-4"]
    grid["sweep"]["grid"] = {"k": [65]}
    with pytest.raises(ConfigError, match="at most latents"):
        queue.submit(validate(Config, grid, origin="test"))
    with pytest.raises(ConfigError, match="train"):
        queue.submit(validate(Config, {"root": "data"}, origin="test"))
    assert len(queue.jobs()) == 1


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"mesh": {"latent": 65}}, "at most latents"),
        ({"mesh": {"data": 3}}, "divisor of lanes"),
        ({"mesh": {"latent": 2}, "kernels": "eager"}, "one process"),
    ],
)
def test_a_mesh_that_cannot_be_never_gets_in(tmp_path, train, words):
    queue = Queue(open_store(str(tmp_path / "root")))
    with pytest.raises(ConfigError, match=words):
        queue.submit(config(tmp_path / "a", **train))
    assert queue.jobs() == []
    queue.submit(config(tmp_path / "a", mesh={"data": 2, "latent": 3}))
    assert only(queue).world == 6
