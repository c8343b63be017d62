"""Edits of a graph's latents, run in the subject for the graph's page."""

from __future__ import annotations

from functools import cache

from winnow.evaluator.circuits import report
from winnow.evaluator.circuits.editing import Edit, edit
from winnow.evaluator.circuits.graph import Graph
from winnow.explorer.site.circuit import LatentEdit, Outcome, Runner, latents_of
from winnow.explorer.site.layers import OpenSet
from winnow.sae.sets import TranscoderSet
from winnow.schemas.config import StorageSpec
from winnow.schemas.graph import GraphFile
from winnow.schemas.subject import SubjectSpec
from winnow.subject.load import Subject


def make_runner(of: OpenSet, subject: SubjectSpec | None, storage: StorageSpec) -> Runner | None:
    """Runs edits of graphs of a set; None if neither the set's card nor the user says which subject it is.

    Args:
        of: The set. It and its subject are loaded with the first edit.
        subject: The subject, if not as the set's card names it.
        storage: Credentials and endpoint of the set's address.
    """
    if subject is None and of.card.identity is None:
        return None

    @cache
    def loaded() -> tuple[Subject, TranscoderSet]:
        set_ = TranscoderSet.load(of.uri, storage=storage)
        # Not the subject of the other pages: that may be in bfloat16, in which edges are mostly rounding.
        model = report.subject_of(set_, subject)
        return model, set_.to(model.device)

    def run(file: GraphFile, edits: list[LatentEdit]) -> list[Outcome]:
        return outcomes(*loaded(), Graph.from_json(file.to_json()), _placed(file, edits))

    return run


def outcomes(subject: Subject, set_: TranscoderSet, graph: Graph, edits: list[Edit]) -> list[Outcome]:
    """What edits do to each logit of a graph; errors as of `winnow.evaluator.circuits.edit`."""
    found = edit(subject, set_, graph, edits)
    changes = zip(found.foretold.tolist(), found.held.tolist(), found.found.tolist(), strict=True)
    return [
        Outcome(node.label, node.value, after, *change)
        for node, after, change in zip(found.logits, found.probabilities.tolist(), changes, strict=True)
    ]


def _placed(file: GraphFile, edits: list[LatentEdit]) -> list[Edit]:
    """Edits of single positions; one without a position becomes one per position that the graph has."""
    found: list[Edit] = []
    for each in edits:
        where = [at for layer, latent, at in latents_of(file) if (layer, latent) == (each.layer, each.latent)]
        value = 0.0 if each.op == "ablate" else each.strength
        for at in where if each.position is None else [each.position]:
            found.append(Edit(each.layer, each.latent, at, value, scales=each.op == "scale"))
    return found
