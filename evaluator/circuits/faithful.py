"""Faithfulness, measured: what a graph foretells of single latents, against what the subject does.

For latents of the graph, and beside them for active latents drawn at random, each is taken away and doubled
in the subject. A graph that foretells nothing has a rank correlation of 0; one that foretells everything has
1, and a slope of 1.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.common.reporter import Progress
from winnow.evaluator.bootstrap import figure
from winnow.evaluator.circuits.editing import Prompt
from winnow.evaluator.circuits.graph import Graph
from winnow.sae.sets import TranscoderSet
from winnow.schemas.errors import ConfigError
from winnow.schemas.evaluation import Figure
from winnow.subject.load import Subject

_VARIANTS = 8
"""Edits per pass of the subject; their logits take that many times P x V numbers."""
ACTIONS = {"taken_away": -1.0, "doubled": 1.0}
"""What is done to a latent -> by how much of its activation it changes."""


def faithfulness(
    subject: Subject, set_: TranscoderSet, graph: Graph, latents: int = 200, *, seed: int = 0
) -> list[Figure]:
    """Compare foretold with found changes of the most probable logit of a graph.

    Args:
        subject: The whole subject, in float32.
        set_: The set that the graph was traced with.
        graph: A graph, pruned or whole.
        latents: Latents of each kind, fewer if there are not as many.
        seed: Seed of the draws.

    Returns:
        `circuit.<graph or random>.<taken_away or doubled>.<spearman or slope>`, each with its interval over
        latents. The slope is that of found over foretold, through the origin.

    Raises:
        ConfigError: The graph has fewer than two features.
        SaeMismatch: The graph is of another set or subject.
    """
    prompt = Prompt(subject, set_, graph)
    draws = np.random.default_rng(seed)
    own = [prompt.number_of(node) for node in graph.nodes if node.kind == "feature"]
    if len(own) < 2:
        raise ConfigError("the graph's features", expected="two or more", got=len(own))
    groups = {
        "graph": draws.permutation(own)[:latents],
        "random": draws.permutation(prompt.sources.count)[:latents],
    }
    top = max(range(len(prompt.logits)), key=lambda at: prompt.logits[at].value)
    found: list[Figure] = []
    with Progress("edits", total=sum(map(len, groups.values())) * len(ACTIONS), unit="edits") as progress:
        for group, numbers in groups.items():
            foretold = torch.stack([prompt.foretold(int(number))[top] for number in numbers])
            for action, share in ACTIONS.items():
                changes = _found(prompt, numbers, share, progress)[:, top]
                found += _figures(f"circuit.{group}.{action}", foretold * share, changes, seed)
    return found


def _found(prompt: Prompt, numbers: NDArray[np.int64], share: float, progress: Progress) -> Tensor:
    """What the subject does when each of these latents changes by a share of its activation [n, logits]."""
    parts: list[Tensor] = []
    for low in range(0, len(numbers), _VARIANTS):
        some = [int(number) for number in numbers[low : low + _VARIANTS]]
        added = [prompt.added([(one, share * float(prompt.sources.activation[one]))]) for one in some]
        parts.append(prompt.found(added)[0])
        progress.advance(len(some))
    return torch.cat(parts)


def _figures(name: str, foretold: Tensor, found: Tensor, seed: int) -> list[Figure]:
    x, y = (each.double().numpy() for each in (foretold, found))
    a, b = _ranks(x), _ranks(y)
    # Ranks are those of the whole sample in every draw: Pearson's correlation of them is Spearman's.
    spearman = figure(
        f"{name}.spearman",
        lambda ma, mb, maa, mbb, mab: (mab - ma * mb) / ((maa - ma**2) * (mbb - mb**2)) ** 0.5,
        a, b, a * a, b * b, a * b, seed=seed, unit="latents",
    )  # fmt: skip
    slope = figure(
        f"{name}.slope", lambda xy, xx: xy / xx, x * y, x * x, seed=seed, unit="latents",
        note="found over foretold, through the origin",
    )  # fmt: skip
    return [spearman, slope]


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return ((ends - counts + ends - 1) / 2)[inverse]
