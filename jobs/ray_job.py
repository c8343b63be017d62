"""Runs a command of Winnow as a job of a Ray cluster: submits, follows its log, returns its exit code."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from winnow.common.config_file import load_config
from winnow.common.figures import brief, human_bytes
from winnow.common.reporter import say
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError, StoreError, WorkerError

log = logging.getLogger("winnow.jobs")

COMMANDS = ("plan", "harvest", "train", "sweep", "verify", "info")
_EXCLUDES = (
    ".git", ".venv", "venv", "/data", "/runs", "/build", "/dist", "__pycache__", "*.egg-info",
    ".pytest_cache", ".ruff_cache", ".hypothesis", ".import_linter_cache", ".env",
)  # fmt: skip
"""Never uploaded with the working folder (patterns as in .gitignore)."""
_AGAIN = "Run the same command again: what is finished is kept"
STOP_SECONDS = 30
"""Time limit for a stopped job to end by itself: a trainer writes a checkpoint."""
# A head that answers may not have an agent yet that starts jobs.
_AGENT_SECONDS = 60
"""Time limit for a starting cluster to accept the job."""
# Seen with two Rays on one machine: the second head's agent cannot listen, and the head answers all the same.
_NO_AGENT = (
    "Look on the head into dashboard_agent.log: its port, 52365 unless `ray start "
    "--dashboard-agent-listen-port` names another, may be in use"
)
# A head that is restarted, or a tunnel that is opened again, takes longer than a few quick tries.
_RECONNECT_SECONDS = 60.0
"""How long a broken log stream is tried again until something arrives."""
# By the names that such variables usually have; a warning against a mistake, no proof of anything.
_SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|API_KEY|PRIVATE", re.IGNORECASE)


@dataclass(frozen=True)
class RayJob:
    """A job before it is submitted."""

    entrypoint: str
    working_dir: Path
    env_vars: dict[str, str] = field(default_factory=dict)
    cpus: float = 0
    gpus: float = 0
    id: str = ""


def entrypoint(command: Sequence[str], working_dir: Path, python: str) -> str:
    """The shell command of the job, checked before anything is uploaded.

    Raises:
        ConfigError: Not a command of Winnow, a config that is wrong or outside `working_dir`, or results
            that would be lost with the job's own folder.
    """
    name, *rest = command
    if name not in COMMANDS:
        raise ConfigError("the command to submit", expected=" or ".join(COMMANDS), got=repr(name))
    # They take a root instead of a config.
    if name in ("verify", "info"):
        return shlex.join([python, "-m", "winnow", name, *rest])
    if not rest or rest[0].startswith("-"):
        raise ConfigError(f"`winnow {name}`", expected="the config right after it", got=shlex.join(rest))
    config, folder = Path(rest[0]).resolve(), working_dir.resolve()
    if not config.is_relative_to(folder):
        raise ConfigError(
            f"config {config} is not in the folder that is uploaded",
            expected=f"a file below {folder}",
            fix="Move it there, or name another --working-dir",
        )
    _require_shared(load_config(config, sets_of(rest[1:])), name)
    # Last, so that it wins: the job runs inside the cluster, whatever address the config has for this
    # machine.
    there = [python, "-m", "winnow", name, config.relative_to(folder).as_posix(), *rest[1:]]
    return shlex.join([*there, "--set", "harvest.ray_address=auto"])


def sets_of(arguments: Sequence[str]) -> list[str]:
    """The values of `--set` among a command's arguments."""
    found = [value.removeprefix("--set=") for value in arguments if value.startswith("--set=")]
    pairs = itertools.pairwise(arguments)
    return found + [value for option, value in pairs if option == "--set"]


def _require_shared(config: Config, command: str) -> None:
    places = {"root": config.root}
    if command == "train" and config.train is not None:
        places["train.out"] = config.train.out
    if command == "sweep" and config.sweep is not None:
        places["sweep.out"] = config.sweep.out
    for name, place in places.items():
        if "://" not in place and not Path(place).is_absolute():
            raise ConfigError(
                f"{name} is a folder beside the code, which is deleted with the job",
                expected="s3://bucket/prefix, or the absolute path of a disk that every node mounts",
                got=place,
                fix=f"--set {name}=s3://BUCKET/PREFIX",
            )


