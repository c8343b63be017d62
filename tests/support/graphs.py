"""Attribution graphs of random numbers in the layout of circuit-tracer and Neuronpedia, of any size.

Letters: L layers, P positions, N latents per layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

PROMPT = [
    "The",
    " capital",
    " of",
    " the",
    " state",
    " that",
    " holds",
    " Dallas",
    " is",
    " the",
    " city",
    " of",
]
ANSWERS = [" Austin", " Houston", " San", " Texas", " the", " Dallas", " New", " Fort"]
WORDS = ["Texas", "capital cities", "say a city", "states of the US", "relative clauses", "place names", "of"]


def cantor(layer: int, latent: int) -> int:
    """The one number that the layout stores for (layer, latent)."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def random_graph(
    nodes: int = 2000,
    links: int = 50_000,
    *,
    layers: int = 12,
    latents: int = 2048,
    tokens: list[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """A graph of about `nodes` nodes and exactly `links` links, all of which lead upward."""
    draw = np.random.default_rng(seed)
    words = PROMPT if tokens is None else tokens
    found = _nodes(draw, nodes, layers, latents, words)
    rank = np.array([-1 if node["layer"] == "E" else int(node["layer"]) for node in found])
    place = np.array([node["ctx_idx"] for node in found])
    # Log-normal fame of a node: a few nodes carry most of the influence, as in graphs of real prompts.
    fame = np.exp(draw.normal(0, 1.4, len(found)))
    chosen = dict.fromkeys(_least_links(draw, found))
    while len(chosen) < links:
        shape = (2, 4 * links)
        source, target = draw.choice(len(found), shape, p=fame / fame.sum())
        # Attention only looks back, and an error node is computed from nothing in the graph.
        fits = (rank[source] < rank[target]) & (place[source] <= place[target])
        fits &= np.array([node["feature_type"] != "mlp reconstruction error" for node in found])[target]
        chosen.update(dict.fromkeys(zip(source[fits].tolist(), target[fits].tolist(), strict=True)))
    pairs = list(chosen)[:links]
    weights = draw.normal(0.35, 1.0, links) * np.exp(draw.normal(-1, 1.2, links))
    weights *= np.array([fame[source] for source, _ in pairs]) / fame.mean()
    return {
        "metadata": {
            "slug": f"random-{seed}",
            "scan": "tiny",
            "transcoder_list": [],
            "prompt_tokens": words,
            "prompt": "".join(words),
            "node_threshold": 0.8,
            "schema_version": 1,
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": found,
        "links": [
            {"source": found[source]["node_id"], "target": found[target]["node_id"], "weight": float(weight)}
            for (source, target), weight in zip(pairs, weights, strict=True)
        ],
    }


def _least_links(draw: Any, nodes: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """A link from every node to a logit, and from an embedding to every latent: pruning keeps them all."""
    logits = [at for at, node in enumerate(nodes) if node["feature_type"] == "logit"]
    embeddings = {node["ctx_idx"]: at for at, node in enumerate(nodes) if node["layer"] == "E"}
    found = [(at, int(draw.choice(logits))) for at in range(len(nodes)) if at not in logits]
    for at, node in enumerate(nodes):
        if node["feature_type"] == "cross layer transcoder":
            found.append((embeddings[int(draw.integers(node["ctx_idx"] + 1))], at))
    return found


def _nodes(draw: Any, count: int, layers: int, latents: int, words: list[str]) -> list[dict[str, Any]]:
    """Logits, embeddings, one error node for every fourth (layer, position), and latents up to `count`."""
    made: list[dict[str, Any]] = []
    shares = np.sort(draw.dirichlet(np.full(len(ANSWERS), 0.6)))[::-1] * 0.95
    for at, (word, share) in enumerate(zip(ANSWERS, shares, strict=True)):
        said = {"token_prob": float(share), "is_target_logit": at == 0, "influence": None, "activation": None}
        clerp = f'Output "{word}" (p={share:.3f})'
        made.append(_node(layers + 1, 100 + at, len(words) - 1, "logit", 100 + at) | said | {"clerp": clerp})
    for at, word in enumerate(words):
        made.append(_node("E", 1000 + at, at, "embedding", at) | {"clerp": f'Emb: "{word}"'})
    for layer in range(layers):
        for at in range(len(words)):
            if (layer + at) % 4 == 0:
                made.append(
                    _node(layer, at, at, "mlp reconstruction error", -1) | {"node_id": f"{layer}_-1_{at}"}
                )
    seen: set[tuple[int, int, int]] = set()
    # Later positions, early and late layers hold more: what graphs of real prompts look like.
    chances = np.linspace(0.4, 1.6, len(words)) / np.linspace(0.4, 1.6, len(words)).sum()
    heights = 0.35 + np.abs(np.linspace(-1, 1, layers))
    while len(made) < count:
        layer = int(draw.choice(layers, p=heights / heights.sum()))
        at, latent = int(draw.choice(len(words), p=chances)), int(draw.integers(latents))
        if (layer, latent, at) not in seen:
            seen.add((layer, latent, at))
            node = _node(layer, latent, at, "cross layer transcoder", cantor(layer, latent))
            clerp = str(draw.choice(WORDS)) if draw.random() < 0.2 else ""
            made.append(node | {"activation": float(draw.gamma(2.0, 1.5)), "clerp": clerp})
    return made


def _node(layer: int | str, number: int, at: int, kind: str, feature: int) -> dict[str, Any]:
    name = f"{layer}_{number}_{at}"
    return {
        "node_id": name,
        "feature": feature,
        "layer": str(layer),
        "ctx_idx": at,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": name,
        "clerp": "",
        "influence": 0.5,
        "activation": None,
    }


def graph_of_set(graph: dict[str, Any], set_sha256: str, *, layers: int) -> dict[str, Any]:
    """The same graph with the block that says which set it was traced with."""
    words = graph["metadata"]["prompt_tokens"]
    origin = {
        "set_sha256": set_sha256,
        "subject_weights_sha256": "0" * 64,
        "token_ids": list(range(len(words))),
        "subject_layers": layers,
        "layers": [0, layers - 1],
        "cross": False,
        "reads": "resid_mid",
        "scores": {"replacement": 0.71, "completeness": 0.85},
        "limits": {"max_features": 2000, "max_logits": 10, "mass": 0.95},
        "left_out": {"latents": 0, "probability": 0.05},
    }
    return graph | {"metadata": graph["metadata"] | {"winnow": origin}}
