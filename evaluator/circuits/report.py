"""What `winnow circuit` does: traces a prompt or reads a graph, edits, measures; gives back plain JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from winnow.common.reporter import say
from winnow.common.shared_files import write_whole
from winnow.evaluator.circuits.editing import Edited, edit
from winnow.evaluator.circuits.graph import Graph, Node
from winnow.evaluator.circuits.paths import strongest_paths
from winnow.evaluator.circuits.tracing import trace
from winnow.sae.sets import TranscoderSet
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError
from winnow.schemas.fit import check_subject
from winnow.schemas.subject import SubjectSpec
from winnow.schemas.window import WindowRule
from winnow.store.read.reader import ActivationStore
from winnow.subject.load import Subject


def subject_of(set_: TranscoderSet, stated: SubjectSpec | None) -> Subject:
    """Load the subject of a set, in float32.

    Raises:
        ConfigError: Neither the set's card nor the user says which subject it is.
    """
    identity = set_.card.identity if set_.card is not None else None
    if stated is None and identity is None:
        raise ConfigError(
            "the set's subject", expected="--subject MODEL or --config FILE", got="a card without it",
            fix="Name the language model that the set was trained on",
        )  # fmt: skip
    spec = stated or SubjectSpec(model=identity.subject_model if identity else "")
    say("loading the subject")
    # Edges are differences of small numbers: bfloat16 would be most of them.
    return Subject.load(spec.model_copy(update={"dtype": "float32"}))


def read_graph(path: Path) -> Graph:
    """Read a graph's file.

    Raises:
        ConfigError: It is not there.
        IntegrityError: It is no graph.
    """
    try:
        return Graph.from_json(path.read_bytes(), origin=str(path))
    except OSError as error:
        fix = "Trace it with --prompt TEXT --out FILE first"
        raise ConfigError(f"the graph {path} cannot be read", got=error.strerror, fix=fix) from error


def write_graph(graph: Graph, path: Path) -> None:
    """Write a graph's file, whole or not at all."""
    write_whole(path, graph.to_json())


def trace_prompt(
    subject: Subject, set_: TranscoderSet, prompt: str, targets: Sequence[str], *, slug: str, **limits: Any
) -> Graph:
    """Trace a prompt, which begins as the windows did that the set was trained on.

    Raises:
        ConfigError: As for `trace`; a target that is not one token.
    """
    rule = set_.card.window if set_.card is not None else None
    ids = subject.encode(prompt, rule)
    if not ids:
        raise ConfigError("--prompt", expected="at least one token", got=repr(prompt))
    tokens = [_single_token(subject, target) for target in targets]
    return trace(subject, set_, ids, targets=tokens, slug=slug, **limits)


def _single_token(subject: Subject, text: str) -> int:
    ids = subject.encode(text, WindowRule(control_tokens="token"))
    if len(ids) != 1:
        pieces = [subject.tokenizer.decode([piece]) for piece in ids]
        raise ConfigError(
            "--targets",
            expected="one token of the subject's",
            got=repr(pieces),
            fix="Most words begin with a space",
        )
    return ids[0]


def edit_graph(subject: Subject, set_: TranscoderSet, graph: Graph, edits: Sequence[str]) -> dict[str, Any]:
    """Edit latents of a graph's prompt; JSON with `edits` and `logits`."""
    return described(edit(subject, set_, graph, edits))


def described(found: Edited) -> dict[str, Any]:
    """An edit's results as JSON."""
    return {
        "edits": [
            {"edit": str(each), "before": before}
            for each, before in zip(found.edits, found.before, strict=True)
        ],
        "logits": [
            {
                "token": node.number,
                "text": node.label,
                "probability": node.value,
                "foretold": float(found.foretold[at]),
                "held": float(found.held[at]),
                "found": float(found.found[at]),
                "probability_after": float(found.probabilities[at]),
            }
            for at, node in enumerate(found.logits)
        ],
    }