def handed_on(names: Sequence[str], environment: Any) -> dict[str, str]:
    """The named variables with their values, for the job; they are shown on the cluster's dashboard.

    Raises:
        ConfigError: One is not set, or looks like a secret.
    """
    for name in names:
        if _SECRET.search(name):
            raise ConfigError(
                f"--env {name} looks like a secret, and Ray's dashboard shows a job's variables",
                fix="Give the nodes their own credentials: an instance role, or the environment of "
                "`ray start`",
            )
        if name not in environment:
            raise ConfigError(f"--env {name}", expected="a variable of this shell", got="nothing")
    return {name: environment[name] for name in names}


# The cluster


def auth_token(environment: Any) -> str | None:
    """The cluster's token as Ray would find it; None if there is none.

    Raises:
        ConfigError: RAY_AUTH_TOKEN_PATH names no readable file.
    """
    if environment.get("RAY_AUTH_TOKEN"):
        return environment["RAY_AUTH_TOKEN"].strip()
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path(environment.get("HOME") or Path.home()) / ".ray" / "auth_token"
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError as error:
        if named:
            raise ConfigError(
                "RAY_AUTH_TOKEN_PATH", expected="a readable file", got=error.strerror
            ) from error
        return None


def connect(address: str, token: str | None) -> Any:
    """A client of the cluster's job server.

    Raises:
        ConfigError: No such address, or the token is missing or wrong.
        StoreError: The cluster does not answer.
    """
    # No user:password@ in it: the address appears in messages.
    if not re.match(r"https?://[^/@]+/?$", address):
        raise ConfigError(
            "RAY_ADDRESS", expected="the dashboard of a cluster, http://HEAD:8265", got=address or "nothing"
        )
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # A line for every .gitignore that it finds, and one when a log ends.
    sources = (
        "dashboard.modules.dashboard_sdk",
        "dashboard.modules.job.sdk",
        "_private.runtime_env.packaging",
    )
    for name in sources:
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    # Ray prefers them to the argument.
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else None
        return JobSubmissionClient(address.rstrip("/"), headers=headers)
    except AuthenticationError as error:
        raise ConfigError(
            f"the cluster at {address} refuses " + ("this token" if token else "jobs without a token"),
            got="403" if token else "401",
            fix="Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the token the cluster was started with "
            "(`ray get-auth-token` on its head)",
        ) from error
    except (OSError, RuntimeError) as error:
        raise StoreError(
            f"the Ray cluster at {address} does not answer",
            got=brief(str(error), 200),
            fix="Check the address and the dashboard's port (8265 unless it was set), and a tunnel to it",
        ) from error


def run_job(
    client: Any, job: RayJob, *, detach: bool = False, write: Callable[[str], object] | None = None
) -> int:
    """Submit the job, follow its log, and return its exit code.

    Args:
        client: The result of `connect`.
        job: The job.
        detach: Return once it is submitted, and leave it running.
        write: Called with each piece of the log; writes to stdout by default.

    Returns:
        The command's own code; 128 + n if signal n ended it; 143 if somebody stopped the job.

    Raises:
        ConfigError: The folder is too large for Ray, or the cluster refused the job.
        WorkerError: The job never ran, or the cluster is out of reach; the job may still run.
        KeyboardInterrupt: Ctrl-C; the job was stopped, or was left as the message says.
    """
    try:
        _submit(client, job)
        say(f"job {job.id}: {job.entrypoint}")
        if detach:
            sys.stdout.write(job.id + "\n")
            return 0
        asyncio.run(_follow(client, job.id, write or _print))
    # Submission included: the cluster may have the job already while its reply is on the way.
    except KeyboardInterrupt:
        _stop(client, job.id)
        raise
    try:
        details = client.get_job_info(job.id)
    except (RuntimeError, OSError) as error:  # the head ended with the job
        raise _out_of_reach(job.id, error) from error
    code = details.driver_exit_code
    if details.status == "STOPPED":
        say(f"job {job.id} was stopped; the same command resumes it")
        return 143
    if details.status == "SUCCEEDED":
        return 0
    if code is None:  # it never ran: no such Python, no room, a node lost
        raise WorkerError(f"job {job.id} failed", got=brief(details.message or "no message", 400), fix=_AGAIN)
    # As a shell would say it: Ray gives -n for signal n.
    return 128 - code if code < 0 else code


