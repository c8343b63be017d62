"""Whether clamping a latent makes the subject say what the latent promotes.

Candidates come from the index alone: among latents that fire on 0.1 to 5 % of tokens, those whose most
promoted token has the highest logit. On a few *training* windows the promoted tokens of each are compared
with random ones, since a strong clamp flattens the whole distribution and so raises every rare token. Of two
figures, the rise and its excess over that of the random tokens, the smaller one decides: the latent for which
it is largest is selected. All figures are of held-out windows, run three ways: clean, with the latent clamped
to a multiple of its largest activation at every position that is read, and with a steer of strength zero.

- `raise_nats`: rise of the mean log-probability of the latent's promoted tokens over all positions, averaged
  over windows, with a 95 % bootstrap interval over windows.
- `random_nats`: the same rise for random tokens of the vocabulary, fixed by the seed.
- `excess_nats`: the difference of the two, paired by window.
- `zero_is_identical`: whether `add` of 0 and `scale` by 1 leave every logit bit-identical.

    python -m benchmarks.steering runs/quickstart --root data/quickstart --page docs/results/steering.md
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.report import write_report
from winnow.evaluator.bootstrap import mean_figure
from winnow.explorer.index.subjects import LazySubject
from winnow.explorer.index.table import FeatureTable
from winnow.sae.model import Sae
from winnow.store import ActivationStore
from winnow.subject.generate import Op, Steer, steered_hooks
from winnow.subject.load import Subject

PROMOTED = 8
"""Promoted tokens whose log-probability is measured."""
RANDOM = 256
"""Random tokens with which they are compared."""
CHOOSING_WINDOWS = 2
"""Training windows on which the candidates are tried."""
DENSITY = (1e-3, 5e-2)


def candidates(table: FeatureTable, count: int) -> list[int]:
    """The latents whose most promoted token has the highest logit; see the module's docstring."""
    density, peak = table.density(), table.column("logit_peak")
    allowed = np.flatnonzero((density >= DENSITY[0]) & (density <= DENSITY[1]))
    return allowed[np.argsort(-peak[allowed], kind="stable")][:count].tolist()


@dataclass(frozen=True)
class Bench:
    """A subject, an SAE and its index, and the strength of the clamp."""

    subject: Subject
    sae: Sae
    table: FeatureTable
    multiple: float

    def clamp(self, latent: int) -> Steer:
        """A clamp of the latent to a multiple of its largest activation."""
        strength = self.multiple * float(self.table.column("largest")[latent])
        return self.steer(latent, "clamp", strength)

    def steer(self, latent: int, op: Op, strength: float) -> Steer:
        """A steer at every position that is read."""
        return Steer(self.sae, latent, op, strength, skip=self.table.meta.drop_leading)

    def promoted(self, latent: int) -> list[int]:
        """Its most promoted tokens."""
        return self.table.latent(latent)["promoted_ids"][:PROMOTED]

    def run(self, tokens: NDArray[Any], steers: list[Steer]) -> Tensor:
        """Log-probabilities of one window [T], steered, float32 [T, V]."""
        replace = steered_hooks({self.table.meta.hook: steers}, len(tokens)) if steers else None
        logits = self.subject.logits(tokens[None].astype(np.int64), replace)[0]
        return logits.float().log_softmax(1)

    def rise(self, clean: Tensor, moved: Tensor, targets: list[int]) -> float:
        """Mean rise of the targets' log-probability over the positions that are read."""
        return (moved - clean)[self.table.meta.drop_leading :, targets].mean().item()

    def choose(self, windows: list[NDArray[Any]], count: int, others: list[int]) -> int:
        """The candidate whose promoted tokens rise most on `windows`, alone and compared with `others`."""
        # On training windows only: chosen on the held-out ones, the figures would be the best of 32 draws.
        clean = [self.run(tokens, []) for tokens in windows]

        def score(latent: int) -> float:
            moved = [self.run(tokens, [self.clamp(latent)]) for tokens in windows]
            pairs = list(zip(clean, moved, strict=True))
            rise = float(np.mean([self.rise(c, m, self.promoted(latent)) for c, m in pairs]))
            return min(rise, rise - float(np.mean([self.rise(c, m, others) for c, m in pairs])))

        return max(candidates(self.table, count), key=score)


