"""A graph as the page wants it, what its latents are about, and edits of them in the subject.

The page draws tens of thousands of links, so a graph is sent as one list per field: a third of the bytes of
one object per node, and the page copies the lists into typed arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from winnow.explorer.site.exhibit import Exhibit
from winnow.explorer.site.graphs import Shelf
from winnow.explorer.site.lane import Lane
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.graph import EMBEDDING, ERROR, LOGIT, GraphFile, GraphNode, unpair

KINDS = ("embedding", "error", "feature", "logit")
"""What a number in the column `kind` stands for."""
_KIND_OF = {EMBEDDING: 0, ERROR: 1, LOGIT: 3}
_FEATURE = 2
# Layers above are no subject's; the page would draw a row for each.
_MAX_LAYER = 10_000
_LABEL_TOKENS = 2


@dataclass(frozen=True)
class LatentEdit:
    """One change of one latent at one position, or at all positions where it is active.

    Attributes:
        layer: Its layer.
        latent: Its number.
        position: Where; None takes every position of the prompt at which it is in the graph.
        op: `clamp` to `strength`, `scale` by it, or `ablate`.
        strength: In the unit of the graph's activations for `clamp`, a factor for `scale`.
    """

    layer: int
    latent: int
    position: int | None
    op: Literal["clamp", "scale", "ablate"]
    strength: float


@dataclass(frozen=True)
class Outcome:
    """What an edit does to one logit of a graph.

    Attributes:
        token: The token.
        before: Its probability without the edit.
        after: Its probability with it, as found in the subject.
        foretold: Change of its logit that the graph's links foretell.
        held: The same by the replacement model, in which later latents are computed anew.
        found: Change of its logit in the subject.
    """

    token: str
    before: float
    after: float
    foretold: float
    held: float
    found: float


Runner = Callable[[GraphFile, list[LatentEdit]], list[Outcome]]
"""Runs edits of a graph's latents in the subject."""


@dataclass
class Circuits:
    """All that the graph's page needs.

    Attributes:
        shelf: The graphs.
        layers: Layer of the set -> number of the exhibit with its index; layers without an index are missing.
        unindexed: Layers of the set without an index.
        set_sha256: Digest of the set, as graphs name it; None without a set.
        runner: Runs edits; None if the server has no set or no subject.
    """

    shelf: Shelf = field(default_factory=Shelf)
    layers: dict[int, int] = field(default_factory=dict)
    unindexed: tuple[int, ...] = ()
    set_sha256: str | None = None
    runner: Runner | None = None

    def facts(self, graph: GraphFile) -> dict[str, Any]:
        """What the page says about a graph beside its nodes."""
        refusal, origin, stranger = self.refusal(graph), graph.metadata.winnow, self.stranger(graph)
        return {
            "prompt": graph.metadata.prompt,
            "threshold": graph.metadata.node_threshold,
            "scores": origin.scores.model_dump() if origin else None,
            "left_out": origin.left_out.model_dump() if origin else None,
            "supernodes": graph.qParams.supernodes,
            "saes": {str(layer): number for layer, number in self.layers.items() if stranger is None},
            # Why latents have no cards, if there are indexes.
            "other_set": None if stranger is None else str(stranger),
            # Why latents cannot be edited; the page shows it in the place of the form.
            "no_edits": None if refusal is None else str(refusal),
        }

    def stranger(self, graph: GraphFile) -> ConfigError | None:
        """Why this set's latents are not those of the graph, or None: also if the file does not say."""
        origin = graph.metadata.winnow
        if self.set_sha256 is None or origin is None or origin.set_sha256 == self.set_sha256:
            return None
        return self._other_set(origin.set_sha256)

    def _other_set(self, got: str | None) -> ConfigError:
        return ConfigError(
            "the set of this graph",
            expected=self.set_sha256,
            got=got or "none, the file does not say",
            fix="Trace the prompt with this set: `winnow circuit SET --prompt ...`",
        )

    def refusal(self, graph: GraphFile) -> ConfigError | None:
        """Why no latent of this graph can be edited, or None."""
        of = graph.metadata.winnow.set_sha256 if graph.metadata.winnow else None
        if self.set_sha256 is None or self.runner is None:
            return ConfigError(
                "edits run in the subject",
                expected="a set and its subject",
                got="an explorer without a set"
                if self.set_sha256 is None
                else "an explorer without a subject",
                fix="Start it as `winnow explore SET --config FILE`",
            )
        if of != self.set_sha256:
            return self._other_set(of)
        return None

    def run(self, graph: GraphFile, edits: list[LatentEdit], lane: Lane) -> list[Outcome]:
        """Run edits of a graph's latents in the subject, in turn with all other requests.

        Raises:
            ConfigError: No set or subject, a graph of another set, or a latent that the graph does not have.
            Busy: No seat is free.
        """
        refusal = self.refusal(graph)
        if refusal is not None or self.runner is None:
            raise refusal or ConfigError("edits", expected="a subject")
        check_active(graph, edits)
        with lane.visit():
            return self.runner(graph, edits)


