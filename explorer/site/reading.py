"""Text through subject and SAE: which latents fire, and what a text loses without one of them.

Letters: T tokens, D d_model, S slots of the codes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError
from winnow.schemas.window import WindowRule
from winnow.subject.generate import Steer, steered
from winnow.subject.load import Subject
from winnow.subject.splice import next_token_loss

VOTES = 4
"""Tokens listed on each side of an ablation."""


class Reading(NamedTuple):
    """A text as an SAE sees it."""

    ids: list[int]
    """[T] token ids."""
    values: Tensor
    """float32 [T, S] codes, in units of the normalised space; 0 at positions that are not read."""
    indices: Tensor
    """int64 [T, S] their latents."""
    read: Tensor
    """bool [T]: false at leading positions and sinks, which the SAE was not trained on."""

    def of(self, latent: int) -> Tensor:
        """float32 [T]: one latent's activation at every token."""
        return torch.where(self.indices == latent, self.values, 0.0).sum(1)


def tokenise(subject: Subject, text: str, limit: int, rule: WindowRule) -> list[int]:
    """Token ids of a text, as a window that holds it.

    Raises:
        ConfigError: No token of the text, or more than `limit`, BOS included.
    """
    ids = subject.encode(text, rule)
    most = min(limit, subject.identity.context_limit or limit)
    if not rule.bos < len(ids) <= most:
        raise ConfigError(
            "text",
            expected=f"1 to {most - rule.bos} tokens",
            got=len(ids) - rule.bos,
            fix="Take a shorter text",
        )
    return ids


def read_tokens(
    subject: Subject, sae: Sae, ids: Sequence[int], *, drop_leading: int = 1, sink_multiple: float = 10.0
) -> Reading:
    """Encode a text's activations.

    Args:
        subject: The subject; hooks up to the SAE's suffice.
        sae: A published SAE: its card says which hook it reads.
        ids: The text's tokens [T].
        drop_leading: Positions at the start that are not read (the dataset's `plan.drop_leading`).
        sink_multiple: A position whose norm passes this multiple of the text's median is a sink.

    Raises:
        ConfigError: The text ends before a position that is read.
    """
    if sae.card is None:
        raise ConfigError("sae", expected="a published SAE (`Sae.load`)", got="one without a card")
    if len(ids) <= drop_leading:
        raise ConfigError(
            "text",
            expected=f"more than {drop_leading} tokens: the first {drop_leading} of a window are not read",
            got=len(ids),
            fix="Take a longer text",
        )
    hook = sae.card.hook
    rows = subject.activations([list(ids)], [hook])[hook][0].to(sae.W_dec.device, torch.float32)
    with torch.no_grad():
        values, indices = sae.encode(rows)
    read = torch.arange(len(rows), device=rows.device) >= drop_leading
    norms = rows.norm(dim=1)
    read &= norms <= sink_multiple * norms[read].median()
    return Reading(
        list(ids), torch.where(read[:, None], values.float(), 0.0).cpu(), indices.cpu(), read.cpu()
    )


class Ablation(NamedTuple):
    """What happens to the predictions of a text when one latent is set to 0.

    Entry t is about the prediction made *at* token t, of the token after it.
    """

    activation: list[float]
    """[T] what was taken away, in units of the normalised space."""
    loss_change: list[float | None]
    """[T] nats that the loss of the next token rises by; None at the last."""
    kl: list[float]
    """[T] KL(clean, ablated) in nats."""
    up: list[list[tuple[int, float]]]
    """[T] tokens whose probability rises most, and by how much."""
    down: list[list[tuple[int, float]]]
    """[T] tokens whose probability falls most: what the latent voted for."""


def ablate(subject: Subject, sae: Sae, reading: Reading, latent: int, *, drop_leading: int = 1) -> Ablation:
    """Run a text with and without one latent, the SAE's error kept.

    Leading positions stay clean (`drop_leading`), as in training.
    """
    if sae.card is None:
        raise ConfigError("sae", expected="a published SAE (`Sae.load`)", got="one without a card")
    ids = torch.tensor([reading.ids], device=subject.device)
    steers = [Steer(sae, latent, "ablate", skip=drop_leading)]
    clean = subject.logits(ids)
    cut = subject.logits(ids, {sae.card.hook: steered(steers, len(reading.ids))})
    change = (next_token_loss(cut, ids) - next_token_loss(clean, ids))[0]
    before, after = clean[0].float().log_softmax(1), cut[0].float().log_softmax(1)
    kl = (before.exp() * (before - after)).sum(1).clamp_min(0)
    moved = after.exp() - before.exp()
    high, low = moved.topk(VOTES), moved.topk(VOTES, largest=False)
    return Ablation(
        reading.of(latent).tolist(),
        [*change.tolist(), None],
        kl.tolist(),
        _votes(high.indices, high.values),
        _votes(low.indices, low.values),
    )


def _votes(ids: Tensor, values: Tensor) -> list[list[tuple[int, float]]]:
    pairs: list[Any] = [
        list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    return [[pair for pair in row if pair[1] != 0] for row in pairs]
