"""`winnow submit` against a real Ray head with token authentication, and what it refuses beforehand."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.pipeline import pipeline_config
from tests.support.ray_head import Head, ray_head
from winnow.jobs import ray_job
from winnow.schemas.errors import ConfigError, WinnowError, WorkerError

REPO = Path(__file__).parents[2]
CANARY = "canary-7f3a91c2"
CONFIG = "work/config.yaml"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as running:
        yield running


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: the code, a config, a subject, a corpus; and what must not travel."""
    folder = tmp_path_factory.mktemp("project")
    caches = shutil.ignore_patterns("__pycache__")
    # A clone's `winnow/` holds links to its rooms; copied as links, they point into this folder.
    shutil.copytree(REPO / "winnow", folder / "winnow", symlinks=True, ignore=caches)
    for link in (REPO / "winnow").iterdir():
        if link.is_symlink():
            shutil.copytree(link, folder / link.name, ignore=caches)
    # Not beside the rooms, one of which is called `subject` like the pipeline's model.
    out = str(folder / "elsewhere" / "run")
    path = pipeline_config((folder / CONFIG).parent, units=2, train={"epochs": 1, "out": out})
    config = yaml.safe_load(path.read_text())
    config["root"] = str(folder / "elsewhere" / "data")
    path.write_text(yaml.safe_dump(config))
    (folder / ".env").write_text(f"AWS_SECRET_ACCESS_KEY={CANARY}")
    (folder / "data").mkdir()
    (folder / "data" / "large").write_text(CANARY)
    return folder


def environment(head: Head) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPO), **head.environment(), "AWS_SECRET_ACCESS_KEY": CANARY}


