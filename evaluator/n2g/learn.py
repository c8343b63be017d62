"""Learns N2G tries: truncation, wildcards, substitution (Foote et al. 2023; Gao et al. 2024, section 4.3).

From each example, a token on which the latent is highly active:

1. *Truncation*: the shortest run of tokens ending there on which the latent keeps `_KEEP` of its value. An
   example that needs more than `_LONGEST` tokens is dropped.
2. *Wildcards*: a place, other than the last, at which each of `_FILLS` random corpus tokens keeps `_KEEP` of
   the value. All places must also do so together, otherwise none becomes a wildcard.
3. *Substitution*: at every other place, the tokens of the corpus nearest by the cosine of the subject's
   embeddings; those that keep `_KEEP` of the value make n-grams of their own.

Every trial is a short run of the subject's lower blocks; the trials of all latents in a step run together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from winnow.evaluator.n2g.tries import WILDCARD, Pattern, Trie
from winnow.evaluator.sequences import sequence_codes, value_at_end
from winnow.evaluator.setting import Setting

_KEEP = 0.5
"""Share of its value that a latent must keep."""
_LONGEST = 8
"""Largest number of tokens of an n-gram."""
_FILLS = 3
"""Random tokens tried at a place that may be a wildcard."""
_NEIGHBOURS = 4
"""Nearest tokens tried at a place that is not a wildcard."""


@dataclass
class Example:
    """A token on which a latent is highly active, with the results of learning so far."""

    slot: int
    """Number of the latent among those that are learnt."""
    latent: int
    """Number of the latent in the SAE."""
    ids: list[int]
    """Tokens of its window up to that token; once truncated, the last few of them."""
    value: float
    """The latent's activation there."""
    wild: frozenset[int] = frozenset()
    """Places of `ids` that are wildcards."""

    @property
    def enough(self) -> float:
        """The value that a trial must keep."""
        return _KEEP * self.value

    def pattern(self) -> Pattern:
        """Return the n-gram as it is now."""
        return tuple(WILDCARD if at in self.wild else token for at, token in enumerate(self.ids))


def trial_values(setting: Setting, trials: list[tuple[Example, list[int]]], label: str) -> list[float]:
    """Compute the value of the example's latent at the end of each trial's tokens."""
    # Equal tokens run once: latents share examples, and short runs recur, above all those of one token.
    asked: dict[tuple[int, ...], list[int]] = {}
    for number, (_, ids) in enumerate(trials):
        asked.setdefault(tuple(ids), []).append(number)
    out, sequences = [0.0] * len(trials), list(asked)
    for codes in sequence_codes(setting, sequences, label):
        for number in asked[sequences[codes.number]]:
            out[number] = value_at_end(codes, trials[number][0].latent)
    return out


def truncate(setting: Setting, examples: list[Example]) -> list[Example]:
    """Cut examples to the shortest run that keeps the value; drop those that have none."""
    # From short to long, all examples at a time: one that is found drops out, so that long runs are few.
    shortest: dict[int, list[int]] = {}
    for length in range(1, _LONGEST + 1):
        trials = [
            (example, example.ids[-length:])
            for example in examples
            if id(example) not in shortest and len(example.ids) >= length
        ]
        if not trials:
            break
        values = trial_values(setting, trials, f"n2g truncation, length {length}")
        for (example, ids), value in zip(trials, values, strict=True):
            if value > 0 and value >= example.enough:
                shortest[id(example)] = ids
    return [
        Example(example.slot, example.latent, shortest[id(example)], example.value)
        for example in examples
        if id(example) in shortest
    ]


def _find_wildcards(
    setting: Setting, examples: list[Example], corpus: NDArray[np.int64], draw: np.random.Generator
) -> None:
    """Set each example's `wild`. Fills are drawn from `corpus` [n], the tokens of the training windows."""

    def fills(example: Example, places: frozenset[int]) -> list[list[int]]:
        return [
            [int(draw.choice(corpus)) if at in places else token for at, token in enumerate(example.ids)]
            for _ in range(_FILLS)
        ]

    def test(groups: list[tuple[Example, frozenset[int]]]) -> list[tuple[Example, frozenset[int]]]:
        return _all_keep(setting, [(example, places, fills(example, places)) for example, places in groups])

    # The last place is never a wildcard: tries are searched by it, and an n-gram of "any token" says nothing.
    alone = test([(example, frozenset([at])) for example in examples for at in range(len(example.ids) - 1)])
    for example, places in alone:
        example.wild |= places
    # Each place may be replaceable alone, with the value kept by the other: then both cannot be.
    several = [(example, example.wild) for example in examples if len(example.wild) > 1]
    together = {id(example) for example, _ in test(several)}
    for example, _ in several:
        if id(example) not in together:
            example.wild = frozenset()


