"""Attribution graphs: nodes, the direct effects between them, scores, pruning, JSON.

Letters: n nodes, L layers of the subject.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.evaluator.circuits import influence
from winnow.evaluator.circuits.influence import Scores
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.graph import (
    EMBEDDING,
    ERROR,
    FEATURE,
    KINDS,
    LOGIT,
    MAX_LINKS,
    MAX_NODES,
    GraphFile,
    GraphLink,
    GraphMetadata,
    GraphNode,
    GraphOrigin,
    Kind,
    pair,
    unpair,
)


class Node(NamedTuple):
    """A node of a graph."""

    kind: Kind
    """`feature`, `error`, `embedding` or `logit`."""
    layer: int
    """Layer; -1 of an embedding, L of a logit."""
    position: int
    """Position in the prompt."""
    number: int
    """Latent of a feature, token of an embedding or a logit, -1 of an error."""
    value: float = 0.0
    """Activation of a feature, probability of a logit."""
    label: str = ""
    """A logit's token as text, or what another program wrote there."""

    @property
    def name(self) -> str:
        """`layer.latent@position` of a feature, as `winnow circuit --edit` takes it; others alike."""
        if self.kind == "feature":
            return f"{self.layer}.{self.number}@{self.position}"
        what = {"error": f"error {self.layer}", "embedding": f"token {self.number}"}
        return f"{what.get(self.kind, f'logit {self.number}')}@{self.position}"


@dataclass(frozen=True)
class Graph:
    """An attribution graph, in the order features, errors, embeddings, logits.

    `adjacency[t, s]` is the direct effect of source s on target t: of a feature's activation, in units of the
    target's pre-activation or logit, so that a row adds up to that less its constant terms.
    """

    nodes: tuple[Node, ...]
    """n nodes."""
    adjacency: Tensor
    """float32 [n, n], rows are targets."""
    metadata: GraphMetadata
    """Prompt, and what the graph was traced from."""
    shares: Tensor | None = None
    """[n]: cumulative influence, as `GraphNode.influence`; None of a graph that was not pruned."""

    @property
    def origin(self) -> GraphOrigin | None:
        """What it was traced from; None if another program wrote it."""
        return self.metadata.winnow

    @property
    def scores(self) -> Scores:
        """Replacement and completeness: as traced, before pruning, if that is known."""
        if self.origin is not None:
            return Scores(self.origin.scores.replacement, self.origin.scores.completeness)
        return self.computed_scores()

    def computed_scores(self) -> Scores:
        """Replacement and completeness of the edges that are here."""
        return influence.scores_of(self.adjacency, self.weights, self.of("error"), self.of("embedding"))

    def of(self, kind: Kind) -> Tensor:
        """Mask [n] of the nodes of a kind."""
        return torch.tensor([node.kind == kind for node in self.nodes], dtype=torch.bool)

    @property
    def weights(self) -> Tensor:
        """[n]: the logits' probabilities, 0 elsewhere."""
        return torch.tensor([node.value if node.kind == "logit" else 0.0 for node in self.nodes])

    @cached_property
    def influence(self) -> Tensor:
        """[n]: each node's influence on the logits."""
        return influence.node_influence(self.adjacency, self.weights)

    @cached_property
    def index(self) -> dict[tuple[Kind, int, int, int], int]:
        """(kind, layer, position, number) -> index of the node."""
        return {node[:4]: at for at, node in enumerate(self.nodes)}

    def prune(self, nodes: float = 0.8, edges: float = 0.98) -> Graph:
        """A graph of the nodes and edges that hold these shares of the influence; circuit-tracer's rule.

        Args:
            nodes: Share of the nodes' influence.
            edges: Share of the edges' influence between the nodes that are kept.
        """
        fixed = self.of("embedding") | self.of("logit")
        kept = influence.prune(self.adjacency, self.weights, self.of("feature"), fixed, nodes, edges)
        at = kept.nodes.nonzero()[:, 0]
        adjacency = (self.adjacency * kept.links)[at][:, at]
        before, after = int((self.adjacency != 0).sum()), int((adjacency != 0).sum())
        return replace(
            self,
            nodes=tuple(self.nodes[i] for i in at.tolist()),
            adjacency=adjacency,
            shares=influence.cumulative(self.influence)[at],
            metadata=self._pruned_metadata(nodes, edges, len(self.nodes) - len(at), before - after),
        )

    def _pruned_metadata(self, nodes: float, edges: float, lost: int, links: int) -> GraphMetadata:
        origin = self.origin
        if origin is not None:
            left = origin.left_out
            left = left.model_copy(update={"nodes": left.nodes + lost, "links": left.links + links})
            limits = origin.limits.model_copy(update={"nodes": nodes, "edges": edges})
            origin = origin.model_copy(update={"left_out": left, "limits": limits})
        return self.metadata.model_copy(update={"node_threshold": nodes, "winnow": origin})

    # ---- JSON ------------------------------------------------------------------------------------

    def to_json(self) -> bytes:
        """Return the graph as JSON in circuit-tracer's layout.

        Raises:
            ConfigError: It is too large for a file: `prune` it first.
        """
        layers = max((node.layer for node in self.nodes if node.kind == "logit"), default=0)
        names = self._ids(layers)
        top = max((node.value for node in self.nodes if node.kind == "logit"), default=0.0)
        shares = self.shares.tolist() if self.shares is not None else [None] * len(self.nodes)
        nodes = [
            _written(node, name, layers, share, top)
            for node, name, share in zip(self.nodes, names, shares, strict=True)
        ]
        targets, sources = self.adjacency.nonzero(as_tuple=True)
        if len(targets) > MAX_LINKS or len(nodes) > MAX_NODES:
            raise ConfigError(
                "the graph is too large for a file", expected=f"{MAX_NODES:,} nodes and {MAX_LINKS:,} edges",
                got=f"{len(nodes):,} and {len(targets):,}", fix="Prune it to a smaller share",
            )  # fmt: skip
        values = self.adjacency[targets, sources]
        links = tuple(
            GraphLink(source=names[source], target=names[target], weight=weight)
            for source, target, weight in zip(
                sources.tolist(), targets.tolist(), values.tolist(), strict=True
            )
        )
        return GraphFile(metadata=self.metadata, nodes=tuple(nodes), links=links).to_json()

    def _ids(self, layers: int) -> list[str]:
        names: list[str] = []
        taken: set[str] = set()
        for node in self.nodes:
            name = {
                "feature": f"{node.layer}_{node.number}_{node.position}",
                "error": f"0_{node.layer}_{node.position}",
                "embedding": f"E_{node.number}_{node.position}",
                "logit": f"{layers + 1}_{node.number}_{node.position}",
            }[node.kind]
            # The layout gives the error of layer 5 and latent 5 of layer 0 one name; features come first.
            names.append(name if name not in taken else f"{name}_{node.kind}")
            taken.add(name)
        return names

    @classmethod
    def from_json(cls, data: bytes, *, origin: str = "the graph") -> Graph:
        """Read a graph, of Winnow or of another program; hostile input is refused.

        Args:
            data: The file's bytes.
            origin: Its address, for messages.

        Raises:
            IntegrityError: Not a graph, or one with nodes of an unknown kind.
            UnsupportedVersion: Written by a Winnow of another major version.
        """
        file = GraphFile.from_json(data, origin=origin)
        read = [(_read(node, origin), node) for node in file.nodes]
        order = sorted(range(len(read)), key=lambda at: list(KINDS.values()).index(read[at][0].kind))
        number = {read[at][1].node_id: place for place, at in enumerate(order)}
        adjacency = torch.zeros(len(order), len(order))
        for link in file.links:
            adjacency[number[link.target], number[link.source]] += link.weight
        shares = [read[at][1].influence for at in order]
        known = [share for share in shares if share is not None]
        return cls(
            tuple(read[at][0] for at in order),
            adjacency,
            file.metadata,
            torch.tensor(known) if known and len(known) == len(shares) else None,
        )


