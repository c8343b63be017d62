"""What steering with a latent really promotes, beside the direct path's logits.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError
from winnow.schemas.joined import split_hook
from winnow.subject.generate import Steer, steered_hooks
from winnow.subject.load import Subject


class Promotion(NamedTuple):
    """How the prediction of the next token changes when a latent is clamped."""

    change: Tensor
    """Mean change of each token's log-probability in nats, float64 [V]."""
    kl: float
    """Mean KL(clean, steered) in nats."""
    positions: int
    """Positions that both are means over."""

    def extremes(self, count: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """The tokens that rise most, and those that fall most, with their changes; best first."""
        count = min(count, len(self.change))
        return _pairs(self.change.topk(count)), _pairs(self.change.topk(count, largest=False))

    def rank(self, token: int) -> int:
        """The rank of a token by its change, from 1."""
        return int((self.change > self.change[token]).sum()) + 1


def _pairs(best: torch.return_types.topk) -> list[tuple[int, float]]:
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


@torch.no_grad()
def promotion(
    subject: Subject,
    sae: Sae,
    windows: Sequence[Sequence[int]],
    latent: int,
    strength: float,
    *,
    drop_leading: int = 1,
    positions: Sequence[Any] | None = None,
    part: str = "",
    codes: Sequence[Tensor] | None = None,
) -> Promotion:
    """Run windows clean, and with a latent clamped at every position that is read.

    The mean change of the log-probability orders tokens as the mean change of the logit does: they differ by
    a constant over the vocabulary.

    Args:
        subject: The whole subject.
        sae: A published SAE or transcoder.
        windows: Token ids [T] of each.
        latent: Which latent.
        strength: Its code, in the SAE's own units.
        drop_leading: Positions at the start of a window that are neither steered nor counted.
        positions: [1, T] of each window of several documents: as for `Subject.logits`.
        part: Of a crosscoder: the hook of the part that is steered, in the subject of that part.
        codes: Of a crosscoder: the latent's codes [T] on each window, which all parts together give.

    Raises:
        ConfigError: No window has a position that is read.
    """
    if sae.card is None:
        raise ConfigError("sae", expected="a published SAE (`Sae.load`)", got="one without a card")
    hook = split_hook(part or sae.card.hook)[1]
    change, kl, counted = None, 0.0, 0
    # A window at a time: the logits of all of them would be gigabytes.
    for number, window in enumerate(windows):
        places = None if positions is None else positions[number]
        ids = torch.tensor([list(window)], device=subject.device)
        before = subject.logits(ids, positions=places)[0, drop_leading:].float().log_softmax(1)
        known = None if codes is None else codes[number]
        steer = Steer(sae, latent, "clamp", strength, skip=drop_leading, part=part, codes=known)
        pushed = subject.logits(ids, steered_hooks({hook: [steer]}, len(window)), positions=places)
        moved = pushed[0, drop_leading:].float().log_softmax(1) - before
        total = moved.double().sum(0).cpu()
        change = total if change is None else change + total
        # Rounding makes the KL of equal distributions slightly negative.
        kl += float((before.exp() * -moved).sum(1).clamp_min(0).double().sum())
        counted += len(moved)
    if change is None or not counted:
        raise ConfigError("windows", expected="positions that are read", got="none")
    return Promotion(change / counted, kl / counted, counted)