def measure(
    sae_uri: str, root: str, index: str | None, *, windows: int, multiple: float, count: int, seed: int
) -> dict[str, Any]:
    """Measure one latent on held-out windows."""
    table = FeatureTable.open(index or f"{sae_uri.rstrip('/')}/features")
    dataset, meta = ActivationStore.open(root), table.meta
    bench = Bench(LazySubject(None, meta.subject).whole(), Sae.load(sae_uri), table, multiple)
    per_unit = dataset.plan.spec.windows_per_unit
    first = dataset.plan.split_units("train").start * per_unit
    vocabulary = meta.subject.vocabulary
    others = np.random.default_rng(seed).choice(vocabulary, min(RANDOM, vocabulary), replace=False).tolist()
    latent = bench.choose([dataset.tokens(first + i) for i in range(CHOOSING_WINDOWS)], count, others)
    row, targets = table.latent(latent), bench.promoted(latent)
    # Both ways to do nothing, at once: every logit must keep its bits.
    nothing = [bench.steer(latent, "add", 0.0), bench.steer(latent, "scale", 1.0)]
    rises: list[float] = []
    random: list[float] = []
    identical = True
    for window in range(min(windows, len(dataset.plan.split_units("validation")) * per_unit)):
        tokens = dataset.tokens(window)
        clean = bench.run(tokens, [])
        moved = bench.run(tokens, [bench.clamp(latent)])
        rises.append(bench.rise(clean, moved, targets))
        random.append(bench.rise(clean, moved, others))
        identical &= torch.equal(clean, bench.run(tokens, nothing))
    return {
        "sae": sae_uri.rstrip("/").rsplit("/", 1)[-1],
        "hook": meta.hook,
        "latent": latent,
        "candidates": count,
        "fires_on": [table.texts[number] for number in row["token_ids"]],
        "promoted": [table.texts[number] for number in targets],
        "largest": row["largest"],
        "strength": bench.clamp(latent).strength,
        "windows": len(rises),
        "raise_nats": interval(np.asarray(rises), seed),
        "random_nats": interval(np.asarray(random), seed),
        "excess_nats": interval(np.asarray(rises) - np.asarray(random), seed),
        "zero_is_identical": identical,
        "seed": seed,
    }


def interval(values: NDArray[np.float64], seed: int) -> dict[str, float | None]:
    """Mean and its 95 % bootstrap interval over windows."""
    found = mean_figure("steering", values, seed=seed)
    return {"mean": found.value, "low": found.low, "high": found.high}


def page(report: dict[str, Any]) -> str:
    """The result as a page of the documentation."""

    def shown(name: str) -> str:
        each = report[name]
        return f"{each['mean']:+.3f} ({each['low']:+.3f} to {each['high']:+.3f})"

    def code(tokens: list[str]) -> str:
        return " ".join(f"`{json.dumps(token, ensure_ascii=False)[1:-1]}`" for token in tokens)

    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return f"""# Steering: clamping a latent raises the tokens it promotes

Written by `python -m benchmarks.steering`; its docstring describes the choice of the latent and the measure.

Latent {report["latent"]} of `{report["sae"]}` at `{report["hook"]}` was taken from the
{report["candidates"]} latents whose most promoted token has the highest logit,
by its effect on {CHOOSING_WINDOWS} training windows, alone and against random tokens.
It fires on {code(report["fires_on"][:6])}
and promotes {code(report["promoted"])}.

{report["windows"]} held-out windows were run clean and with the latent clamped to {report["strength"]:.3g}
(its largest activation in the dataset is {report["largest"]:.3g}) at every position that is read.

| change of the mean log-probability, nats | mean (95 % bootstrap interval over windows) |
|---|---|
| of its {PROMOTED} promoted tokens | {shown("raise_nats")} |
| of {RANDOM} random tokens | {shown("random_nats")} |
| difference, paired by window | {shown("excess_nats")} |

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
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--page", type=Path, help="where to write the page")
    args = parser.parse_args()
    figures = measure(
        args.sae,
        args.root,
        args.index,
        windows=args.windows,
        multiple=args.multiple,
        count=args.candidates,
        seed=args.seed,
    )
    report = write_report("steering", figures, args.json)
    if args.page is not None:
        args.page.parent.mkdir(parents=True, exist_ok=True)
        args.page.write_text(page(report), encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