def test_make_harvest_and_make_train_as_jobs(head, project):
    arguments = [
        f"CONFIG={project / CONFIG}",
        f"RAY_ADDRESS={head.url}",
        f"JOB=--working-dir {project}",
    ]
    for target in ("harvest", "train"):
        result = subprocess.run(
            ["make", target, *arguments, f"BIN={Path(sys.executable).parent}", "-o", "setup"],
            cwd=REPO, env=environment(head), capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
    assert (project / "elsewhere" / "data" / "manifest.json").is_file()
    assert (project / "elsewhere" / "run" / "sae.json").is_file()
    assert "FVU" in result.stdout, "the job's log is shown"
    for path in head.folder.rglob("*"):
        if path.is_file() and not path.is_socket():
            assert CANARY.encode() not in path.read_bytes(), f"{path} holds the submitter's secret"


@pytest.fixture
def client(head: Head, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return ray_job.connect(head.url, head.token)


def test_the_rooms_that_a_clone_links_to_travel_with_it(client, project):
    written: list[str] = []
    code = "import os, winnow.store, winnow.trainer as t; print(os.path.relpath(t.__file__))"
    # `-E`: without PYTHONPATH, which names this repository here.
    line = shlex.join([sys.executable, "-E", "-c", code])
    assert (
        ray_job.run_job(client, ray_job.RayJob(line, project, id="winnow-rooms"), write=written.append) == 0
    )
    assert "winnow/trainer/__init__.py" in "".join(written).split()


@pytest.mark.parametrize(("line", "code"), [("echo out; exit 7", 7), ("kill -9 $$", 137)])
def test_the_exit_code_is_the_commands(client, tmp_path, line, code):
    written: list[str] = []
    job = ray_job.RayJob(f"sh -c {shlex.quote(line)}", tmp_path, id=f"winnow-exit-{code}")
    assert ray_job.run_job(client, job, write=written.append) == code
    assert ("out" in "".join(written)) == (code == 7)


@pytest.fixture
def ctrl_c_works():
    """SIGINT raises KeyboardInterrupt, also where the tests were started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_works")
def test_ctrl_c_stops_the_job_and_a_detached_one_runs_on(client, tmp_path, capsys):
    job = ray_job.RayJob("sh -c 'echo up; sleep 600'", tmp_path, id="winnow-stopped")

    def interrupt(text: str) -> None:
        if "up" in text:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        ray_job.run_job(client, job, write=interrupt)
    assert client.get_job_status(job.id) == "STOPPED"
    detached = ray_job.RayJob("sh -c 'sleep 600'", tmp_path, id="winnow-detached")
    assert ray_job.run_job(client, detached, detach=True) == 0
    assert capsys.readouterr().out == "winnow-detached\n"
    assert not client.get_job_status(detached.id).is_terminal()
    client.stop_job(detached.id)


@pytest.mark.parametrize(("token", "code"), [("", "401"), ("0" * 64, "403")])
def test_a_missing_or_wrong_token_is_said_in_words(head, token, code):
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN") as caught:
        ray_job.connect(head.url, token or None)
    assert code in str(caught.value)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["dance"], "harvest"),
        (["harvest"], "the config right after it"),
        (["harvest", "--set", "a=b"], "the config right after it"),
        (["harvest", "{outside}"], "--working-dir"),
        (["harvest", "{config}", "--set", "root=data/here"], "s3://"),
        (["train", "{config}", "--set=train.out=runs/x"], "train.out"),
        (["harvest", "{config}", "--set", "harvest.actors=0"], "actors"),
    ],
)
def test_what_would_fail_there_is_refused_here(project, tmp_path, command, words):
    outside = tmp_path / "config.yaml"
    outside.write_text("root: s3://bucket/x")
    places = {"{outside}": str(outside), "{config}": str(project / CONFIG)}
    with pytest.raises(WinnowError, match=words):
        ray_job.entrypoint([places.get(word, word) for word in command], project, "python")


def test_the_command_that_runs_there(project):
    line = ray_job.entrypoint(
        ["train", str(project / CONFIG), "--set", "train.k=8", "--json"], project, "python3.11"
    )
    assert (
        line
        == "python3.11 -m winnow train work/config.yaml --set train.k=8 --json --set harvest.ray_address=auto"
    )


def test_secrets_are_not_handed_on_and_addresses_are_checked():
    there = {"AWS_REGION": "x", "AWS_SECRET_ACCESS_KEY": CANARY, "HF_TOKEN": CANARY}
    assert ray_job.handed_on(["AWS_REGION"], there) == {"AWS_REGION": "x"}
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "NOWHERE"):
        with pytest.raises(ConfigError) as caught:
            ray_job.handed_on([name], there)
        assert CANARY not in str(caught.value)
    for address in ("", "auto", "head:6379", "ray://head:10001", "http://user:secret@head:8265"):
        with pytest.raises(ConfigError, match="8265"):
            ray_job.connect(address, None)


def test_the_token_is_found_where_ray_finds_it(tmp_path):
    assert ray_job.auth_token({"HOME": str(tmp_path)}) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from-home\n")
    assert ray_job.auth_token({"HOME": str(tmp_path)}) == "from-home"
    named = tmp_path / "token"
    named.write_text("named\n")
    assert ray_job.auth_token({"RAY_AUTH_TOKEN_PATH": str(named)}) == "named"
    assert ray_job.auth_token({"RAY_AUTH_TOKEN": "given", "RAY_AUTH_TOKEN_PATH": str(named)}) == "given"
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH"):
        ray_job.auth_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "gone")})


class Flaky:
    """A client whose log stream breaks twice, in the middle of the text."""

    def __init__(self) -> None:
        self.tails = 0

    async def tail_job_logs(self, job_id):
        self.tails += 1
        yield "one\n"
        if self.tails == 1:
            raise RuntimeError("WebSocket connection closed unexpectedly")
        yield "two\nthr"
        if self.tails == 2:
            raise OSError("reset")
        yield "ee\n"

    def get_job_status(self, job_id):
        class Status(str):
            def is_terminal(self) -> bool:
                return self == "SUCCEEDED"

        return Status("SUCCEEDED" if self.tails == 3 else "RUNNING")


@pytest.fixture
def clock(monkeypatch):
    """The follower's clock, which moves only while it sleeps."""
    now = [0.0]

    async def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(ray_job.asyncio, "sleep", sleep)
    monkeypatch.setattr(ray_job.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.usefixtures("clock")
def test_a_broken_log_stream_is_taken_up_where_it_broke():
    written: list[str] = []
    asyncio.run(ray_job._follow(Flaky(), "job", written.append))
    assert "".join(written) == "one\ntwo\nthree\n"
    assert json.dumps(written).count("one") == 1


class Gone(Flaky):
    """A client whose cluster is away from the first try until the clock is at `back`."""

    def __init__(self, clock: list[float], back: float) -> None:
        super().__init__()
        self.clock, self.back, self.asked = clock, back, False

    def submit_job(self, **facts):
        self.asked = True

    async def tail_job_logs(self, job_id):
        if self.clock[0] < self.back:
            raise ConnectionError("refused")
        self.tails = 3
        yield "one\n"

    def get_job_status(self, job_id):
        if self.clock[0] < self.back:
            raise RuntimeError("refused")
        return super().get_job_status(job_id)

    def get_job_info(self, job_id):
        raise ConnectionError("the head ended with the job")


def test_a_head_that_is_away_for_a_while_is_waited_for_and_one_that_stays_away_is_not(clock):
    written: list[str] = []
    asyncio.run(ray_job._follow(Gone(clock, 50), "job", written.append))
    assert written == ["one\n"]
    began = clock[0]
    with pytest.raises(WorkerError, match="may still be running"):
        asyncio.run(ray_job._follow(Gone(clock, float("inf")), "job", written.append))
    assert clock[0] - began < 100


def test_a_head_that_ends_with_the_job_is_said_in_words(clock, tmp_path):
    client = Gone(clock, 0)
    with pytest.raises(WorkerError, match="ray job status winnow-x"):
        ray_job.run_job(client, ray_job.RayJob("true", tmp_path, id="winnow-x"), write=len)
    assert client.asked


def test_a_head_without_an_agent_is_not_blamed_on_the_folder(monkeypatch, tmp_path):
    class Client:
        def submit_job(self, **facts):
            raise RuntimeError("No available agent to submit job, please try again later.")

    monkeypatch.setattr(ray_job, "_AGENT_SECONDS", -1)
    with pytest.raises(ConfigError, match="agent-listen-port"):
        ray_job.run_job(Client(), ray_job.RayJob("true", tmp_path, id="winnow-x"))


def test_a_folder_that_is_too_large_is_refused_with_its_largest_file(tmp_path):
    class Client:
        def submit_job(self, **facts):
            assert os.environ["RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES"] == ""
            assert {".git", ".venv", "venv", "__pycache__"} <= set(facts["runtime_env"]["excludes"])
            raise RuntimeError("Request failed with status code 413: Maximum request body size 1 exceeded.")

    for name, size in (("run.yaml", 9), ("models/a.safetensors", 3000), ("data/x", 9000), (".venv/x", 9000)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    with pytest.raises(ConfigError) as caught:
        ray_job.run_job(Client(), ray_job.RayJob("true", tmp_path, id="winnow-x"))
    said = str(caught.value)
    assert (
        "size 1 exceeded. If the folder is too large (its largest file is models/a.safetensors, 2.9" in said
    )
    assert ".rayignore" in said
