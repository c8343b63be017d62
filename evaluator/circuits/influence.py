"""Influence of nodes and edges on the logits, and what pruning keeps. Dense linear algebra, nothing else.

Letters: n nodes; `adjacency` is [n, n], rows are targets and columns sources; `weights` [n] holds the logits'
probabilities and 0 elsewhere.

Definitions of Ameisen, Lindsey et al. 2025 ("Circuit Tracing", appendix on pruning), with the conventions of
circuit-tracer, so that figures can be compared: rows of |A| are divided by their sum, and influence is the
row of ``(I - A)^-1 - I`` that the logits' probabilities weigh.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LEAST = 1e-10
"""Least sum of a row that rows are divided by: those of errors and embeddings are 0."""


class Scores(NamedTuple):
    """See `winnow.schemas.graph.GraphScores`."""

    replacement: float
    completeness: float


class Kept(NamedTuple):
    """What pruning keeps."""

    nodes: Tensor
    """bool [n]."""
    links: Tensor
    """bool [n, n]."""


def normalised(adjacency: Tensor) -> Tensor:
    """Shares [n, n]: each target's sources by magnitude, adding up to 1."""
    shares = adjacency.abs()
    return shares / shares.sum(1, keepdim=True).clamp_min(_LEAST)


def total(shares: Tensor, weights: Tensor) -> Tensor:
    """The influence [n] of every node on the weighted ones, over paths of any length of at least one edge."""
    found, step = torch.zeros_like(weights), weights
    # Of a graph without circles every path has fewer edges than there are nodes: the sum ends by itself.
    for _ in range(len(weights)):
        step = step @ shares
        if not step.any():
            return found
        found = found + step
    raise ValueError("the graph has a circle")


def node_influence(adjacency: Tensor, weights: Tensor) -> Tensor:
    """The influence [n] of every node on the logits."""
    return total(normalised(adjacency), weights)


def edge_influence(adjacency: Tensor, weights: Tensor) -> Tensor:
    """The influence [n, n] of every edge: its share of its target, times the target's own influence."""
    shares = normalised(adjacency)
    return shares * (total(shares, weights) + weights)[:, None]


def threshold(values: Tensor, share: float) -> Tensor:
    """The least of the largest values that together hold a share of the sum."""
    ordered = values.flatten().sort(descending=True).values
    sums = ordered.cumsum(0) / ordered.sum()
    return ordered[min(int(torch.searchsorted(sums, share)), len(ordered) - 1)]


def cumulative(influence: Tensor) -> Tensor:
    """Per node, the share of all influence that it and all more influential nodes hold [n]."""
    ordered, order = influence.sort(descending=True)
    found = torch.zeros_like(influence)
    found[order] = ordered.cumsum(0) / ordered.sum().clamp_min(_LEAST)
    return found


def prune(
    adjacency: Tensor, weights: Tensor, features: Tensor, fixed: Tensor, nodes: float, edges: float
) -> Kept:
    """Keep the nodes, and then the edges between them, that hold a share of the influence.

    Args:
        adjacency: [n, n].
        weights: [n].
        features: bool [n]: latents, which need both an edge in and an edge out.
        fixed: bool [n]: embeddings and logits, which stay in any case.
        nodes: Share of the nodes' influence to keep.
        edges: Share of the edges' influence to keep, of those between kept nodes.
    """
    influence = node_influence(adjacency, weights)
    kept = (influence >= threshold(influence, nodes)) | fixed
    thinned = adjacency * kept[:, None] * kept[None, :]
    scores = edge_influence(thinned, weights)
    links = scores >= threshold(scores, edges)
    while True:
        connected = fixed | (links.any(0) & (~features | links.any(1)))
        left = kept & connected
        if bool((left == kept).all()):
            return Kept(kept, links & (adjacency != 0) & kept[:, None] & kept[None, :])
        kept = left
        links = links & kept[:, None] & kept[None, :]


def scores_of(adjacency: Tensor, weights: Tensor, errors: Tensor, embeddings: Tensor) -> Scores:
    """Replacement and completeness.

    Errors and embeddings receive nothing and count as wholly explained, as in circuit-tracer: completeness is
    R / (R + E), R what all nodes but errors reach and E, at most R, what errors do. So it is 0.5 or more.

    Args:
        adjacency: [n, n], not pruned.
        weights: [n].
        errors: bool [n].
        embeddings: bool [n].
    """
    shares = normalised(adjacency)
    influence = total(shares, weights)
    from_tokens, from_errors = influence[embeddings].sum(), influence[errors].sum()
    explained = 1 - shares[:, errors].sum(1)
    reached = influence + weights
    return Scores(
        float(from_tokens / (from_tokens + from_errors).clamp_min(_LEAST)),
        float((explained * reached).sum() / reached.sum().clamp_min(_LEAST)),
    )
