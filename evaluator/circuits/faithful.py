"""Faithfulness, measured: what a graph foretells of single latents, against what the subject does.

For latents of the graph, and beside them for active latents drawn at random, each is taken away and doubled
in the subject. A graph that foretells nothing has a rank correlation of 0; one that foretells everything has
1, and a slope of 1. Latents of several prompts count together.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    subject: Subject,
    set_: TranscoderSet,
    graphs: Graph | Sequence[Graph],
    latents: int = 200,
    *,
    seed: int = 0,
) -> list[Figure]:
    """Compare foretold with found changes of the most probable logit of one graph, or of several prompts'.

    Args:
        subject: The whole subject, in float32.
        set_: The set that the graphs were traced with.
        graphs: Graphs, pruned or whole.
        latents: Latents of each kind over all graphs, as many of each, rounded up; fewer if there are not as
            many.
        seed: Seed of the draws.

    Returns:
        `circuit.<graph or random>.<taken_away or doubled>.<spearman or slope>`, each with its interval over
        latents, those of all graphs together. The slope is that of found over foretold, through the origin.

    Raises:
        ConfigError: There is no graph, or one has fewer than two features.
        SaeMismatch: A graph is of another set or subject.
    """
    several = [graphs] if isinstance(graphs, Graph) else graphs
    if not several:
        raise ConfigError("the graphs", expected="one or more", got="none")
    each = -(-latents // len(several))
    told: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with Progress("edits", total=2 * len(ACTIONS) * each * len(several), unit="edits") as progress:
        for graph in several:
            for name, pair in _compared(Prompt(subject, set_, graph), each, seed, progress).items():
                told.setdefault(name, []).append(pair)
    found: list[Figure] = []
    for name, pairs in told.items():
        foretold, changes = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        found += _figures(f"circuit.{name}", foretold, changes, seed)
    return found


def _compared(
    prompt: Prompt, latents: int, seed: int, progress: Progress
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of one prompt: `group.action` -> foretold and found changes [n] of its most probable logit."""
    draws = np.random.default_rng(seed)
    own = [prompt.number_of(node) for node in prompt.graph.nodes if node.kind == "feature"]
    if len(own) < 2:
        raise ConfigError("the graph's features", expected="two or more", got=len(own))
    groups = {
        "graph": draws.permutation(own)[:latents],
        "random": draws.permutation(prompt.sources.count)[:latents],
    }
    top = max(range(len(prompt.logits)), key=lambda at: prompt.logits[at].value)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for group, numbers in groups.items():
        foretold = torch.stack([prompt.foretold(int(number))[top] for number in numbers])
        for action, share in ACTIONS.items():
            changes = _found(prompt, numbers, share, progress)[:, top]
            found[f"{group}.{action}"] = foretold * share, changes
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
