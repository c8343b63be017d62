"""Delta CE of transcoders and crosscoders: what is replaced is not, or not only, what is read.

Letters: W windows, T positions, B rows (W*T), D width of the input, O width of the output, V vocabulary.

The subject runs clean once, and the SAE computes its output from the *clean* rows of its input hooks. Then
the subject runs again with every output hook replaced: a transcoder's target, all hooks of a crosscoder.
What `evaluator.downstream` says of positions and means holds here too, over the weights of all hooks read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from evaluator.downstream import Losses, kl_divergence
from harvester.splice import Replacement, next_token_loss
from harvester.subject import Subject
from schemas.training import SaeCard
from store import ActivationStore
from store.console import Progress
from trainer.sae import Sae


def joint_losses(
    subject: Subject,
    sae: Sae,
    card: SaeCard,
    store: ActivationStore,
    windows: Sequence[int],
    *,
    batch_windows: int = 4,
    label: str = "downstream",
) -> Losses:
    """`splice_losses` with reconstruction, zeros and training means, for any SAE.

    Args:
        subject: The whole subject.
        sae: On the subject's device.
        card: Says which hooks are read and which are replaced.
        store: The dataset, for tokens, sinks and means.
        windows: Window numbers over the dataset.
        batch_windows: Windows in one pass.
        label: Of the progress bar.

    Returns:
        `clean`, `sae`, `zero`, `mean`, and `kl.` + each of the last three -> [len(windows)] nats.
    """
    outputs, reads = list(card.output_hooks), list({*card.input_hooks, *card.output_hooks})
    means = [torch.from_numpy(store.mean(hook)).to(subject.device, torch.float32) for hook in outputs]
    mean = torch.cat(means)
    widths = [len(part) for part in means]
    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "sae": sae,
        "zero": lambda x: mean.new_zeros(len(x), len(mean)),
        "mean": lambda x: mean.expand(len(x), -1),
    }
    out: dict[str, list[Tensor]] = {n: [] for n in ("clean", *variants, *(f"kl.{v}" for v in variants))}
    with torch.no_grad(), Progress(label, len(windows), "windows") as bar:
        for first in range(0, len(windows), batch_windows):
            batch = windows[first : first + batch_windows]
            tokens = np.stack([store.tokens(window) for window in batch])
            ids = torch.from_numpy(tokens.astype(np.int64)).to(subject.device)
            weights = torch.from_numpy(store.window_weights(reads, batch) > 0)
            replaced = weights.reshape(-1, 1).to(subject.device)
            found = subject.activations(tokens, list(card.input_hooks))
            x = torch.cat([found[hook].float().flatten(0, 1) for hook in card.input_hooks], dim=1)
            clean = subject.logits(tokens)
            out["clean"].append(next_token_loss(clean, ids).mean(1))
            for name, variant in variants.items():
                new = dict(zip(outputs, variant(x).split(widths, dim=1), strict=True))
                patched = subject.logits(tokens, {h: _at(replaced, rows) for h, rows in new.items()})
                out[name].append(next_token_loss(patched, ids).mean(1))
                out[f"kl.{name}"].append(kl_divergence(clean, patched))
                del patched
            bar.advance(len(batch))
    return {name: torch.cat(values).double().cpu().numpy() for name, values in out.items()}


def _at(chosen: Tensor, rows: Tensor) -> Replacement:
    """`rows` [B, O] where `chosen` [B, 1] is true, the activation itself elsewhere."""
    return lambda x: torch.where(chosen, rows.to(x.dtype), x)