def summary(graph: Graph, top: int) -> dict[str, Any]:
    """A graph in short, as JSON: counts, scores, what is left out, logits, the strongest paths."""
    kinds = [node.kind for node in graph.nodes]
    scores = graph.scores
    tokens = graph.metadata.prompt_tokens
    logits = [node for node in graph.nodes if node.kind == "logit"]
    return {
        "prompt": graph.metadata.prompt,
        "features": kinds.count("feature"),
        "errors": kinds.count("error"),
        "links": int((graph.adjacency != 0).sum()),
        "replacement": scores.replacement,
        "completeness": scores.completeness,
        "left_out": graph.origin.left_out.model_dump() if graph.origin else None,
        "logits": [{"token": each.number, "text": each.label, "probability": each.value} for each in logits],
        "paths": [
            {
                "share": path.share,
                "positive": path.positive,
                "nodes": [_shown(graph.nodes[at], tokens) for at in path.nodes],
            }
            for path in strongest_paths(graph, top)
        ],
    }


def _shown(node: Node, tokens: Sequence[str]) -> str:
    """A node as a path's table shows it: with its token."""
    token = tokens[node.position] if node.position < len(tokens) else ""
    if node.kind == "feature":
        return f"{node.name} {token!r}"
    if node.kind == "error":
        return f"error {node.layer}@{node.position} {token!r}"
    return f"{token!r}@{node.position}" if node.kind == "embedding" else f"says {node.label!r}"


def held_out_windows(subject: Subject, root: str, most: int, storage: StorageSpec) -> torch.Tensor:
    """Read the first held-out windows int64 [W, T] of the dataset that a set was trained on.

    Where attention was kept inside documents, only windows of a single one: a prompt is one text.

    Raises:
        ConfigError: There is no dataset, or it has no such windows.
        SaeMismatch: It was harvested from another subject.
    """
    dataset = ActivationStore.open(root, storage)
    plan = dataset.plan
    check_subject(subject.identity, plan.subject)
    found: list[torch.Tensor] = []
    # The first ones are a random sample: the plan shuffles windows over the whole corpus.
    for unit in plan.split_units("validation"):
        if sum(map(len, found)) >= most:
            break
        rows = torch.from_numpy(dataset.unit_tokens(unit).astype("int64"))
        first = unit * plan.spec.windows_per_unit
        places = dataset.positions(range(first, first + len(rows)))
        if places is not None:
            rows = rows[torch.from_numpy((places == np.arange(rows.shape[1])).all(axis=1))]
        found.append(rows)
    if not sum(map(len, found)):
        whole = " of a single document (plan.attend: document)" if plan.spec.attend == "document" else ""
        raise ConfigError(
            f"the dataset {root}", expected=f"held-out windows{whole}", got="none",
            fix="Plan it with plan.validation_units of 1 or more",
        )  # fmt: skip
    return torch.cat(found)[:most]


def trace_windows(
    subject: Subject, set_: TranscoderSet, windows: torch.Tensor, prune: tuple[float, float], **limits: Any
) -> list[Graph]:
    """Trace windows [W, T] as prompts, and prune the graphs to these shares of nodes and edges."""
    return [trace(subject, set_, window, **limits).prune(*prune) for window in windows]


def windows_of(subject: Subject, set_: TranscoderSet, text: str, length: int, most: int) -> torch.Tensor:
    """Cut a text into windows int64 [W, length] that begin as those did that the set was trained on.

    Raises:
        ConfigError: The text is shorter than one window.
    """
    rule = set_.card.window if set_.card is not None else None
    # What precedes any text: a set that others trained may have no rule, and the tokenizer its own.
    ids, head = subject.encode(text, rule), subject.encode("", rule)
    body, step = ids[len(head) :], length - len(head)
    windows = [head + body[low : low + step] for low in range(0, len(body) - step + 1, step)][:most]
    if not windows:
        raise ConfigError("--text", expected=f"{length} tokens or more", got=len(ids))
    return torch.tensor(windows)