def _all_keep(
    setting: Setting, groups: list[tuple[Example, frozenset[int], list[list[int]]]]
) -> list[tuple[Example, frozenset[int]]]:
    """Keep the (example, places) whose every fill keeps the value; after one that does not, none is run."""
    for turn in range(_FILLS):
        if not groups:
            break
        trials = [(example, fills[turn]) for example, _, fills in groups]
        values = trial_values(setting, trials, f"n2g wildcards, fill {turn + 1}")
        groups = [group for group, value in zip(groups, values, strict=True) if value >= group[0].enough]
    return [(example, places) for example, places, _ in groups]


def _substitute(setting: Setting, examples: list[Example], vocabulary: NDArray[np.int64]) -> list[Trie]:
    """Make one trie per slot from every example's n-gram and those of its substitutions that keep the value.

    Args:
        setting: Has the subject and its embeddings.
        examples: Truncated examples with their wildcards.
        vocabulary: Tokens of the corpus, each once.
    """
    nearest = neighbours(
        setting, sorted({t for e in examples for at, t in enumerate(e.ids) if at not in e.wild}), vocabulary
    )
    # The example itself runs again: with its wildcards' original tokens it gives the value to predict.
    trials: list[tuple[Example, list[int]]] = [(example, example.ids) for example in examples]
    for example in examples:
        for at, token in enumerate(example.ids):
            if at not in example.wild:
                trials += [
                    (example, [*example.ids[:at], other, *example.ids[at + 1 :]]) for other in nearest[token]
                ]
    tries: dict[int, Trie] = {}
    for (example, ids), value in zip(trials, trial_values(setting, trials, "n2g substitution"), strict=True):
        # The n-gram as found is kept in any case: it has passed these tests, and float noise must not drop
        # it.
        if ids is example.ids or value >= example.enough:
            pattern = tuple(WILDCARD if at in example.wild else token for at, token in enumerate(ids))
            tries.setdefault(example.slot, Trie()).add(pattern, value)
    count = max((example.slot for example in examples), default=-1) + 1
    return [tries.get(slot, Trie()) for slot in range(count)]


def neighbours(setting: Setting, tokens: list[int], vocabulary: NDArray[np.int64]) -> dict[int, list[int]]:
    """Find the `_NEIGHBOURS` other tokens of `vocabulary` nearest to each token by cosine of embeddings."""
    model: Any = setting.subject.model
    weight = model.get_input_embeddings().weight.detach().float()
    table = torch.nn.functional.normalize(weight[torch.from_numpy(vocabulary).to(weight.device)], dim=1)
    found: dict[int, list[int]] = {}
    # Token by token: all cosines at once would be tokens x vocabulary. One more than needed is taken, since
    # the token itself is the nearest.
    for token in tokens:
        scores = table @ torch.nn.functional.normalize(weight[token], dim=0)
        best = vocabulary[scores.topk(min(_NEIGHBOURS + 1, len(vocabulary))).indices.cpu().numpy()]
        found[token] = [int(other) for other in best if other != token][:_NEIGHBOURS]
    return found


def learn(
    setting: Setting, examples: list[Example], slots: int, tokens: NDArray[np.int64]
) -> tuple[list[Trie], list[int]]:
    """Learn the tries of some latents.

    Args:
        setting: The SAE and the subject.
        examples: Top activations of every latent.
        slots: Number of latents; an example's `slot` is below it.
        tokens: Token ids [W, T] of the training windows, the corpus of fills and substitutions.

    Returns:
        One trie per slot, empty if no example could be truncated; and the number of examples that each was
        learnt from.
    """
    kept = truncate(setting, examples)
    flat = tokens.reshape(-1)
    _find_wildcards(setting, kept, flat, np.random.default_rng(setting.spec.seed))
    tries = _substitute(setting, kept, np.unique(flat))
    used = np.bincount([example.slot for example in kept], minlength=slots)
    return tries + [Trie() for _ in range(slots - len(tries))], used.tolist()
