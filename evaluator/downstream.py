"""Family `downstream`: what the reconstruction costs the subject. Delta CE, KL, loss recovered.

Letters: B windows in a batch, T context length, V vocabulary, D d_model.

The subject runs with the hook replaced by the reconstruction, by zeros, or by the mean of the training
rows. Every variant replaces exactly the same positions: dropped leading ones and sinks stay clean.
Cross-entropies and KL(clean, patched) are means over all next-token predictions of a window, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluator.bootstrap import figure, mean_figure
from evaluator.setting import Measured, Setting
from harvester.splice import Replacement, next_token_loss
from harvester.tail import Tail
from schemas.evaluation import Figure
from store import ActivationStore
from store.console import Progress
from trainer.sae import Sae

Losses = dict[str, NDArray[np.float64]]
Variant = Callable[[Tensor, Sequence[int]], Tensor]
"""(raw rows [B*T, D] of some windows, their numbers) -> the rows that take their place."""


def splice_losses(
    tail: Tail,
    store: ActivationStore,
    hook: str,
    windows: Sequence[int],
    variants: Mapping[str, Variant],
    *,
    batch_windows: int = 4,
    label: str = "downstream",
) -> Losses:
    """Mean cross-entropy of each window, clean and with the hook replaced, and the KL from clean.

    The blocks below the hook run once for all variants.

    Args:
        tail: The subject from the hook upward.
        store: The dataset, for tokens and sinks.
        hook: Where rows are replaced.
        windows: Window numbers over the dataset.
        variants: What takes their place, by name.
        batch_windows: Windows in one pass.
        label: Of the progress bar.

    Returns:
        `clean`, each variant's name, and `kl.` + its name -> [len(windows)] nats.
    """
    names = ["clean", *variants, *(f"kl.{name}" for name in variants)]
    out: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.no_grad(), Progress(label, len(windows), "windows") as bar:
        for first in range(0, len(windows), batch_windows):
            batch = windows[first : first + batch_windows]
            tokens = np.stack([store.tokens(window) for window in batch])
            weights = torch.from_numpy(store.window_weights([hook], batch) > 0)
            replaced = weights.reshape(-1, 1).to(tail.subject.device)
            start = tail.start(tokens)
            out["clean"].append(next_token_loss(start.logits, start.ids).mean(1))
            for name, variant in variants.items():
                patched = tail.patched(start, _at(replaced, variant, batch))
                out[name].append(next_token_loss(patched, start.ids).mean(1))
                out[f"kl.{name}"].append(kl_divergence(start.logits, patched))
                del patched
            bar.advance(len(batch))
    return {name: torch.cat(values).double().cpu().numpy() for name, values in out.items()}


def _at(rows: Tensor, variant: Variant, windows: Sequence[int]) -> Replacement:
    """`variant` where `rows` [B*T, 1] is true, the activation itself elsewhere."""
    return lambda x: torch.where(rows, variant(x.float(), windows).to(x.dtype), x)


def kl_divergence(clean: Tensor, patched: Tensor) -> Tensor:
    """KL(clean, patched) in nats, mean over positions 0 to T-2, of logits [B, T, V] -> [B].

    The float32 log-softmaxes exist for one window at a time.
    """
    out = torch.empty(len(clean), device=clean.device)
    for window in range(len(clean)):
        p, q = (logits[window, :-1].float().log_softmax(-1) for logits in (clean, patched))
        out[window] = (p.exp() * (p - q)).sum(-1).mean()
    return out


def sae_variants(sae: Sae, store: ActivationStore, hook: str, device: torch.device) -> dict[str, Variant]:
    """Reconstruction, zeros, and the mean of the training rows."""
    mean = torch.from_numpy(store.mean(hook)).to(device, torch.float32)
    return {
        "sae": lambda x, _: sae(x),
        "zero": lambda x, _: torch.zeros_like(x),
        "mean": lambda x, _: mean.expand_as(x),
    }


def figures_of(losses: Losses, seed: int = 0) -> list[Figure]:
    """Figures from `splice_losses` of `sae_variants`."""
    clean = losses["clean"]
    delta = losses["sae"] - clean
    figures = [
        mean_figure("ce_clean", clean, seed=seed),
        mean_figure("ce_patched", losses["sae"], seed=seed),
        mean_figure("delta_ce", delta, seed=seed),
        mean_figure("kl", losses["kl.sae"], seed=seed),
    ]
    for name in ("zero", "mean"):
        gap = losses[name] - clean
        figures.append(figure(f"loss_recovered_{name}", lambda d, g: 1 - d / g, delta, gap, seed=seed))
    return figures


def measure(setting: Setting) -> Measured:
    """Run the subject over the held-out windows, clean and with the hook replaced three ways."""
    losses = splice_losses(
        setting.tail,
        setting.dataset,
        setting.hook,
        setting.windows,
        sae_variants(setting.sae, setting.dataset, setting.hook, setting.device),
        batch_windows=setting.spec.batch_windows,
    )
    means = {name: float(values.mean()) for name, values in losses.items()}
    return Measured(figures_of(losses, setting.spec.seed), {"mean_nats": means})
