"""Traces a prompt: from the logits down, the most influential latents first, to an attribution graph.

Letters: P positions, L layers, F active latents of the prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from winnow.common.reporter import Progress
from winnow.evaluator.circuits.fitting import check_set, set_digest
from winnow.evaluator.circuits.graph import Graph, Node
from winnow.evaluator.circuits.held import Held
from winnow.evaluator.circuits.influence import scores_of
from winnow.evaluator.circuits.sources import Sources
from winnow.evaluator.circuits.sweep import Sweeper, Targets
from winnow.sae.sets import TranscoderSet
from winnow.schemas.errors import ConfigError
from winnow.schemas.graph import GraphLimits, GraphMetadata, GraphOrigin, GraphScores, LeftOut
from winnow.subject.load import Subject

_QUEUE = 256
"""Latents that are traced before their order is estimated anew."""
_LARGEST_BYTES = 8 << 30
"""Largest matrix of effects that is made."""


def trace(
    subject: Subject,
    set_: TranscoderSet,
    token_ids: Sequence[int] | Tensor,
    *,
    max_features: int = 2000,
    max_logits: int = 10,
    mass: float = 0.95,
    targets: Sequence[int] = (),
    slug: str = "graph",
) -> Graph:
    """Trace the next-token logits after a prompt back through a set's latents.

    Args:
        subject: The whole subject, in float32.
        set_: A set of it, on its device.
        token_ids: The prompt [P], as it is to be run, BOS included; see `Subject.encode`.
        max_features: Most latents that become nodes, the most influential by estimate.
        max_logits: Most logits that become nodes, the most probable ones.
        mass: Fewer logits are enough if they hold this probability.
        targets: Tokens whose logits are nodes, instead of the most probable ones.
        slug: Name of the graph.

    Returns:
        The whole graph; `Graph.prune` makes it readable.

    Raises:
        ConfigError: The prompt is empty or longer than the subject's context, a limit is out of range, or the
            subject's attention or norms cannot be held.
        SaeMismatch: The set is of another subject, or its latents are not linear in what they read.
    """
    ids = torch.as_tensor(token_ids, dtype=torch.int64).cpu().reshape(1, -1)
    if max_features < 1 or max_logits < 1 or not 0 < mass <= 1:
        got = f"max_features {max_features}, max_logits {max_logits}, mass {mass}"
        raise ConfigError("the limits of a graph", expected="1 or more, and a mass in (0, 1]", got=got)
    check_set(subject, set_)
    held = Held(subject, ids, set_.of.reads)
    sources = Sources(set_, held)
    logits = choose_logits(held.logits, max_logits, mass, targets)
    count = min(max_features, sources.count)
    rows, chosen = _explore(held, sources, logits, count)
    adjacency = _assembled(rows, chosen, sources, len(logits))
    nodes = _nodes(held, sources, chosen, logits)
    limits = GraphLimits(max_features=max_features, max_logits=max_logits, mass=mass)
    probability = held.logits.softmax(0)[torch.tensor(logits)].sum()
    left = LeftOut(latents=sources.count - count, probability=max(0.0, 1 - float(probability)))
    return _graph(subject, set_, ids[0], nodes, adjacency, limits, left, slug)


def choose_logits(logits: Tensor, most: int, mass: float, targets: Sequence[int] = ()) -> list[int]:
    """The tokens whose logits [V] become nodes, the most probable first.

    Raises:
        ConfigError: A target is not a token of the subject, or is named twice.
    """
    probabilities = logits.softmax(0)
    if targets:
        if len(set(targets)) < len(targets) or not all(0 <= token < len(logits) for token in targets):
            expected = f"different tokens from 0 to {len(logits) - 1}"
            raise ConfigError("the targets of a graph", expected=expected, got=list(targets))
        return sorted(targets, key=lambda token: -float(probabilities[token]))
    top, tokens = probabilities.topk(min(most, len(logits)))
    enough = int(torch.searchsorted(top.cumsum(0), mass)) + 1
    return tokens[:enough].tolist()


def _explore(held: Held, sources: Sources, logits: list[int], count: int) -> tuple[Tensor, Tensor]:
    """Trace the logits, and then `count` latents in the order of their estimated influence.

    Returns:
        Effects [logits + count, columns], and the numbers int64 [count] of the latents in that order.
    """
    sweeper = Sweeper(held, sources)
    size = (len(logits) + count) * sweeper.columns * 4
    if size > _LARGEST_BYTES:
        raise ConfigError(
            f"the effects of {sweeper.columns:,} sources on {count:,} latents",
            expected=f"at most {_LARGEST_BYTES >> 30} GiB", got=f"{size / 2**30:.1f} GiB",
            fix="Give a shorter prompt, or fewer max_features",
        )  # fmt: skip
    rows = torch.zeros(len(logits) + count, sweeper.columns)
    sums = torch.zeros(len(rows))

    def fill(low: int, targets: Targets) -> None:
        high = low + len(targets.layer)
        rows[low:high] = sweeper.rows(targets)
        sums[low:high] = rows[low:high].abs().sum(1).clamp_min(1e-8)

    fill(0, _logit_targets(held, logits))
    weights = held.logits.softmax(0)[torch.tensor(logits)].to(rows)
    order = torch.empty(0, dtype=torch.int64)
    with Progress("trace", total=count, unit="latents") as progress:
        while len(order) < count:
            done = len(logits) + len(order)
            ranked = None
            if count < sources.count:
                ranked = _estimated(rows[:done], sums[:done], order, weights, sources.count)
            new = _next(ranked, order, min(_QUEUE, count - len(order)))
            fill(done, Targets(sources.layer[new], sources.position[new], sources.encoders(new)))
            order = torch.cat([order, new])
            progress.update(len(order))
    return rows, order


def _logit_targets(held: Held, logits: list[int]) -> Targets:
    """The logits' unembedding rows less the mean row, at the last position."""
    rows = held.unembedding
    vectors = rows[torch.tensor(logits)] - rows.mean(0)
    last = torch.full((len(logits),), held.positions - 1)
    return Targets(torch.full_like(last, held.layers), last, vectors)


