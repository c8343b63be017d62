"""An attribution graph as JSON, in the layout of circuit-tracer and Neuronpedia, with a block of our own.

Nodes are named as circuit-tracer names them::

    <layer>_<latent>_<position>     a latent
    0_<layer>_<position>            what a layer's latents miss of its MLP output: an error
    E_<token>_<position>            an embedding
    <L + 1>_<token>_<position>      a logit

`metadata.winnow` says what the graph was traced from; other readers of the layout pass over it.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from winnow.schemas.base import MAX_JSON_BYTES, Contract, Sha256, explain
from winnow.schemas.errors import IntegrityError, UnsupportedVersion
from winnow.schemas.layers import Reads

MAX_NODES = 20_000
"""Most nodes of a file: the adjacency between them is dense once it is read."""
MAX_LINKS = 1_000_000

FEATURE, ERROR, EMBEDDING, LOGIT = "cross layer transcoder", "mlp reconstruction error", "embedding", "logit"
"""`feature_type` of the four kinds of nodes, in circuit-tracer's words; a per-layer set's latents too."""

Name = Annotated[str, Field(min_length=1, max_length=200)]
Text = Annotated[str, Field(max_length=100_000)]
Token = Annotated[int, Field(ge=0, le=1 << 24)]


def pair(layer: int, latent: int) -> int:
    """The one number that stands for a latent of a layer: Cantor's pairing (x + y)(x + y + 1) / 2 + y."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def unpair(feature: int) -> tuple[int, int]:
    """The (layer, latent) that `pair` made a number of."""
    diagonal = (math.isqrt(8 * feature + 1) - 1) // 2
    latent = feature - diagonal * (diagonal + 1) // 2
    return diagonal - latent, latent


class _Foreign(BaseModel):
    """A part of the layout that others extend: fields that are not known here are dropped."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True, allow_inf_nan=False)


class GraphNode(_Foreign):
    """A node: a latent, an error, an embedding or a logit, at a position of the prompt."""

    node_id: Name
    """Its name, by which links refer to it."""
    feature: int = Field(ge=-1, le=1 << 62)
    """Of a latent `pair(layer, latent)`, a logit its token, an embedding its position, an error -1."""
    layer: Name
    """Its layer as text; `E` of an embedding, L + 1 of a logit."""
    ctx_idx: int = Field(ge=0, le=1 << 24)
    """Its position in the prompt."""
    feature_type: Name
    """`cross layer transcoder` (a latent), `mlp reconstruction error`, `embedding` or `logit`."""
    token_prob: float = Field(default=0.0, ge=0, le=1.0001)
    """Of a logit: its probability."""
    is_target_logit: bool = False
    """Of a logit: whether it is the most probable one."""
    run_idx: int = 0
    """Not used."""
    reverse_ctx_idx: int = 0
    """Not used."""
    jsNodeId: str = Field(default="", max_length=200)
    """Name within others' pages."""
    clerp: Text = ""
    """What a page shows as its label."""
    influence: float | None = None
    """Share of all influence on the logits that this node and all more influential ones hold together."""
    activation: float | None = None
    """Of a latent: its activation."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.feature_type == FEATURE and (not self.layer.isdecimal() or self.feature < 0):
            raise ValueError(f"a latent has a layer and a feature, got {self.layer!r} and {self.feature}")
        return self


class GraphLink(_Foreign):
    """An edge: the direct linear effect of its source on its target."""

    source: Name
    """Id of the node that it comes from."""
    target: Name
    """Id of the node that it goes to."""
    weight: float
    """Effect, in units of the target: of a latent's pre-activation, or of a logit."""


class QParams(_Foreign):
    """State of others' page for the graph."""

    pinnedIds: tuple[Name, ...] = Field(default=(), max_length=MAX_NODES)
    """Pinned nodes."""
    supernodes: tuple[tuple[Text, ...], ...] = Field(default=(), max_length=MAX_NODES)
    """Groups of nodes: a group's name and its nodes' ids."""
    linkType: Text = "both"
    """Which links are shown."""
    clickedId: str | None = Field(default="", max_length=200)
    """The node that was clicked last."""
    sg_pos: Text = ""
    """Where groups were put."""


class GraphScores(Contract):
    """How much of a graph's influence goes through latents (Ameisen, Lindsey et al. 2025); 1 is the best."""

    replacement: float = Field(ge=0, le=1.0001)
    """Share of the influence on the logits that starts at embeddings, not at errors."""
    completeness: float = Field(ge=0, le=1.0001)
    """Share of what nodes receive that does not come from errors, weighted by influence; 0.5 or more."""


class GraphLimits(Contract):
    """The limits that a graph was traced and pruned with."""

    max_features: int = Field(ge=0)
    """Most latents that become nodes."""
    max_logits: int = Field(ge=1)
    """Most logits."""
    mass: float = Field(gt=0, le=1)
    """Probability that the logits add up to, if `max_logits` allows."""
    nodes: float | None = Field(default=None, ge=0, le=1)
    """Share of influence that pruning kept nodes for; null if not pruned."""
    edges: float | None = Field(default=None, ge=0, le=1)
    """The same of edges."""


class LeftOut(Contract):
    """What the traced prompt had and the graph does not."""

    latents: int = Field(ge=0)
    """Active latents beyond `max_features`, which have no node."""
    probability: float = Field(ge=0, le=1)
    """Probability of the next tokens that have no node."""
    nodes: int = Field(default=0, ge=0)
    """Nodes that were pruned."""
    links: int = Field(default=0, ge=0)
    """Links that were pruned."""


