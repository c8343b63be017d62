"""The cost of the explorer: a page at 65,536 latents, and an index over its least work.

    python -m benchmarks.explorer --root data/quickstart --sae runs/quickstart --json OUT

- `page_p95_ms`: 95th percentile of the server time of a feature page in milliseconds, in process (gate,
  routing, one row group, JSON) over random latents of an index of 65,536 latents. Its SAE is random and reads
  the dataset named by --root; making that index is reported as `index_65536`, with the peak memory.
- `index_over_forward_encode`: seconds of the bare subject (up to the hook) and `encode` on some windows, over
  the seconds of `winnow index` on them. Above 1: indexing stored rows is quicker than running the subject.
- `index_over_encode`: `encode` alone over the index, on the same windows.

Seconds are CPU time if torch has one thread, otherwise wall-clock.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from starlette.testclient import TestClient

from benchmarks.report import write_report
from winnow.explorer.index.build import Indexer, open_index_store
from winnow.explorer.index.subjects import LazySubject
from winnow.explorer.place import Place
from winnow.explorer.site.desk import open_desk
from winnow.explorer.site.serve import make_app
from winnow.sae.model import Sae
from winnow.schemas.config import StorageSpec
from winnow.schemas.features import IndexSpec
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.subject.load import Subject

BATCH_WINDOWS = 8


def clock() -> float:
    """CPU seconds of this process if torch has one thread, otherwise wall-clock."""
    # CPU time is not moved by other work on the machine, but counts waiting threads of a pool as work.
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def random_sae(dataset: ActivationStore, hook: str, latents: int, k: int, out: str) -> Sae:
    """Publish an SAE of seeded random unit rows: every latent fires, which is the index's worst case."""
    draw = torch.Generator().manual_seed(0)
    sae = Sae(dataset.d_model(hook), latents, k)
    rows = torch.nn.functional.normalize(torch.randn(latents, sae.d_model, generator=draw))
    sae.fill(sae.tensors() | {"W_enc": rows, "W_dec": rows})
    sae.save(open_store(out), hook=hook)
    return Sae.load(out)


def index(
    sae: Sae, dataset: ActivationStore, root: str, out: str, spec: IndexSpec, subject: LazySubject
) -> float:
    """Seconds that an index takes, without loading models."""
    store, scratch = open_index_store(out, None)
    indexer = Indexer(dataset, root, sae, store, scratch, spec, {"": subject})
    # Loaded before the clock starts; the indexer would load it with the first part.
    if spec.logits:
        subject.whole()
    start = clock()
    indexer.run()
    return clock() - start


def forward_and_encode(
    sae: Sae, dataset: ActivationStore, subject: Subject, units: int
) -> tuple[float, float]:
    """Seconds of (subject and encode, encode alone) on the windows of the first units."""
    hook = sae.card.hook if sae.card else ""
    windows, drop = units * dataset.plan.spec.windows_per_unit, dataset.plan.spec.drop_leading
    whole = encoding = 0.0
    for first in range(0, windows, BATCH_WINDOWS):
        tokens = np.stack(
            [dataset.tokens(window) for window in range(first, min(first + BATCH_WINDOWS, windows))]
        )
        start = clock()
        rows = subject.activations(tokens, [hook])[hook][:, drop:].flatten(0, 1)
        middle = clock()
        with torch.no_grad():
            sae.encode(rows)
        end = clock()
        whole, encoding = whole + end - start, encoding + end - middle
    return whole, encoding


def page_times(sae_uri: str, root: str, requests: int) -> list[float]:
    """Seconds of each of `requests` random feature pages, after one that opens the index."""
    client = TestClient(
        make_app(open_desk([sae_uri], None, Place(root, None, StorageSpec()), 8)), "http://127.0.0.1"
    )
    latents = client.get("/api/site").json()["saes"][0]["latents"]
    # The first request reads footers and fills caches that every later one finds.
    client.get("/api/saes/0/features/0").raise_for_status()
    taken: list[float] = []
    for latent in np.random.default_rng(0).integers(0, latents, requests).tolist():
        start = time.perf_counter()
        reply = client.get(f"/api/saes/0/features/{latent}")
        taken.append(time.perf_counter() - start)
        reply.raise_for_status()
    return taken


def measure(root: str, sae_uri: str, latents: int, k: int, units: int, requests: int) -> dict[str, Any]:
    """All figures; see the module's docstring."""
    dataset, sae = ActivationStore.open(root), Sae.load(sae_uri)
    assert sae.card is not None
    subject = LazySubject(None, dataset.plan.subject)
    units = min(units, dataset.plan.units)
    with tempfile.TemporaryDirectory(prefix="winnow-explorer-") as folder:
        wide = f"{folder}/wide"
        random = random_sae(dataset, sae.card.hook, latents, k, wide)
        seconds = index(random, dataset, root, f"{wide}/features", IndexSpec(units=units), subject)
        # Right after the large index: the process's peak is then its peak, not that of a later part.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        size = sum(path.stat().st_size for path in Path(wide, "features").rglob("*") if path.is_file())
        del random
        pages = page_times(wide, root, requests)
        own = index(sae, dataset, root, f"{folder}/own", IndexSpec(units=units), subject)
    floor, encoding = forward_and_encode(sae, dataset, subject.whole(), units)
    return {
        "page_p95_ms": float(np.quantile(pages, 0.95) * 1e3),
        "page_median_ms": float(np.median(pages) * 1e3),
        "index_over_forward_encode": floor / own,
        "index_over_encode": encoding / own,
        "index_seconds": own,
        f"index_{latents}": {
            "seconds": seconds,
            "peak_bytes": peak,
            "index_bytes": size,
            "latents": latents,
            "k": k,
        },
        "units": units,
        "windows": units * dataset.plan.spec.windows_per_unit,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", default="data/quickstart", help="a dataset")
    parser.add_argument("--sae", default="runs/quickstart", help="an SAE trained on it")
    parser.add_argument("--latents", type=int, default=65_536, help="latents of the random SAE")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--units", type=int, default=8, help="units of the dataset that are indexed")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    figures = measure(args.root, args.sae, args.latents, args.k, args.units, args.requests)
    print(json.dumps(write_report("explorer", figures, args.json), indent=1))


if __name__ == "__main__":
    main()
