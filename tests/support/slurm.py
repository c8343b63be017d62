"""A stand-in for SLURM on one machine: `srun` and `scontrol` on the PATH, and the variables of a job.

`srun` starts the tasks with the variables that SLURM sets for each, notes their process ids, and ends with
the highest exit code; `scontrol` knows the hosts' names, and notes what is requeued. Signals are not their
business: SLURM sends them to the tasks, and so do the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "configs" / "slurm"

_SRUN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
nodes, size = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS"])
tasks = []
for rank in range(size):
    node, local = divmod(rank, size // nodes)
    own = {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}}
    tasks.append(subprocess.Popen(words, env=os.environ | own))
with open(os.path.join({folder!r}, "tasks.part"), "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
os.replace(os.path.join({folder!r}, "tasks.part"), os.path.join({folder!r}, "tasks"))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
_SCONTROL = """#!/bin/sh
case "$1 $2" in
  "show hostnames") printf '127.0.0.1\\n127.0.0.1\\n' ;;
  requeue*) echo "$2" >> {folder}/requeued ;;
  *) echo "scontrol $*: not known to the stand-in" >&2; exit 1 ;;
esac
"""


class Cluster:
    """Jobs of one test.

    Args:
        folder: For the programs, the tasks' ids and the jobs' logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        for name, text in {"srun": _SRUN, "scontrol": _SCONTROL}.items():
            program = folder / name
            program.write_text(text.format(python=sys.executable, folder=str(folder)))
            program.chmod(0o755)
        self._jobs = 0

    def start(
        self, script: str, *words: str, job: int, nodes: int = 1, tasks: int = 1, **more: str
    ) -> subprocess.Popen[bytes]:
        """Run a script of `configs/slurm` as a job; standard output and error go to `log`."""
        self._jobs += 1
        own = {
            "PATH": f"{self.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": str(nodes),
            "SLURM_NTASKS": str(tasks),
            "SLURM_CPUS_PER_TASK": "1",
        }
        (self.folder / "tasks").unlink(missing_ok=True)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                ["bash", str(SCRIPTS / script), *words],
                env=os.environ | own | more,
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                start_new_session=True,  # to be killed as a whole
            )

    @property
    def log(self) -> Path:
        """What all jobs have written."""
        return self.folder / "log"

    @property
    def tasks(self) -> list[int]:
        """Process ids of the tasks that `srun` has started last."""
        return [int(word) for word in (self.folder / "tasks").read_text().split()]

    @property
    def requeued(self) -> list[str]:
        """Ids of the jobs that asked to be requeued."""
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []
