"""Edits of latents: what a graph and the replacement model foretell, and what the subject really does.

Letters: P positions, D width of the residual stream, F features of a graph, W variants, V vocabulary.

An edit changes what a latent writes: ``decoder row x (new - old activation)`` is added to the MLP output of
every layer that it writes to, at its position. The rest of the subject reacts as it does. Old is the
activation in the unedited prompt: changes of several edits add up, also where one latent feeds another.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Self

import torch
from torch import Tensor

from winnow.evaluator.circuits.fitting import check_graph, check_set
from winnow.evaluator.circuits.graph import Graph, Node
from winnow.evaluator.circuits.held import Held
from winnow.evaluator.circuits.sources import Sources
from winnow.evaluator.circuits.tracing import trace
from winnow.sae.sets import TranscoderSet
from winnow.schemas.errors import ConfigError
from winnow.subject.load import Subject
from winnow.subject.splice import Replacement

_FORM = re.compile(r"^(\d+)\.(\d+)@(\d+)([=*])(-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)$", re.ASCII)


class Edit(NamedTuple):
    """A change of one latent at one position."""

    layer: int
    """Layer."""
    latent: int
    """Latent of that layer."""
    position: int
    """Position in the prompt."""
    value: float
    """Its new activation, or what it is multiplied with."""
    scales: bool = False
    """Whether `value` multiplies the activation that it has."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `layer.latent@position=0` (a new activation) or `layer.latent@position*2` (a factor).

        Raises:
            ConfigError: Another form.
        """
        match = _FORM.match(text.strip())
        if match is None or not math.isfinite(float(match[5])):
            expected = "layer.latent@position=ACTIVATION or layer.latent@position*FACTOR"
            raise ConfigError(f"the edit {text!r}", expected=expected, fix="For example 3.1207@5=0")
        layer, latent, position, sign, value = match.groups()
        return cls(int(layer), int(latent), int(position), float(value), sign == "*")

    def __str__(self) -> str:
        # All digits, so that it is read back as the same edit.
        value = repr(self.value).removesuffix(".0")
        return f"{self.layer}.{self.latent}@{self.position}{'*' if self.scales else '='}{value}"

    def change(self, before: float) -> float:
        """By how much the activation changes."""
        return self.value * before - before if self.scales else self.value - before


@dataclass(frozen=True)
class Edited:
    """Changes of the logits by edits; a logit counts less the mean over the vocabulary, before any cap."""

    edits: tuple[Edit, ...]
    """The edits."""
    before: tuple[float, ...]
    """The activation of each edited latent as it was."""
    logits: tuple[Node, ...]
    """The graph's logits."""
    foretold: Tensor
    """[logits]: by the graph: along all of its paths, with every latent that is active staying so."""
    held: Tensor
    """[logits]: by the replacement model: latents below are computed anew, attention and norms are held."""
    found: Tensor
    """[logits]: in the subject, nothing held."""
    probabilities: Tensor
    """[logits]: the subject's probabilities after the edits."""


def edit(
    subject: Subject,
    set_: TranscoderSet,
    graph: Graph | Sequence[int] | Tensor,
    edits: Sequence[Edit | str],
) -> Edited:
    """Change latents in the subject, and compare what happens with what a graph foretells.

    Args:
        subject: The whole subject, in float32.
        set_: A set of it, on its device.
        graph: A graph of this set and subject, or token ids [P], which are traced first.
        edits: Edits, or their text; see `Edit.parse`.

    Raises:
        ConfigError: There are no edits, one is malformed, one is of a latent that is not active, or two are
            of the same latent.
        SaeMismatch: The graph is of another set or subject.
    """
    changes = tuple(Edit.parse(each) if isinstance(each, str) else each for each in edits)
    if not changes:
        raise ConfigError("edits", expected="at least one", got="none")
    # Each says by how much the activation changes from what it was: of two, both changes would be made.
    if twice := [place for place, count in Counter(each[:3] for each in changes).items() if count > 1]:
        layer, latent, position = twice[0]
        raise ConfigError("edits", expected="each latent once", got=f"{layer}.{latent}@{position} twice")
    if not isinstance(graph, Graph):
        graph = trace(subject, set_, graph)
    prompt = Prompt(subject, set_, graph)
    numbers = [prompt.number(each) for each in changes]
    before = tuple(float(prompt.sources.activation[number]) for number in numbers)
    by = [each.change(old) for each, old in zip(changes, before, strict=True)]
    added = prompt.added(list(zip(numbers, by, strict=True)))
    foretold = torch.zeros(len(prompt.logits))
    for number, change, old in zip(numbers, by, before, strict=True):
        foretold += prompt.foretold(number) * (change / old)
    found, after = prompt.found([added])
    return Edited(changes, before, prompt.logits, foretold, prompt.replaced(added), found[0], after[0])


