"""Does clamping a latent make the subject say what the latent promotes?

A latent is chosen by its index page alone: among those that fire on 0.1 to 5 % of tokens, the one whose
promoted tokens have most words in common with the tokens it fires on (so that they explain it); the highest
`enc_dec_cosine` decides between equals. Held-out windows are run three ways: clean, with the latent clamped
to a multiple of its largest activation at every position that is read, and with a steer of strength zero.

- `raise_nats`: rise of the mean log-probability of the latent's promoted tokens over all positions, averaged
  over windows, with a 95 % bootstrap interval over windows.
- `random_nats`: the same rise for as many random tokens of the vocabulary, fixed by the seed.
- `zero_is_identical`: whether `add` of 0 and `scale` by 1 leave every logit bit-identical.

    python -m benchmarks.steering runs/quickstart --root data/quickstart --page docs/results/steering.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.report import write_report
from explorer.subjects import LazySubject
from explorer.table import FeatureTable
from harvester.generate import Steer, steered
from harvester.subject import Subject
from store import ActivationStore
from trainer.sae import Sae

PROMOTED = 8
"""Promoted tokens whose log-probability is looked at."""
DENSITY = (1e-3, 5e-2)
BOOTSTRAPS = 10_000


def choose_latent(table: FeatureTable) -> int:
    """The latent whose promoted tokens most resemble the tokens it fires on; see the module's docstring."""
    density, cosine = table.density(), table.column("enc_dec_cosine")
    promoted, fires = (table.summary.column(name).to_pylist() for name in ("promoted", "token_ids"))

    def words(ids: list[int]) -> set[str]:
        return {table.texts[number].strip().lower() for number in ids} - {""}

    best: tuple[float, float, int] = (-1.0, -1.0, 0)
    for number in range(table.meta.latents):
        if DENSITY[0] <= density[number] <= DENSITY[1]:
            shared = len(words(promoted[number]) & words(fires[number]))
            best = max(best, (float(shared), float(cosine[number]), number))
    return best[2]


def log_probabilities(subject: Subject, tokens: NDArray[Any], steers: list[Steer], hook: str) -> Tensor:
    """float32 [T, V] log-probabilities of one window [T], steered."""
    replace = {hook: steered(steers, len(tokens))} if steers else None
    return subject.logits(tokens[None].astype(np.int64), replace)[0].float().log_softmax(1)


def measure(
    sae_uri: str, root: str, index: str | None, windows: int, multiple: float, seed: int
) -> dict[str, Any]:
    """Figures of one latent on held-out windows."""
    table = FeatureTable.open(index or f"{sae_uri.rstrip('/')}/features")
    dataset, sae, meta = ActivationStore.open(root), Sae.load(sae_uri), table.meta
    subject = LazySubject(None, meta.subject).whole()
    latent = choose_latent(table)
    row = table.latent(latent)
    strength = multiple * row["largest"]
    targets = torch.tensor(row["promoted_ids"][:PROMOTED])
    draw = np.random.default_rng(seed)
    others = torch.from_numpy(draw.choice(meta.subject.vocabulary, PROMOTED, replace=False))
    clamp = [Steer(sae, latent, "clamp", strength, skip=meta.drop_leading)]
    nothing = [
        Steer(sae, latent, "add", 0.0, skip=meta.drop_leading),
        Steer(sae, latent, "scale", 1.0, skip=meta.drop_leading),
    ]
    held_out = len(dataset.plan.split_units("validation")) * dataset.plan.spec.windows_per_unit
    rises: list[float] = []
    random: list[float] = []
    identical = True
    for window in range(min(windows, held_out)):
        tokens = dataset.tokens(window)
        clean = log_probabilities(subject, tokens, [], meta.hook)
        moved = log_probabilities(subject, tokens, clamp, meta.hook)
        change = (moved - clean)[meta.drop_leading :]
        rises.append(change[:, targets].mean().item())
        random.append(change[:, others].mean().item())
        identical &= torch.equal(clean, log_probabilities(subject, tokens, nothing, meta.hook))
    return {
        "sae": sae_uri.rstrip("/").rsplit("/", 1)[-1],
        "hook": meta.hook,
        "latent": latent,
        "fires_on": [table.texts[number] for number in row["token_ids"]],
        "promoted": [table.texts[number] for number in targets.tolist()],
        "largest": row["largest"],
        "strength": strength,
        "windows": len(rises),
        "raise_nats": interval(np.asarray(rises), seed),
        "random_nats": interval(np.asarray(random), seed),
        "zero_is_identical": identical,
        "seed": seed,
    }


def interval(values: NDArray[np.float64], seed: int) -> dict[str, float]:
    """Mean and its 95 % bootstrap interval over windows."""
    draws = np.random.default_rng(seed).integers(0, len(values), (BOOTSTRAPS, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def page(report: dict[str, Any]) -> str:
    """The result as a page of the documentation."""

    def shown(name: str) -> str:
        each = report[name]
        return f"{each['mean']:+.3f} ({each['low']:+.3f} to {each['high']:+.3f})"

    def code(tokens: list[str]) -> str:
        return " ".join(f"`{json.dumps(token, ensure_ascii=False)[1:-1]}`" for token in tokens)

    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return f"""# Steering: a latent says what it promotes

Written by `python -m benchmarks.steering`; its docstring says how the latent is chosen and what is measured.

Latent {report["latent"]} of `{report["sae"]}` at `{report["hook"]}` was chosen by its index page alone.
It fires on {code(report["fires_on"][:6])}
and promotes {code(report["promoted"])}.

{report["windows"]} held-out windows were run clean and with the latent clamped to {report["strength"]:.3g}
(its largest activation in the dataset is {report["largest"]:.3g}) at every position that is read.

| change of the mean log-probability, nats | mean (95 % bootstrap interval over windows) |
|---|---|
| of its {PROMOTED} promoted tokens | {shown("raise_nats")} |
| of {PROMOTED} random tokens | {shown("random_nats")} |

With strength zero (`add` 0 and `scale` 1) the logits of all windows were
{"bit-identical to" if report["zero_is_identical"] else "NOT identical to"} those of the clean runs.

Made on {report["date"]} with {versions}.
"""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sae", help="a published SAE that is indexed")
    parser.add_argument("--root", required=True, help="its dataset")
    parser.add_argument("--index", help="its index, if not SAE/features")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--multiple", type=float, default=2.0, help="strength over the largest activation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--page", type=Path, help="where to write the page")
    args = parser.parse_args()
    figures = measure(args.sae, args.root, args.index, args.windows, args.multiple, args.seed)
    report = write_report("steering", figures, args.json)
    if args.page is not None:
        args.page.parent.mkdir(parents=True, exist_ok=True)
        args.page.write_text(page(report), encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
