"""What does it cost to start? `python -m benchmarks.startup --json OUT`.

CPU time (user and system) of small programs in processes of their own, as ratios to `python -c pass` of the
same round: imports are nearly all of it, and other work on the machine moves it less than wall-clock time.
The programs take turns, and a figure is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import write_report

FLOOR = "python -c pass"
WINNOW = str(Path(sys.executable).with_name("winnow"))
PROGRAMS = {
    FLOOR: [sys.executable, "-c", "pass"],
    "import winnow": [sys.executable, "-c", "import winnow"],
    "winnow --version": [WINNOW, "--version"],
    "winnow --help": [WINNOW, "--help"],
    "winnow train --help": [WINNOW, "train", "--help"],
    "completion of a command": [WINNOW],
    "winnow info, no dataset there": [WINNOW, "info", "absent"],
}
COMPLETION = {"_WINNOW_COMPLETE": "complete_bash", "COMP_WORDS": "winnow ex", "COMP_CWORD": "1"}


def main() -> None:
    """Parse the command line, measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--rounds", type=int, default=15, help="runs of each program")
    options = parser.parse_args()
    print(json.dumps(write_report("startup", measure(options.rounds), options.json), indent=1))


def measure(rounds: int) -> dict[str, Any]:
    """Run every program `rounds` times, in turn.

    Returns:
        By program: the median `ratio` to the floor of its round, and the median `cpu_s`.
    """
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as folder:
        for name in PROGRAMS:  # byte code is compiled, and files are in the system's cache
            cpu_seconds(name, folder)
        taken = [{name: cpu_seconds(name, folder) for name in PROGRAMS} for _ in range(rounds)]
    return {
        "rounds": rounds,
        "ratio": {
            name: round(statistics.median(each[name] / each[FLOOR] for each in taken), 2) for name in PROGRAMS
        },
        "cpu_s": {name: round(statistics.median(each[name] for each in taken), 4) for name in PROGRAMS},
    }


def cpu_seconds(name: str, folder: str) -> float:
    """CPU seconds of one run of a program, of its user and of the system, started in `folder`."""
    command = PROGRAMS[name]
    environment = os.environ | (COMPLETION if len(command) == 1 else {})
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == (2 if "absent" in command else 0), f"{name}: exit code {process.returncode}"
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