Added = dict[int, Tensor]
"""Layer -> what is added to its MLP output [P, D]."""


class Prompt:
    """A graph's prompt, held, ready for edits."""

    def __init__(self, subject: Subject, set_: TranscoderSet, graph: Graph) -> None:
        check_set(subject, set_)
        origin = check_graph(subject, set_, graph.origin)
        self.subject, self.set, self.graph = subject, set_, graph
        self.held = Held(subject, torch.tensor(origin.token_ids)[None], set_.of.reads)
        self.sources = Sources(set_, self.held)
        self.logits = tuple(node for node in graph.nodes if node.kind == "logit")
        places = torch.stack([self.sources.layer, self.sources.latent, self.sources.position], 1)
        self._known = {tuple(place): number for number, place in enumerate(places.tolist())}
        rows = self.held.unembedding
        self._tokens = torch.tensor([node.number for node in self.logits])
        self._directions = rows[self._tokens] - rows.mean(0)
        self._features = [at for at, node in enumerate(graph.nodes) if node.kind == "feature"]
        self._effects = total_effects(graph)
        self._still = self.held.run(self.held.stream[0], lambda layer, _: self.held.mlp_out[layer])

    def number(self, edit: Edit) -> int:
        """The number among the prompt's active latents of an edited one; ConfigError if it is not active."""
        number = self._known.get((edit.layer, edit.latent, edit.position))
        if number is None:
            places = sorted({at for layer, _, at in self._known if layer == edit.layer})
            here = [latent for layer, latent, at in self._known if (layer, at) == (edit.layer, edit.position)]
            raise ConfigError(
                f"the edit {edit}",
                expected=f"a latent of layer {edit.layer} that is active at position {edit.position}",
                got=f"latent {edit.latent}, which is not",
                fix=f"Active there: {', '.join(map(str, here[:20]))}"
                if here
                else f"Positions with active latents: {', '.join(map(str, places)) or 'none in this layer'}",
            )
        return number

    def number_of(self, node: Node) -> int:
        """The number of a feature of the graph."""
        return self.number(Edit(node.layer, node.number, node.position, 0.0))

    def added(self, changes: Sequence[tuple[int, float]]) -> Added:
        """What changes of activations add to MLP outputs; latents by their number."""
        found: Added = {}
        for number, change in changes:
            layer, latent = int(self.sources.layer[number]), self.sources.latent[number][None]
            for target in self.set.targets(layer):
                rows = found.setdefault(target, torch.zeros_like(self.held.mlp_out[target]))
                row = self.set.decoder_rows(layer, latent, target)[0]
                rows[self.sources.position[number]] += change * row
        return found

    def foretold(self, number: int) -> Tensor:
        """The graph's change [logits] if a latent is doubled: minus that if it is taken away."""
        layer, latent, position = (
            int(each[number]) for each in (self.sources.layer, self.sources.latent, self.sources.position)
        )
        at = self.graph.index.get(("feature", layer, position, latent))
        if at is not None:
            return self._effects[:, self._features.index(at)]
        return self._foretold_outside(number)

    def _foretold_outside(self, number: int) -> Tensor:
        """The same of a latent that is no node: its effects on the nodes, by a pass of the held model."""
        added = self.added([(number, float(self.sources.activation[number]))])
        own = self.held.mlp_out
        moved = self.held.run(self.held.stream[0], lambda layer, _: own[layer] + added.get(layer, 0.0))
        direct = (self._directions @ (moved.final - self._still.final)[-1]).cpu()
        shares = torch.zeros(len(self._features))
        for row, at in enumerate(self._features):
            node = self.graph.nodes[at]
            change = (moved.reads[node.layer] - self._still.reads[node.layer])[node.position]
            if change.any():
                encoder = self.set.encoder_rows(node.layer, torch.tensor([node.number]))[0]
                shares[row] = encoder @ change / node.value
        return direct + self._effects @ shares

    @torch.no_grad()
    def replaced(self, added: Added) -> Tensor:
        """The replacement model's change [logits]: latents are encoded anew, errors and patterns are held."""

        def run(added: Added) -> Tensor:
            rows: dict[int, Tensor] = {}

            def mlp_out(layer: int, read: Tensor) -> Tensor:
                if layer in self.set.layers:
                    rows[layer] = read
                    told = self.set.decode(self.set.encode(rows), rows, targets=[layer])[layer]
                    return told + self.sources.errors[layer] + added.get(layer, 0.0)
                return self.held.mlp_out[layer]

            return self._directions @ self.held.run(self.held.stream[0], mlp_out).final[-1]

        return (run(added) - run({})).cpu()

    @torch.no_grad()
    def found(self, variants: Sequence[Added]) -> tuple[Tensor, Tensor]:
        """What the subject does: changes of the logits, and probabilities after them, [W, logits] each."""
        # Variant 0 stays clean: in the same batch float noise is the same on both sides of the difference.
        count, positions = len(variants) + 1, self.held.positions
        final: list[Tensor] = []

        def add(layer: int, rows: Tensor) -> Tensor:
            own = torch.zeros_like(rows).view(count, positions, -1)
            for at, variant in enumerate(variants, start=1):
                if layer in variant:
                    own[at] = variant[layer]
            return rows + own.view_as(rows)

        def keep(rows: Tensor) -> Tensor:
            final.append(rows.view(count, positions, -1)[:, -1])
            return rows

        layers = sorted({layer for variant in variants for layer in variant})
        replace: dict[str, Replacement] = {f"mlp_out.{layer}": partial(add, layer) for layer in layers}
        replace[str(self.subject.layout.final_norm)] = keep
        logits = self.subject.logits(self.held.ids.expand(count, -1), replace)[:, -1].float()
        values = final[0] @ self._directions.T
        return (values[1:] - values[:1]).cpu(), logits.softmax(1)[1:].cpu()[:, self._tokens]


def total_effects(graph: Graph) -> Tensor:
    """The effect [logits, F] of doubling each feature, along all paths through the graph's features.

    A feature of activation a whose pre-activation grows by d passes on d / a of its own effects: it stays
    active, and its activation is its pre-activation.
    """
    at = torch.tensor([i for i, node in enumerate(graph.nodes) if node.kind == "feature"], dtype=torch.int64)
    ends = torch.tensor([i for i, node in enumerate(graph.nodes) if node.kind == "logit"], dtype=torch.int64)
    layers = torch.tensor([graph.nodes[i].layer for i in at.tolist()])
    # By layer, as features only read lower ones: the system is triangular whatever the file's order was.
    order = layers.argsort(stable=True)
    at = at[order]
    values = torch.tensor([graph.nodes[i].value for i in at.tolist()], dtype=torch.float64)
    among = graph.adjacency[at][:, at].double() / values[:, None]
    direct = graph.adjacency[ends][:, at].double()
    system = torch.eye(len(at), dtype=torch.float64) - among
    found = torch.linalg.solve_triangular(system, direct, upper=False, left=False, unitriangular=True)
    effects = torch.empty_like(found)
    effects[:, order] = found
    return effects.float()
