"""The strongest paths of a graph: chains of edges from an embedding or an error to a logit."""

from __future__ import annotations

import heapq
from itertools import pairwise
from typing import NamedTuple

from winnow.evaluator.circuits.graph import Graph
from winnow.evaluator.circuits.influence import normalised

_BRANCHES = 64
"""Sources of a node that are followed, the largest first."""
_STEPS = 200_000
"""Most chains that are looked at."""


class Path(NamedTuple):
    """A chain of nodes."""

    share: float
    """Its part of the influence on the logits: their probability times the share of every edge."""
    nodes: tuple[int, ...]
    """Indices of nodes, from the source to the logit."""
    positive: bool
    """Whether the product of its edges is positive: a negative path speaks against the logit."""


def strongest_paths(graph: Graph, count: int = 10) -> list[Path]:
    """List the paths with the largest share of influence, the strongest first.

    Args:
        graph: A pruned graph, whose paths are few enough to be meant.
        count: Most paths.
    """
    shares = normalised(graph.adjacency)
    top = shares.topk(min(_BRANCHES, shares.shape[1]), dim=1)
    sources, values = top.indices.tolist(), top.values.tolist()
    # A chain's share only shrinks as it grows, so the first finished ones that come up are the strongest.
    queue: list[tuple[float, tuple[int, ...]]] = [
        (-node.value, (at,)) for at, node in enumerate(graph.nodes) if node.kind == "logit"
    ]
    heapq.heapify(queue)
    found: list[Path] = []
    for _ in range(_STEPS):
        if not queue or len(found) == count:
            break
        share, chain = heapq.heappop(queue)
        if graph.nodes[chain[0]].kind in ("embedding", "error"):
            found.append(Path(-share, chain, _positive(graph, chain)))
            continue
        for source, value in zip(sources[chain[0]], values[chain[0]], strict=True):
            if value > 0:
                heapq.heappush(queue, (share * value, (source, *chain)))
    return found


def _positive(graph: Graph, chain: tuple[int, ...]) -> bool:
    negative = [float(graph.adjacency[target, source]) < 0 for source, target in pairwise(chain)]
    return sum(negative) % 2 == 0