class GraphOrigin(Contract):
    """`metadata.winnow`: what a graph was traced from, and with which limits."""

    version: str = "1.0"
    """Version of this block, `major.minor`; another major version is refused."""
    set_sha256: Sha256
    """Digest of the set; see `winnow.evaluator.circuits.set_digest`."""
    subject_weights_sha256: Sha256
    """Digest of the subject's weight files."""
    token_ids: tuple[Token, ...] = Field(min_length=1, max_length=1 << 20)
    """The prompt as it was run, BOS included."""
    subject_layers: int = Field(gt=0, le=1 << 16)
    """Number of layers L of the subject."""
    layers: tuple[int, int]
    """First and last layer of the set; other layers' MLP outputs are errors."""
    cross: bool
    """Whether a layer's latents write to later layers as well."""
    reads: Reads
    """The site that latents read."""
    scores: GraphScores
    """Scores before pruning."""
    limits: GraphLimits
    """Limits."""
    left_out: LeftOut
    """What is missing."""


class GraphMetadata(_Foreign):
    """Which prompt, which transcoders."""

    slug: Name
    """Name of the graph, as in a file's name."""
    scan: Name
    """Name of the subject or of the transcoders, by which a page looks latents up."""
    transcoder_list: tuple[Text, ...] = Field(default=(), max_length=10_000)
    """Addresses of transcoders; not used here."""
    prompt_tokens: tuple[Text, ...] = Field(max_length=1 << 20)
    """The prompt's tokens, each as text."""
    prompt: str = Field(max_length=1 << 24)
    """The prompt."""
    node_threshold: float | None = None
    """Share of influence that pruning kept nodes for."""
    schema_version: int | None = 1
    """Version of the layout."""
    winnow: GraphOrigin | None = None
    """What it was traced from; null if another program wrote it."""


class GraphFile(_Foreign):
    """A whole file."""

    metadata: GraphMetadata
    """Which prompt, which transcoders."""
    qParams: QParams = QParams()
    """State of a page."""
    nodes: tuple[GraphNode, ...] = Field(max_length=MAX_NODES)
    """Nodes: latents, errors, embeddings, logits."""
    links: tuple[GraphLink, ...] = Field(max_length=MAX_LINKS)
    """Edges."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        ids = {node.node_id for node in self.nodes}
        if len(ids) < len(self.nodes):
            raise ValueError("several nodes have the same node_id, so that links to them are ambiguous")
        for link in self.links:
            if link.source not in ids or link.target not in ids:
                raise ValueError(f"a link from {link.source!r} to {link.target!r}, which are not both nodes")
        positions = len(self.metadata.prompt_tokens)
        if any(node.ctx_idx >= positions for node in self.nodes):
            raise ValueError(f"a node's ctx_idx is not below the {positions} tokens of the prompt")
        origin = self.metadata.winnow
        if origin is not None and len(origin.token_ids) != positions:
            raise ValueError(f"{len(origin.token_ids)} token_ids of {positions} prompt_tokens")
        return self

    def to_json(self) -> bytes:
        """Return JSON that circuit-tracer's models read, one line to a node or link."""
        raw = self.model_dump(mode="json")
        if raw["metadata"]["winnow"] is None:
            del raw["metadata"]["winnow"]
        head = json.dumps({"metadata": raw["metadata"], "qParams": raw["qParams"]}, allow_nan=False)
        lists = (
            f'"{name}": [\n' + ",\n".join(map(json.dumps, raw[name])) + "\n]" for name in ("nodes", "links")
        )
        return (head[:-1] + ",\n" + ",\n".join(lists) + "}\n").encode()

    @classmethod
    def from_json(cls, data: bytes, *, origin: str) -> Self:
        """Parse bytes as hostile input.

        Args:
            data: The file's bytes.
            origin: Their address, for messages.

        Raises:
            IntegrityError: Not JSON, too large, or fields that do not fit.
            UnsupportedVersion: `metadata.winnow` is of another major version.
        """
        if len(data) > MAX_JSON_BYTES:
            raise IntegrityError(
                f"{origin} is too large to be a graph",
                expected=f"at most {MAX_JSON_BYTES} bytes",
                got=f"{len(data)} bytes",
                fix="Prune it before it is written",
            )
        try:
            raw: Any = json.loads(data)
        except (ValueError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
            raise IntegrityError(
                f"{origin} is not readable JSON", expected="a graph", got=str(error)[:200]
            ) from error
        _check_version(raw, origin)
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise IntegrityError(f"{origin} is not a graph", got=explain(error)) from error


def _check_version(raw: Any, origin: str) -> None:
    """UnsupportedVersion for our block of another major version, whose fields may mean something else."""
    for key in ("metadata", "winnow"):
        raw = cast("dict[str, Any]", raw).get(key) if isinstance(raw, dict) else None
    version = cast("dict[str, Any]", raw).get("version", "1.0") if isinstance(raw, dict) else "1.0"
    if str(version).split(".")[0] != "1":
        raise UnsupportedVersion(
            f"{origin} has a version this Winnow cannot read",
            expected="1.x",
            got=version,
            fix="Read it with the Winnow release that wrote it, or upgrade this one",
        )


Kind = Literal["feature", "error", "embedding", "logit"]
"""What a node is."""

KINDS: dict[str, Kind] = {FEATURE: "feature", ERROR: "error", EMBEDDING: "embedding", LOGIT: "logit"}
"""`feature_type` -> what it is."""