def check_active(graph: GraphFile, edits: list[LatentEdit]) -> None:
    """Check that a graph has every latent that is edited.

    Raises:
        ConfigError: One is not in the graph at that position, or at any.
    """
    active = {(layer, latent, at) for layer, latent, at in latents_of(graph)}
    anywhere = {(layer, latent) for layer, latent, _ in active}
    for edit in edits:
        key = (edit.layer, edit.latent)
        if key not in anywhere or (edit.position is not None and (*key, edit.position) not in active):
            where = "" if edit.position is None else f" at position {edit.position}"
            raise ConfigError(
                "edits",
                expected="latents that are active in this graph",
                got=f"latent {edit.latent} of layer {edit.layer}{where}",
            )


def columns(graph: GraphFile, exhibits: Mapping[int, Exhibit]) -> dict[str, Any]:
    """A graph's nodes and links, one list per field.

    Args:
        graph: The graph.
        exhibits: Layer -> the index of its latents, as far as there is one.
    """
    nodes, number = graph.nodes, {node.node_id: at for at, node in enumerate(graph.nodes)}
    kinds = [_KIND_OF.get(node.feature_type, _FEATURE) for node in nodes]
    layers = [_layer(node) for node in nodes]
    latents = [
        unpair(node.feature)[1] if kind == _FEATURE and node.feature >= 0 else None
        for node, kind in zip(nodes, kinds, strict=True)
    ]
    return {
        "tokens": graph.metadata.prompt_tokens,
        "nodes": {
            "id": [node.node_id for node in nodes],
            "kind": kinds,
            "layer": layers,
            "position": [node.ctx_idx for node in nodes],
            "latent": latents,
            "activation": [_short(node.activation) for node in nodes],
            "probability": [_short(node.token_prob) for node in nodes],
            "label": [
                node.clerp or _label(exhibits.get(layer), latent)
                for node, layer, latent in zip(nodes, layers, latents, strict=True)
            ],
        },
        "links": {
            "source": [number[link.source] for link in graph.links],
            "target": [number[link.target] for link in graph.links],
            "weight": [_short(link.weight) for link in graph.links],
        },
    }


def latents_of(graph: GraphFile) -> list[tuple[int, int, int]]:
    """(layer, latent, position) of every latent in a graph."""
    return [
        (*unpair(node.feature), node.ctx_idx)
        for node in graph.nodes
        if _KIND_OF.get(node.feature_type, _FEATURE) == _FEATURE and node.feature >= 0
    ]


def _layer(node: GraphNode) -> int:
    if node.layer.isdecimal() and len(node.layer) < len(str(_MAX_LAYER)):
        return int(node.layer)
    if node.feature_type == EMBEDDING:
        return -1
    raise IntegrityError(
        f"the layer of node {node.node_id}", expected=f"a number below {_MAX_LAYER:,}", got=node.layer
    )


def _label(exhibit: Exhibit | None, latent: int | None) -> str:
    """A latent in a few words: its explanation, else the tokens that it fires on."""
    if exhibit is None or latent is None or latent >= exhibit.table.meta.latents:
        return ""
    explained = exhibit.table.explanations.get(latent)
    if explained:
        return explained[0].text
    favourites = exhibit.table.summary.column("token_ids")[latent].as_py()[:_LABEL_TOKENS]
    return " / ".join(exhibit.words(favourites))


def _short(value: float | None) -> float | None:
    # Five digits are more than a page shows, and halve the JSON of 50,000 links.
    return None if value is None else float(f"{value:.5g}")
