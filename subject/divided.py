"""A subject divided over processes of this machine, by transformers' `tp_plan`.

The leader is the process that harvests: it alone reads tokens and writes rows. It starts the followers, which
run every pass with it, because each holds a share of every matrix, and drop what they read.

Of each pass the leader sends the windows' shape, int64 [2], and their ids, int64 [W, T]; the shape 0, 0 ends.
Letters: W windows, T positions, D width of the activation at a hook.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from winnow.schemas.errors import ConfigError, WorkerError
from winnow.schemas.harvest import PlanSpec
from winnow.schemas.subject import SubjectSpec, reads_stream
from winnow.subject.load import Subject

# A follower waits while the leader waits for storage. A process that dies is noticed at once all the same, by
# its closed connection.
_SILENCE = datetime.timedelta(days=1)
_END_SECONDS = 10.0
"""How long followers may take to end before they are killed."""


def check_divisible(spec: SubjectSpec, plan: PlanSpec, model: Any) -> None:
    """Check that a subject can be divided, and that what a plan reads is whole in every process.

    Args:
        spec: Its `tensor_parallel` is read.
        plan: What will be harvested.
        model: The transformers model; an outline without weights is enough.

    Raises:
        ConfigError: transformers has no plan for the architecture, heads cannot be divided, a hook is not in
            the residual stream's width, or the spec names another way to run as well.
    """
    number = spec.tensor_parallel
    if number == 1:
        return
    if spec.device_map is not None or spec.engine != "transformers":
        raise ConfigError(
            "subject.tensor_parallel with subject.device_map or another subject.engine",
            expected="one of them",
            fix="Leave the others out",
        )
    config = model.config.get_text_config()
    if not model._tp_plan:
        raise ConfigError(
            f"subject.tensor_parallel: transformers has no tp_plan for {config.model_type!r}",
            expected="an architecture whose matrices it can divide",
            fix="Divide the subject by layers: subject.device_map",
        )
    heads = [int(config.num_attention_heads), int(getattr(config, "num_key_value_heads", 0) or 0)]
    if any(count % number for count in heads):
        raise ConfigError(
            f"subject.tensor_parallel: the heads of {config.model_type!r} cannot be divided by {number}",
            expected="a divisor of both numbers",
            got=f"{heads[0]} heads, {heads[1] or heads[0]} of keys and values",
        )
    for hook in plan.hooks:
        if not reads_stream(hook):
            raise ConfigError(
                f"hook {hook!r}: with subject.tensor_parallel each process may have only a part of it",
                expected="a site as wide as the residual stream",
                fix="Divide the subject by layers: subject.device_map",
            )
    refuse_documents(plan)


def refuse_documents(plan: PlanSpec) -> None:
    """ConfigError if attention is to stay inside documents."""
    if plan.attend == "document":
        raise ConfigError(
            "subject.tensor_parallel with plan.attend: document has not been tried",
            expected="plan.attend: window",
            fix="Divide the subject by layers: subject.device_map",
        )


class DividedSubject:
    """The leader of a divided subject; starts the followers and loads its own share.

    Args:
        spec: The subject, with `tensor_parallel` of 2 or more.
        hooks: What will be read.
        threads: CPU threads of each process.

    Attributes:
        subject: The leader's share. Only `activations` of this class may run it.
        device: The leader's device.

    Raises:
        ConfigError: There are fewer GPUs than processes, this process is one of a group already, or the
            subject cannot be loaded.
    """

    def __init__(self, spec: SubjectSpec, hooks: Sequence[str], threads: int) -> None:
        _check_devices(spec)
        self._hooks, self._followers = tuple(hooks), list[subprocess.Popen[bytes]]()
        self._open = True
        with tempfile.TemporaryDirectory(prefix="winnow-divided-") as folder:
            meet = str(Path(folder) / "meet")
            for rank in range(1, spec.tensor_parallel):
                self._start(rank, meet, spec, threads)
            atexit.register(self.close)
            try:
                self._await_start()
                self.subject = _share(0, meet, spec, self._hooks)
                dist.barrier()  # the folder is needed until all have met
            except BaseException:
                self._kill()
                raise
        self.device = self.subject.device

    def activations(
        self, token_ids: Any, hooks: Sequence[str], *, positions: Any = None
    ) -> dict[str, Tensor]:
        """Read activations in all processes; see `Subject.activations`.

        Returns:
            hook -> [W, T, D], in the LM's dtype on the leader's device.

        Raises:
            ConfigError: The tokens are wrong.
            ValueError: Other hooks than at the start, or positions.
            WorkerError: A process failed, also of an earlier pass; the others are ended.
        """
        if tuple(hooks) != self._hooks or positions is not None:
            raise ValueError("a divided subject reads the hooks that it was made for, without positions")
        ids = self.subject.ids(token_ids)  # before the others begin: an error here is the caller's alone
        if not self._open:
            raise WorkerError("the processes of the divided subject have ended", fix="Run the command again")
        try:
            dist.broadcast(torch.tensor(ids.shape), 0)
            dist.broadcast(ids.cpu(), 0)
            return self.subject.activations(ids, hooks)
        # The others are in the middle of the pass, and would take the next one for the rest of it.
        except RuntimeError as error:
            ended = [one.poll() for one in self._followers]
            self._kill()
            raise WorkerError(
                "a pass of the divided subject failed",
                got=f"{str(error).strip().splitlines()[0][:200]}; exit codes of the other processes: {ended}",
                fix="If memory ran out, lower harvest.batch_windows",
            ) from error

    def close(self) -> None:
        """End the other processes."""
        if not self._open:
            return
        with contextlib.suppress(RuntimeError):  # one may be gone already
            dist.broadcast(torch.zeros(2, dtype=torch.int64), 0)
        for follower in self._followers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                follower.wait(_END_SECONDS)
        self._kill()

    def _start(self, rank: int, meet: str, spec: SubjectSpec, threads: int) -> None:
        told = {"rank": rank, "meet": meet, "hooks": self._hooks, "threads": threads}
        command = [sys.executable, "-m", "winnow.subject.divided"]
        # transformers binds the GPU of this number.
        # In a session of its own, since Ctrl-C is for the leader, which finishes what has begun.
        follower = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"LOCAL_RANK": str(rank)},
            start_new_session=True,
        )
        self._followers.append(follower)
        with cast(IO[bytes], follower.stdin) as pipe:
            pipe.write(json.dumps(told | {"spec": spec.model_dump(mode="json")}).encode())

    def _await_start(self) -> None:
        # Meeting has no other way to learn of a process that never came than its timeout.
        for follower in self._followers:
            if not cast(IO[bytes], follower.stdout).read(1):
                raise WorkerError(
                    "a process of the divided subject ended at its start", got=f"exit code {follower.wait()}"
                )

    def _kill(self) -> None:
        self._open = False
        atexit.unregister(self.close)
        for follower in self._followers:
            follower.kill()
            follower.wait()
            cast(IO[bytes], follower.stdout).close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _check_devices(spec: SubjectSpec) -> None:
    if dist.is_initialized():
        raise ConfigError("subject.tensor_parallel in a process that is one of a group already")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count and (spec.device != "auto" or count < spec.tensor_parallel):
        raise ConfigError(
            "subject.tensor_parallel",
            expected=f"{spec.tensor_parallel} GPUs that this process sees, and subject.device: auto",
            got=f"{count} GPUs, subject.device: {spec.device}",
            fix="Set harvest.gpus_per_actor to the number of processes",
        )


def _share(rank: int, meet: str, spec: SubjectSpec, hooks: Sequence[str]) -> Subject:
    """This process's share of the subject, once all have met at the file `meet`."""
    gpus = torch.cuda.is_available()
    if gpus:
        # Before the group exists: otherwise NCCL would take GPU 0 for every rank.
        torch.cuda.set_device(rank)
        spec = spec.model_copy(update={"device": f"cuda:{rank}"})
    store = dist.FileStore(meet, spec.tensor_parallel)  # pyright: ignore[reportPrivateImportUsage]
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=spec.tensor_parallel, timeout=_SILENCE
    )
    subject = Subject.load(spec, until=hooks, divided=True)
    # Its pass of two tokens, too, is one of all processes.
    subject.sites(hooks)
    return subject


def _follow(rank: int, meet: str, spec: SubjectSpec, hooks: Sequence[str]) -> None:
    """Run every pass of the leader until it ends."""
    subject = _share(rank, meet, spec, hooks)
    dist.barrier()
    while True:
        shape = torch.zeros(2, dtype=torch.int64)
        dist.broadcast(shape, 0)
        if not shape.any():
            return
        ids = torch.zeros(*shape.tolist(), dtype=torch.int64)
        dist.broadcast(ids, 0)
        subject.activations(ids, hooks)


def main() -> None:
    """Be a follower: what to do is JSON on standard input."""
    told: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(told["threads"])
    spec = SubjectSpec.model_validate(told["spec"])
    try:
        print(".", end="", flush=True)
        _follow(told["rank"], told["meet"], spec, told["hooks"])
        dist.destroy_process_group()
    except Exception as error:
        # The leader has an error of its own, with the cause or with this exit code; a page of traces from
        # each process would bury it.
        print(f"winnow: process {told['rank']} of the divided subject: {error}"[:300], file=sys.stderr)
        os._exit(1)


if __name__ == "__main__":
    main()
