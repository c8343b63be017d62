"""`winnow submit`: run a Winnow command as a job on a Ray cluster, follow its log, exit with its code.

With `--to ROOT` it puts a config into a trainer service's queue instead.
"""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from winnow.cli.console import guard
from winnow.cli.service import submit_config
from winnow.schemas.errors import ConfigError

if TYPE_CHECKING:
    from winnow.jobs.ray_job import RayJob


def register(app: typer.Typer) -> None:
    """Add the command `submit` to `app`."""
    # What follows the command belongs to it, `--set` and `--json` too: they are passed on unread.
    app.command(
        "submit", context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True}
    )(submit_command)


def submit_command(
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="-- COMMAND CONFIG [ARGS] | CONFIG",
            help="Command that `winnow` runs there; with --to, the config to train, and --set KEY=VALUE.",
        ),
    ],
    to: Annotated[
        str, typer.Option(metavar="ROOT", help="Put a config into the queue of `winnow serve-trainer ROOT`.")
    ] = "",
    attempts: Annotated[int, typer.Option(help="With --to: attempts before the job has failed.", min=1)] = 3,
    address: Annotated[
        str, typer.Option(envvar="RAY_ADDRESS", help="The cluster's dashboard, http://HEAD:8265.")
    ] = "",
    working_dir: Annotated[Path, typer.Option(help="Folder to upload; must contain the config.")] = Path(),
    env: Annotated[
        list[str],
        typer.Option(
            metavar="NAME", help="Pass a variable of this shell to the job; no secrets; repeatable."
        ),
    ] = [],  # noqa: B006
    cpus: Annotated[float, typer.Option(help="CPUs for the command itself (not for its actors).", min=0)] = 0,
    gpus: Annotated[float, typer.Option(help="GPUs for the command itself, such as `train`.", min=0)] = 0,
    detach: Annotated[
        bool, typer.Option("--detach", help="Print the job's id and leave it running.")
    ] = False,
    python: Annotated[str, typer.Option(help="The cluster's Python, with Winnow's dependencies.")] = "python",
) -> None:
    """Put a config into a trainer service's queue, or run a Winnow command as a job on a Ray cluster.

    `winnow submit CONFIG --to ROOT` returns at once; `winnow serve-trainer ROOT` trains the job, and `winnow
    runs ROOT` shows it. The same config is the same job, however often it is submitted. With a section
    `sweep` the job is the whole grid.

    Otherwise: run a command on a Ray cluster, print its log, and exit with its code.

    The working folder is uploaded without .git, .venv, data and runs. Ctrl-C stops the job, and the same
    command resumes it; a second Ctrl-C, or a lost terminal, leaves it running.

    Credentials are not sent: the nodes must have their own. The cluster's token is read from
    RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.

    Example: `winnow submit --address http://head:8265 -- harvest run.yaml --set root=s3://bucket/data`
    """
    with guard():
        from winnow.jobs.ray_job import auth_token, connect, run_job

        command, to = _with_to(command, to)
        if to:
            enqueue(command, to, attempts)
            return
        # Checked before the cluster is asked: a wrong config needs no network to be refused.
        job = _make_job(command, working_dir, env, cpus, gpus, python)
        client = connect(address, auth_token(os.environ))
        code = run_job(client, job, detach=detach)
    raise typer.Exit(code)


def _make_job(
    command: Sequence[str], working_dir: Path, env: Sequence[str], cpus: float, gpus: float, python: str
) -> RayJob:
    from winnow.jobs.ray_job import STOP_SECONDS, RayJob, entrypoint, handed_on

    return RayJob(
        entrypoint=entrypoint(command, working_dir, python),
        working_dir=working_dir,
        # Ray (2.60) kills a stopped job after 3 s by default, too soon for a trainer's checkpoint. First, so
        # that --env can set another limit.
        env_vars={"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **handed_on(env, os.environ)},
        cpus=cpus,
        gpus=gpus,
        # Chosen here, not by Ray: Ctrl-C during the submission must know which job to stop.
        id=f"winnow-{command[0]}-{secrets.token_hex(4)}",
    )


def _with_to(command: Sequence[str], to: str) -> tuple[list[str], str]:
    """Remove `--to ROOT` from behind the config, where it is also allowed; return the rest and ROOT."""
    words = list(command)
    # Only behind a config: a command behind `--` has options of its own. A trailing `--to` without a value is
    # left, so that `enqueue` refuses it.
    if not to and words[0].endswith((".yaml", ".yml")) and "--to" in words[:-1]:
        at = words.index("--to")
        to = words[at + 1]
        del words[at : at + 2]
    return words, to


def enqueue(command: Sequence[str], root: str, attempts: int) -> None:
    """Put the config of `CONFIG [--set KEY=VALUE]... [--json]` into the queue below `root`.

    Raises:
        ConfigError: Anything else on the command line, or a config that cannot be trained.
    """
    from winnow.jobs.ray_job import sets_of

    config, *rest = command
    sets = sets_of(rest)
    known = {"--set", "--json", *sets, *(f"--set={value}" for value in sets)}
    # Refused, not ignored: without an option such as `--extend` something else would be trained.
    unknown = [word for word in rest if word not in known]
    if unknown:
        raise ConfigError(
            "`winnow submit --to`", expected="CONFIG [--set KEY=VALUE]...", got=shlex.join(rest)
        )
    submit_config(Path(config), root, sets, attempts, "--json" in rest)