def _written(node: Node, name: str, layers: int, share: float | None, top: float) -> GraphNode:
    """A node as the layout has it."""
    common = {"node_id": name, "ctx_idx": node.position, "influence": share}
    if node.kind == "feature":
        own = {
            "feature": pair(node.layer, node.number), "layer": str(node.layer), "feature_type": FEATURE,
            "jsNodeId": f"{node.layer}_{node.number}-0", "activation": node.value,
        }  # fmt: skip
    elif node.kind == "error":
        own = {
            "feature": -1, "layer": str(node.layer), "feature_type": ERROR,
            "jsNodeId": f"{node.layer}_{node.position}-0",
        }  # fmt: skip
    elif node.kind == "embedding":
        own = {
            "feature": node.position, "layer": "E", "feature_type": EMBEDDING,
            "jsNodeId": f"E_{node.number}-{node.position}",
        }  # fmt: skip
    else:
        own = {
            "feature": node.number, "layer": str(layers + 1), "feature_type": LOGIT, "token_prob": node.value,
            "is_target_logit": node.value == top, "jsNodeId": f"L_{node.number}-{node.position}",
            "influence": None, "clerp": f'Output "{node.label}" (p={node.value:.3f})',
        }  # fmt: skip
    return GraphNode.model_validate({**common, **own})


def _read(node: GraphNode, origin: str) -> Node:
    """A node from the layout."""
    kind = KINDS.get(node.feature_type)
    if kind is None:
        raise IntegrityError(
            f"node {node.node_id!r} of {origin} is of a kind that is not known",
            expected=" | ".join(KINDS),
            got=node.feature_type,
        )
    if kind == "embedding":
        token = node.node_id.split("_")[1:2]
        number = int(token[0]) if token and token[0].isdecimal() else -1
        return Node(kind, -1, node.ctx_idx, number, 0.0, node.clerp)
    if not node.layer.isdecimal():
        raise IntegrityError(
            f"the layer of node {node.node_id!r} of {origin}", expected="digits", got=node.layer
        )
    if kind == "feature":
        layer, latent = unpair(node.feature)
        if str(layer) != node.layer:
            raise IntegrityError(
                f"the feature of node {node.node_id!r} of {origin}",
                expected=f"a latent of layer {node.layer}, paired with it",
                got=f"{node.feature}, of layer {layer}",
            )
        return Node(kind, layer, node.ctx_idx, latent, node.activation or 0.0)
    if kind == "error":
        return Node(kind, int(node.layer), node.ctx_idx, -1)
    label = node.clerp.removeprefix('Output "').rpartition('" (p=')[0] or node.clerp
    return Node(kind, int(node.layer) - 1, node.ctx_idx, node.feature, node.token_prob, label)
