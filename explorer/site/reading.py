"""Text through subject and SAE: which latents fire, and how predictions change without one of them.

Letters: T tokens, D d_model, S slots of the codes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError
from winnow.schemas.fit import require_own_rows
from winnow.schemas.joined import hooks_by_root, split_hook
from winnow.schemas.window import WindowRule
from winnow.subject.generate import Steer, steered_hooks
from winnow.subject.load import Subject
from winnow.subject.splice import next_token_loss

_VOTES = 4
"""Tokens listed on each side of an ablation."""


Subjects = Subject | Mapping[str, Subject]
"""A subject, or several by the names of their datasets."""


class Reading(NamedTuple):
    """A text as an SAE sees it."""

    ids: list[int]
    """Token ids [T]."""
    values: Tensor
    """Codes, in units of the normalised space, float32 [T, S]; 0 at positions that are not read."""
    indices: Tensor
    """Their latents, int64 [T, S]."""
    read: Tensor
    """False at leading positions and sinks, on which the SAE was not trained, bool [T]."""

    def of(self, latent: int) -> Tensor:
        """One latent's activation at every token, float32 [T]."""
        # A latent is in at most one slot of a row with a value above 0, so the sum is that value.
        return torch.where(self.indices == latent, self.values, 0.0).sum(1)


def tokenise(subject: Subject, text: str, limit: int, rule: WindowRule) -> list[int]:
    """Token ids of a text that begins as a window of the dataset does.

    Raises:
        ConfigError: The text has no token, or more than `limit` with BOS.
    """
    # Activations after BOS differ from those without, and the SAE knows only its own windows'.
    ids = subject.encode(text, rule)
    most = min(limit, subject.identity.context_limit or limit)
    if not rule.bos < len(ids) <= most:
        raise ConfigError(
            "text",
            expected=f"1 to {most - rule.bos} tokens",
            got=len(ids) - rule.bos,
            fix="Give a shorter text",
        )
    return ids


def read_tokens(
    subjects: Subjects,
    sae: Sae,
    ids: Sequence[int],
    *,
    drop_leading: int = 1,
    sink_multiple: float = 10.0,
    positions: Any = None,
) -> Reading:
    """Encode a text's activations.

    Args:
        subjects: The subject, with at least the layers up to the SAE's hook; of a crosscoder of several
            subjects, all of them by the names of their datasets.
        sae: A published SAE: its card names the hooks that it reads.
        ids: The text's tokens [T].
        drop_leading: Positions at the start that are not read (the dataset's `plan.drop_leading`).
        sink_multiple: A position whose norm exceeds this multiple of the text's median is a sink.
        positions: [1, T], if the text is a window of several documents: as for `Subject.activations`; of
            several subjects, those of each by name.

    Raises:
        ConfigError: The text has no position that is read.
    """
    if sae.card is None:
        raise ConfigError("sae", expected="a published SAE (`Sae.load`)", got="one without a card")
    if len(ids) <= drop_leading:
        raise ConfigError(
            "text",
            expected=f"more than {drop_leading} tokens: the first {drop_leading} of a window are not read",
            got=len(ids),
            fix="Give a longer text",
        )
    require_own_rows("the SAE", sae.card.identity)
    named = {"": subjects} if isinstance(subjects, Subject) else subjects
    # Of two datasets on the same windows, one may attend inside documents and the other across them.
    told = positions if isinstance(positions, Mapping) else dict.fromkeys(named, positions)
    found: dict[str, Tensor] = {}
    for name, own in hooks_by_root(sae.card.input_hooks).items():
        run = named[name].activations([list(ids)], own, positions=told.get(name))
        found |= {f"{name}/{hook}" if name else hook: rows[0] for hook, rows in run.items()}
    parts = [found[hook].to(sae.W_dec.device, torch.float32) for hook in sae.card.input_hooks]
    with torch.no_grad():
        values, indices = sae.encode(torch.cat(parts, dim=1))
    kept = read = torch.arange(len(ids), device=values.device) >= drop_leading
    # The median over the positions that are kept, as in the harvest: position 0 is an attention sink, and in
    # a short text its norm would raise the median.
    for norms in (rows.norm(dim=1) for rows in parts):
        read = read & (norms <= sink_multiple * norms[kept].median())
    return Reading(
        list(ids), torch.where(read[:, None], values.float(), 0.0).cpu(), indices.cpu(), read.cpu()
    )


class Ablation(NamedTuple):
    """How the predictions on a text change when one latent is set to 0.

    Entry t describes the prediction made *at* token t, of the token after it.
    """

    activation: list[float]
    """Activation that was removed, in units of the normalised space, [T]."""
    loss_change: list[float | None]
    """Increase of the next token's loss in nats, [T]; None at the last token."""
    kl: list[float]
    """KL(clean, ablated) in nats, [T]."""
    up: list[list[tuple[int, float]]]
    """Tokens whose probability rises most, and the increase, [T]."""
    down: list[list[tuple[int, float]]]
    """Tokens whose probability falls most, which the latent promoted, and the change, [T]."""


def ablate(
    subject: Subject,
    sae: Sae,
    reading: Reading,
    latent: int,
    *,
    drop_leading: int = 1,
    positions: Any = None,
    part: str = "",
) -> Ablation:
    """Run a text with and without one latent, keeping the SAE's error.

    Leading positions (`drop_leading`) stay clean, as in training; `positions` as for `read_tokens`. Of a
    crosscoder the direction of one `part` (its hook) is removed from that part's subject, times the codes of
    `reading`, which all parts together gave: sinks, which have none, stay clean too.
    """
    if sae.card is None:
        raise ConfigError("sae", expected="a published SAE (`Sae.load`)", got="one without a card")
    ids = torch.tensor([reading.ids], device=subject.device)
    # x - z_n d_n, not the reconstruction without n: otherwise the SAE's error would be measured too.
    codes = reading.of(latent) if part else None
    steers = [Steer(sae, latent, "ablate", skip=drop_leading, part=part, codes=codes)]
    clean = subject.logits(ids, positions=positions)
    without = steered_hooks({split_hook(part or sae.card.hook)[1]: steers}, len(reading.ids))
    cut = subject.logits(ids, without, positions=positions)
    change = (next_token_loss(cut, ids) - next_token_loss(clean, ids))[0]
    before, after = clean[0].float().log_softmax(1), cut[0].float().log_softmax(1)
    # Rounding makes the KL of equal distributions slightly negative.
    kl = (before.exp() * (before - after)).sum(1).clamp_min(0)
    moved = after.exp() - before.exp()
    high, low = moved.topk(_VOTES), moved.topk(_VOTES, largest=False)
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
    # Where the latent is silent nothing moves, and top-k would name four arbitrary tokens.
    return [[pair for pair in row if pair[1] != 0] for row in pairs]
