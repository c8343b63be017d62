"""The gates of the one training step: `python -m benchmarks.train_step --routes [--before DIR]`.

- `equal`: in float64, on meshes of 1 x 1, 2 x 1, 1 x 2 and 2 x 2 (data x latent) of gloo processes, every
  variant ends where the specification ends on one process; by both routes, with 1, 2 and 3 micro-batches.
- `bits`: on one process the weights, Adam, averages, counts and reports have the same bits as `DIR`'s.
- `clock`: seconds of a step over those of `DIR`'s, taken in turn, wall-clock and CPU; medians of the rounds.
- `mesh`: seconds of a step on a mesh of 1 x 1 over those of the plain step of the same code.

`DIR` is a checkout of another commit, run by this interpreter with its own code.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import write_report

HERE = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("routes_worker.py")
RANKS = 4
CASES = ("plain", "dead10", "many dead", "batchtopk", "matryoshka", "accumulate 2")
MESHED = ("plain", "dead10", "many dead")
LIMITS = {"clock": 1.03, "mesh": 1.05}


def command(*words: str) -> list[str]:
    """A worker; `-P` keeps this checkout's folders off its path."""
    return [sys.executable, "-P", str(WORKER), *words]


def environment(root: Path) -> dict[str, str]:
    """That of a process which runs a checkout's code on the CPU."""
    return os.environ | {"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}


# ---- equal -----------------------------------------------------------------------------------------


def equal() -> dict[str, Any]:
    """The worst deviation by mesh and case, in units of what is allowed; 1 and more fails."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ranks = []
        for rank in range(RANKS):
            log = stack.enter_context((Path(folder) / f"rank-{rank}").open("w+"))
            words = command("mesh", folder, str(rank))
            ranks.append((subprocess.Popen(words, cwd=HERE, env=environment(HERE), stdout=log), log))
        found: dict[str, float] = {}
        for process, log in ranks:
            if process.wait():
                raise SystemExit(f"a rank ended with {process.returncode}")
            log.seek(0)
            for case, worst in json.loads(log.read()).items():
                found[case] = max(worst, found.get(case, 0.0))
    worst = max(found, key=lambda case: found[case])
    failed = [case for case, deviation in found.items() if not deviation < 1]
    return {"cases": len(found), "worst": {worst: found[worst]}, "failed": failed}


# ---- bits ------------------------------------------------------------------------------------------


def bits(before: Path) -> dict[str, Any]:
    """Which cases end in other bits than `before`'s."""
    told = [
        json.loads(subprocess.run(command("digests"), cwd=root, env=environment(root), **_CAPTURED).stdout)
        for root in (before, HERE)
    ]
    return {"cases": len(told[0]), "failed": [case for case in told[0] if told[0][case] != told[1].get(case)]}


_CAPTURED: Any = {"stdout": subprocess.PIPE, "check": True, "text": True}


# ---- clock and mesh --------------------------------------------------------------------------------


class Clock:
    """A worker that takes a step of a case when asked."""

    def __init__(self, root: Path, size: str, threads: int) -> None:
        words = command("clock", size, str(threads))
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(words, cwd=root, env=environment(root), **pipes)

    def seconds(self, case: str) -> tuple[float, float]:
        """Wall and CPU seconds of one step."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{case}\n")
        stdin.flush()
        wall, cpu = json.loads(stdout.readline())
        return wall, cpu

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def clocks(roots: dict[str, Path], size: str, threads: int) -> Iterator[dict[str, Clock]]:
    """A worker for each checkout, all alive together so that they are asked in turn."""
    opened = {name: Clock(root, size, threads) for name, root in roots.items()}
    try:
        yield opened
    finally:
        for clock in opened.values():
            clock.close()


Ratios = dict[str, list[tuple[float, float]]]
"""By case: the ratios of wall and CPU seconds of every round."""


def ratios(pairs: dict[str, tuple[tuple[Clock, str], tuple[Clock, str]]], rounds: int) -> Ratios:
    """Of each pair, the second's seconds over the first's.

    Who goes first changes from round to round; the first round warms up and is left out.
    """
    taken: Ratios = {name: [] for name in pairs}
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}: {', '.join(pairs)}", file=sys.stderr)
        for name, pair in pairs.items():
            order = (0, 1) if number % 2 else (1, 0)
            seconds = {place: pair[place][0].seconds(pair[place][1]) for place in order}
            if number:
                taken[name].append(tuple(b / a for a, b in zip(seconds[0], seconds[1], strict=True)))  # pyright: ignore[reportArgumentType]
    return taken


def _told(values: list[tuple[float, float]]) -> dict[str, Any]:
    wall, cpu = zip(*values, strict=True)
    quartiles = {
        kind: statistics.quantiles(some, n=4)
        for kind, some in (("wall", wall), ("cpu", cpu))
        if len(some) > 1
    }
    return {"wall": statistics.median(wall), "cpu": statistics.median(cpu), "quartiles": quartiles}


def clocked(
    before: Path | None, size: str, rounds: int, restarts: int, threads: int, cases: list[str]
) -> dict[str, Any]:
    """The gates `clock` (where there is a `before`) and `mesh`, of both codes: medians over all rounds.

    The rounds are spread over several pairs of processes: which pages of memory one happens to get moves its
    steps by some hundredths, for as long as it keeps them.
    """
    roots = {"now": HERE} | ({"before": before} if before else {})
    taken: dict[str, Ratios] = {}
    for _ in range(restarts):
        with clocks(roots, size, threads) as found:
            pairs = {}
            if before:
                pairs["clock"] = {case: ((found["before"], case), (found["now"], case)) for case in cases}
            for name, clock in found.items():
                kind = "mesh" if name == "now" else "mesh_before"
                some = [case for case in MESHED if case in cases]
                pairs[kind] = {case: ((clock, case), (clock, f"mesh {case}")) for case in some}
            for kind, some in pairs.items():
                for case, values in ratios(some, -(-rounds // restarts)).items():
                    taken.setdefault(kind, {}).setdefault(case, []).extend(values)
                print(
                    json.dumps({kind: {c: _told(v)["cpu"] for c, v in taken[kind].items()}}), file=sys.stderr
                )
    return {kind: {case: _told(v) for case, v in found.items()} for kind, found in taken.items()}


# ---- the program -----------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All gates that were asked for, and which of them fail."""
    result: dict[str, Any] = {}
    failed: list[str] = []
    for gate in args.gates:
        if gate == "equal":
            result[gate] = equal()
            failed += result[gate]["failed"]
        elif gate == "bits" and args.before:
            result[gate] = bits(args.before)
            failed += result[gate]["failed"]
        elif gate == "clock":
            for size in args.sizes:
                result[size] = clocked(
                    args.before, size, args.rounds, args.restarts, args.threads, args.cases
                )
                for kind, limit in LIMITS.items():
                    for case, told in result[size].get(kind, {}).items():
                        if told["cpu"] > limit:
                            failed.append(f"{size}: {kind}, {case}: {told['cpu']:.3f} times the CPU time")
    return result | {"rounds": args.rounds, "threads": args.threads, "failed": failed}


def main(words: list[str]) -> None:
    """Measure, print, write; fails where a gate does."""
    parser = argparse.ArgumentParser(
        "benchmarks.train_step --routes", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--restarts", type=int, default=3, help="pairs of processes the rounds are taken in")
    parser.add_argument("--threads", type=int, default=2, help="of a step; 1 where the machine is shared")
    parser.add_argument("--sizes", nargs="+", default=["full", "quickstart"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--gates", nargs="+", choices=["equal", "bits", "clock"], default=["equal", "bits", "clock"]
    )
    args = parser.parse_args(words)
    args.before = args.before.resolve() if args.before else None
    result = measure(args)
    print(json.dumps(write_report("routes", result, args.json), indent=1))
    if result["failed"]:
        raise SystemExit(f"{len(result['failed'])} gates fail")