def _submit(client: Any, job: RayJob) -> None:
    # Ray's own list is part of ours; by itself it warns of each folder that it leaves out.
    os.environ.setdefault("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")
    end = time.monotonic() + _AGENT_SECONDS
    while True:
        try:
            client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=job.id,
                runtime_env={
                    "working_dir": str(job.working_dir.resolve()),
                    "excludes": list(_EXCLUDES),
                    "env_vars": job.env_vars,
                },
                entrypoint_num_cpus=job.cpus or None,
                entrypoint_num_gpus=job.gpus or None,
            )
            return
        except (OSError, RuntimeError, ValueError) as error:
            starting = "No available agent" in str(error)  # a head that has not started completely
            if not starting or time.monotonic() > end:
                raise ConfigError(
                    "the cluster did not accept the job",
                    got=brief(str(error), 400),
                    fix=_NO_AGENT if starting else _smaller(job.working_dir),
                ) from error
        time.sleep(1)


def _smaller(folder: Path) -> str:
    """What to do about a folder that is too large to be sent: its largest file is what nobody thought of."""
    largest, size = "", 0
    for place, folders, names in os.walk(folder):
        top = Path(place) == folder
        folders[:] = [name for name in folders if not {name, f"/{name}" if top else name} & set(_EXCLUDES)]
        for path in (Path(place, name) for name in names):
            if path.is_file() and path.stat().st_size > size:
                largest, size = str(path.relative_to(folder)), path.stat().st_size
    found = f" (its largest file is {largest}, {human_bytes(size)})" if largest else ""
    advice = "add to .rayignore what is not needed, or name another --working-dir"
    return f"If the folder is too large{found}, {advice}"


async def _follow(client: Any, job_id: str, write: Callable[[str], object]) -> None:
    """Pass the log to `write` until the job has ended; a broken stream resumes where it broke."""
    import aiohttp

    seen, broken_since = 0, None
    while True:
        # Ray's log server knows no offset and begins from the start each time: skip what was written already.
        at = 0
        try:
            async for text in client.tail_job_logs(job_id):
                new = text[max(0, seen - at) :]
                at += len(text)
                broken_since = None
                if new:
                    write(new)
                    seen = at
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            now = time.monotonic()
            if broken_since is None:
                broken_since = now
                log.warning("the log of job %s broke off; it is tried again", job_id)
            if now - broken_since > _RECONNECT_SECONDS:
                raise _out_of_reach(job_id, error) from error
        try:
            # A stream may also end without an error while the job runs: only the status tells.
            if client.get_job_status(job_id).is_terminal():
                return
        except (RuntimeError, OSError):
            pass  # the next round counts it
        await asyncio.sleep(1)


def _out_of_reach(job_id: str, error: Exception) -> WorkerError:
    return WorkerError(
        f"the cluster cannot be reached, and job {job_id} may still be running",
        got=brief(str(error), 400),
        fix=f"See `ray job status {job_id}` once the cluster answers; if it has lost the job, the same "
        "command resumes",
    )


def _stop(client: Any, job_id: str) -> None:
    """Stop the job and wait for its end; a second Ctrl-C leaves it as it is."""
    try:
        say(f"stopping job {job_id} (Ctrl-C again leaves it as it is)")
        client.stop_job(job_id)
        # Twice the job's own limit, after which Ray kills it.
        end = time.monotonic() + 2 * STOP_SECONDS
        while not client.get_job_status(job_id).is_terminal() and time.monotonic() < end:
            time.sleep(0.5)
        say(f"job {job_id} is {client.get_job_status(job_id).value.lower()}")
    except KeyboardInterrupt:
        say(f"job {job_id} may still be running")
    except (RuntimeError, OSError) as error:
        say(f"job {job_id} could not be stopped and may still be running: {brief(str(error), 400)}")


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
