"""Whether planning uses all cores, and how near it is to the tokenizer.

Plans a synthetic corpus (that of `benchmarks.plan_memory`) in processes of their own that may use one core,
or two, and alternately times the bare tokenizer's batch call on the same documents with the same threads,
about 2 million characters a call. A planner tokenises in the tokenizer's own threads, as many as there are
cores, while it reads and packs.

    python -m benchmarks.plan --json OUT --megabytes 20

two_over_one         speed on two cores over that on one; 1.8 is the bar
plan_over_tokenizer  speed of the planner over that of the bare tokenizer, on two cores; 0.85 is the bar
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks import plan_memory
from winnow.harvester.plan.corpus import documents
from winnow.harvester.plan.planner import make_plan
from winnow.harvester.plan.sources import find_files
from winnow.harvester.plan.tokenise import BATCH_CHARS, batches
from winnow.schemas.config import Config
from winnow.store.objects import open_store
from winnow.subject.testing import tokenizer_subject

CORES = (1, 2)
ROUNDS = 3
"""Rounds of all measurements; medians are reported."""
BARE_CHARS = 2**21
"""Characters per call of the bare tokenizer: not the planner's own number, so that the floor stays as it is
when that changes."""


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--megabytes", type=float, default=20.0, help="size of the corpus (10^6 bytes)")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--tokenizer", default="smollm2", help="smollm2 (the quickstart's), or bytes (for tests)"
    )
    parser.add_argument("--folder", default=None, help="where the corpus is written; the system's by default")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "CORES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(Path(options.child[0]), int(options.child[1]))
        return
    from benchmarks.report import write_report

    with tempfile.TemporaryDirectory(prefix="winnow-plan-", dir=options.folder) as folder:
        result = measure(Path(folder), options)
    print(_table(result))
    write_report("plan", result, options.json)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Plan and tokenise with each number of cores, in turns."""
    tokenizer, eos = plan_memory.make_tokenizer(options.tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "eos.json").write_text(str(eos))
    size = plan_memory.write_corpus(folder / "corpus", int(options.megabytes * 1e6), tokenizer)
    runs: dict[int, list[dict[str, Any]]] = {cores: [] for cores in CORES}
    for _ in range(options.rounds):
        for cores in CORES:
            runs[cores].append(_run_child(folder, cores))
    prints = {run["fingerprint"] for each in runs.values() for run in each}
    assert len(prints) == 1, "the plan depends on the number of cores"
    rate = {cores: statistics.median(run["tokens_per_s"] for run in runs[cores]) for cores in CORES}
    bare = {cores: statistics.median(run["tokenizer_tokens_per_s"] for run in runs[cores]) for cores in CORES}
    return {
        "tokenizer": options.tokenizer,
        "corpus_bytes": size,
        "two_over_one": rate[2] / rate[1],
        "tokenizer_two_over_one": bare[2] / bare[1],
        "plan_over_tokenizer": rate[2] / bare[2],
        "tokens_per_s_per_core": {cores: rate[cores] / cores for cores in CORES},
        "peak_mib": max(run["peak_rss_bytes"] for each in runs.values() for run in each) / 2**20,
        "load_average": os.getloadavg()[0],
        "runs": {str(cores): each for cores, each in runs.items()},
    }


def _run_child(folder: Path, cores: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.plan", "--child", str(folder), str(cores)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout)


def _child(folder: Path, cores: int) -> None:
    # By affinity where there is one, so that every thread is bound by it, and in the tokenizer's own threads.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    subject = tokenizer_subject(tokenizer, int((folder / "eos.json").read_text()), None)
    with tempfile.TemporaryDirectory(dir=folder) as root:
        config = _config(folder, root)
        assert config.corpus is not None
        start = time.perf_counter()
        plan = make_plan(config, open_store(config.root), subject=subject)
        seconds = time.perf_counter() - start
        peak = plan_memory.peak_rss()
        small = list(batches(documents(config.corpus, files=find_files(config.corpus))))
        each = max(BARE_CHARS // BATCH_CHARS, 1)
        held = [list(chain.from_iterable(small[at : at + each])) for at in range(0, len(small), each)]
        # Read anew: the planner's has met the corpus's words.
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        start = time.perf_counter()
        for batch in held:
            tokenizer.encode_batch_fast(list(map(str, batch)), add_special_tokens=False)
        bare = time.perf_counter() - start
    tokens = plan.corpus_facts.tokens
    result = {
        "tokens_per_s": tokens / seconds,
        "tokenizer_tokens_per_s": tokens / bare,
        "peak_rss_bytes": peak,
        "fingerprint": plan.tokens_sha256 + (plan.labels.sha256 if plan.labels else ""),
    }
    print(json.dumps(result))


def _config(folder: Path, root: str) -> Config:
    return Config.model_validate(
        {
            "root": root,
            "subject": {"model": "testing/tokenizer-only"},
            "corpus": {"sources": [{"uri": f"{folder}/corpus/*"}], "max_document_chars": 20_000},
            "plan": {"hooks": ["resid_post.1"], "context_length": 128, "windows_per_unit": 256},
            "harvest": {"temp_dir": str(folder)},
        }
    )


def _table(result: dict[str, Any]) -> str:
    per_core = result["tokens_per_s_per_core"]
    return "\n".join(
        [
            f"two cores over one: {result['two_over_one']:.2f} (bar 1.8; the bare tokenizer "
            f"{result['tokenizer_two_over_one']:.2f})",
            f"planner over the bare tokenizer: {result['plan_over_tokenizer']:.2f} (bar 0.85)",
            f"tokens/s per core: {per_core[1]:,.0f} on one, {per_core[2]:,.0f} on two",
            f"peak: {result['peak_mib']:,.0f} MiB; load average {result['load_average']:.1f}",
        ]
    )


if __name__ == "__main__":
    main()
