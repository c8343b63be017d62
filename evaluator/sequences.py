"""Codes of token sequences that are not in the dataset: texts of probe tasks, edited n-grams.

Letters: L tokens of a sequence, S slots of the codes.

Each sequence follows a prefix: BOS if the plan's windows begin with it, otherwise the token that joins
documents. Only the blocks up to the hook run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.common.reporter import Progress
from winnow.evaluator.setting import Setting
from winnow.schemas.errors import ConfigError

_BATCH_TOKENS = 2048
"""Tokens per pass, including prefixes and padding."""


class _SequenceCodes(NamedTuple):
    """The codes of one sequence, without its prefix."""

    number: int
    """Index of the sequence among those given."""
    values: Tensor
    """[L, S]; all 0 at sinks."""
    indices: Tensor
    """int64 [L, S]."""


def prefix_tokens(setting: Setting) -> list[int]:
    """Return the prefix of every sequence; raise ConfigError if the plan has no such token."""
    plan = setting.dataset.plan
    token = plan.join_token if plan.bos_token is None else plan.bos_token
    if token is None:
        raise ConfigError("the subject's tokenizer", expected="an EOS token", got="none")
    # As many as the dataset drops, and at least one: the first position is an attention sink, and no SAE was
    # trained on the activations there.
    return [token] * max(1, plan.spec.drop_leading)


def sequence_codes(
    setting: Setting, sequences: Sequence[Sequence[int]], label: str
) -> Iterator[_SequenceCodes]:
    """Run sequences, shortest first, and yield their codes; every sequence needs at least one token.

    A row whose norm exceeds the plan's `sink_multiple` times its batch's median has no codes, as in training.
    """
    prefix = prefix_tokens(setting)
    # Sequences of similar length share a batch, so that little of it is padding.
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    total = sum(len(sequence) for sequence in sequences)
    with torch.no_grad(), Progress(label, total, "tokens") as bar:
        while order:
            batch, order = _take(order, sequences, len(prefix))
            width = len(sequences[batch[-1]])
            # Padding is on the right, where a causal subject cannot see it, so any token will do.
            ids = torch.full((len(batch), len(prefix) + width), prefix[-1], dtype=torch.int64)
            ids[:, : len(prefix)] = torch.tensor(prefix)
            present = torch.zeros(len(batch), width, dtype=torch.bool)
            for line, number in enumerate(batch):
                length = len(sequences[number])
                ids[line, len(prefix) : len(prefix) + length] = torch.tensor(list(sequences[number]))
                present[line, :length] = True
            acts = setting.subject.activations(ids, [setting.hook])[setting.hook][:, len(prefix) :]
            # Row by row of the batch: sequence after sequence, without padding.
            rows = acts[present.to(acts.device)].float()
            values, indices = setting.sae.encode(rows)
            # The batch takes the place of a unit, whose median marks the sinks of stored rows.
            norms = rows.norm(dim=1)
            values[norms > setting.dataset.plan.spec.sink_multiple * norms.median()] = 0
            first = 0
            for number in batch:
                part = slice(first, first + len(sequences[number]))
                yield _SequenceCodes(number, values[part], indices[part])
                first = part.stop
            bar.advance(len(rows))


def _take(order: list[int], sequences: Sequence[Sequence[int]], prefix: int) -> tuple[list[int], list[int]]:
    """Split off the sequences of the next batch, at least one; return them and the rest."""
    count = 1
    while count < len(order):
        # Ascending order: the last sequence that is taken is the widest, and all are padded to it.
        width = len(sequences[order[count]]) + prefix
        if (count + 1) * width > _BATCH_TOKENS:
            break
        count += 1
    return order[:count], order[count:]


def value_at_end(codes: _SequenceCodes, latent: int) -> float:
    """Return the value of one latent at a sequence's last token; 0 if it is inactive."""
    found = codes.values[-1][codes.indices[-1] == latent]
    return float(found.max()) if len(found) else 0.0
