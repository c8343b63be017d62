"""Codes of token sequences that are not of the dataset: texts of probe tasks, edited n-grams.

Letters: L tokens of a sequence, S slots of the codes.

Each sequence stands behind a prefix (BOS where the plan's windows begin with it, else the token that joins
documents) as long as the leading positions the dataset drops, at least one: the first position is an
attention sink, whose activations no SAE was trained on. Only the blocks up to the hook run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.common.reporter import Progress
from winnow.evaluator.setting import Setting
from winnow.schemas.errors import ConfigError

BATCH_TOKENS = 2048
"""Tokens in one pass, padding included."""


class SequenceCodes(NamedTuple):
    """The codes of one sequence, its prefix left out."""

    number: int
    """Which of the sequences given."""
    values: Tensor
    """[L, S]; all 0 at sinks."""
    indices: Tensor
    """int64 [L, S]."""


def prefix_tokens(setting: Setting) -> list[int]:
    """What every sequence stands behind; ConfigError where the plan knows of no such token."""
    plan = setting.dataset.plan
    token = plan.join_token if plan.bos_token is None else plan.bos_token
    if token is None:
        raise ConfigError("the subject's tokenizer", expected="an EOS token", got="none")
    return [token] * max(1, plan.spec.drop_leading)


def sequence_codes(
    setting: Setting, sequences: Sequence[Sequence[int]], label: str
) -> Iterator[SequenceCodes]:
    """Run sequences, shortest first, and yield their codes; every sequence needs a token.

    A row whose norm passes the plan's `sink_multiple` times its batch's median has no codes, as in training.
    """
    prefix = prefix_tokens(setting)
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    total = sum(len(sequence) for sequence in sequences)
    with torch.no_grad(), Progress(label, total, "tokens") as bar:
        while order:
            batch, order = _take(order, sequences, len(prefix))
            width = len(sequences[batch[-1]])
            ids = torch.full((len(batch), len(prefix) + width), prefix[-1], dtype=torch.int64)
            ids[:, : len(prefix)] = torch.tensor(prefix)
            present = torch.zeros(len(batch), width, dtype=torch.bool)
            for line, number in enumerate(batch):
                length = len(sequences[number])
                ids[line, len(prefix) : len(prefix) + length] = torch.tensor(list(sequences[number]))
                present[line, :length] = True
            acts = setting.subject.activations(ids, [setting.hook])[setting.hook][:, len(prefix) :]
            rows = acts[present.to(acts.device)].float()
            values, indices = setting.sae.encode(rows)
            norms = rows.norm(dim=1)
            values[norms > setting.dataset.plan.spec.sink_multiple * norms.median()] = 0
            first = 0
            for number in batch:
                part = slice(first, first + len(sequences[number]))
                yield SequenceCodes(number, values[part], indices[part])
                first = part.stop
            bar.advance(len(rows))


def _take(order: list[int], sequences: Sequence[Sequence[int]], prefix: int) -> tuple[list[int], list[int]]:
    """The next sequences of one batch, at least one, and those left."""
    count = 1
    while count < len(order):
        width = len(sequences[order[count]]) + prefix
        if (count + 1) * width > BATCH_TOKENS:
            break
        count += 1
    return order[:count], order[count:]


def value_at_end(codes: SequenceCodes, latent: int) -> float:
    """The value of one latent at a sequence's last token, 0 where it is inactive."""
    found = codes.values[-1][codes.indices[-1] == latent]
    return float(found.max()) if len(found) else 0.0