def _estimated(rows: Tensor, sums: Tensor, order: Tensor, weights: Tensor, latents: int) -> Tensor:
    """The influence [latents] of all active latents, over the paths through those traced so far.

    Args:
        rows: Effects [n, columns] on the logits and then on the traced latents.
        sums: [n], of each row's magnitudes.
        order: int64, the numbers of the traced latents.
        weights: The logits' probabilities.
        latents: F.
    """
    among = rows.new_zeros(len(rows), len(rows))
    among[:, len(weights) :] = rows[:, order].abs() / sums[:, None]
    step = torch.cat([weights, weights.new_zeros(len(order))])
    reached = step
    # A path has no more latents than there are layers, so this ends by itself.
    while step.any():
        step = step @ among
        reached = reached + step
    # Part by part, since a second matrix of all effects would double what a graph takes.
    found = rows.new_zeros(latents)
    for some, shares in zip(rows.split(_QUEUE), (reached / sums).split(_QUEUE), strict=True):
        found += shares @ some[:, :latents].abs()
    return found


def _next(ranked: Tensor | None, order: Tensor, count: int) -> Tensor:
    """The latents to trace next; without a rank, in their own order."""
    if ranked is None:
        return torch.arange(len(order), len(order) + count)
    ranked[order] = -1
    return ranked.topk(count).indices


def _assembled(rows: Tensor, order: Tensor, sources: Sources, logits: int) -> Tensor:
    """The adjacency over the nodes: chosen latents by layer, errors, embeddings, logits."""
    at = _by_layer(sources, order)
    columns = torch.cat([order[at], torch.arange(sources.count, rows.shape[1])])
    size = len(columns) + logits
    adjacency = torch.zeros(size, size)
    adjacency[: len(order), : len(columns)] = rows[logits + at][:, columns]
    adjacency[size - logits :, : len(columns)] = rows[:logits][:, columns]
    return adjacency


def _by_layer(sources: Sources, order: Tensor) -> Tensor:
    """Where the chosen latents are in the order of layer, position and latent."""
    # Numbers ascend by position and latent within a layer.
    at = order.argsort()
    return at[sources.layer[order[at]].argsort(stable=True)]


def _nodes(held: Held, sources: Sources, order: Tensor, logits: list[int]) -> list[Node]:
    chosen = order[_by_layer(sources, order)]
    places = torch.stack([sources.layer[chosen], sources.position[chosen], sources.latent[chosen]], 1)
    values = sources.activation[chosen].tolist()
    tokens = held.ids[0].tolist()
    probabilities = held.logits.softmax(0)
    decode = held.subject.tokenizer.decode
    features = [
        Node("feature", layer, position, latent, value)
        for (layer, position, latent), value in zip(places.tolist(), values, strict=True)
    ]
    errors = [
        Node("error", layer, position, -1)
        for layer in range(held.layers)
        for position in range(held.positions)
    ]
    embeddings = [Node("embedding", -1, position, token) for position, token in enumerate(tokens)]
    ends = [
        Node(
            "logit", held.layers, held.positions - 1, token, float(probabilities[token]), str(decode([token]))
        )
        for token in logits
    ]
    return [*features, *errors, *embeddings, *ends]


def _graph(
    subject: Subject,
    set_: TranscoderSet,
    ids: Tensor,
    nodes: list[Node],
    adjacency: Tensor,
    limits: GraphLimits,
    left: LeftOut,
    slug: str,
) -> Graph:
    decode, tokens = subject.tokenizer.decode, ids.tolist()
    weights = torch.tensor([node.value if node.kind == "logit" else 0.0 for node in nodes])
    kinds = [node.kind for node in nodes]
    errors, embeddings = (torch.tensor([kind == each for kind in kinds]) for each in ("error", "embedding"))
    scores = scores_of(adjacency, weights, errors, embeddings)
    origin = GraphOrigin(
        set_sha256=set_digest(set_),
        subject_weights_sha256=subject.identity.weights_sha256,
        token_ids=tuple(tokens),
        subject_layers=subject.layout.layers,
        layers=(set_.layers.start, set_.layers.stop - 1),
        cross=set_.cross,
        reads=set_.of.reads,
        scores=GraphScores(replacement=scores.replacement, completeness=scores.completeness),
        limits=limits,
        left_out=left,
    )
    metadata = GraphMetadata(
        slug=slug,
        scan=subject.spec.model,
        prompt_tokens=tuple(str(decode([token])) for token in tokens),
        prompt=str(decode(tokens)),
        winnow=origin,
    )
    return Graph(tuple(nodes), adjacency, metadata)
