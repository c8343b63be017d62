"""Sets and graphs against circuit-tracer itself, which runs in its own environment: see `make peers`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.peers import CIRCUITS, environment, installed
from tests.support.making import dense
from tests.support.sets import random_set
from tests.support.tiny import make_subject
from winnow.evaluator.circuits import Graph, edit, trace
from winnow.sae.formats.sets import export_set, import_set
from winnow.sae.sets import TranscoderSet
from winnow.schemas.errors import IntegrityError
from winnow.schemas.subject import SubjectSpec
from winnow.store.objects import open_store
from winnow.subject.load import Subject

if not installed(CIRCUITS):
    pytest.skip("circuit-tracer is not installed: `make peers`", allow_module_level=True)

L, D, N = 3, 16, 32
TOKENS = [0, 5, 17, 44, 90, 12]
LARGEST_ERROR = 1e-5
PROGRAM = Path(__file__).parents[2] / "benchmarks" / "circuit_peer.py"
CASES = {
    "llama-plt": ("llama", {"cross": False, "activation": "jumprelu"}),
    "llama-clt": ("llama", {"cross": True, "activation": "batchtopk"}),
    "gpt2-plt": ("gpt2", {"cross": False, "activation": "jumprelu", "reads": "mlp_in"}),
    "gpt2-clt": ("gpt2", {"cross": True, "activation": "jumprelu"}),
}


def run(*arguments) -> dict:
    """Run the program in circuit-tracer's environment; what it prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        env=environment(CIRCUITS), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Case -> its folder, with our set in `ours` and the export in `theirs`."""
    folders = {}
    for name, (_, options) in CASES.items():
        folder = folders[name] = tmp_path_factory.mktemp(name.split("-")[1])
        random_set(L, d_model=D, latents=N, **options).save(open_store(str(folder / "ours")))
        export_set(str(folder / "ours"), "circuit-tracer", folder / "theirs")
    return folders


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """Architecture -> its folder, whose name holds no family's name."""
    root = tmp_path_factory.mktemp("subjects")
    # TransformerLens wants `n_ctx`, which GPT-2's published config has, and an MLP of four times the width.
    return {
        "llama": make_subject(root / "one", "llama", layers=L, width=D),
        "gpt2": make_subject(root / "two", "gpt2", layers=L, width=D, n_ctx=256, n_inner=4 * D),
    }


@pytest.mark.parametrize("name", ["llama-plt", "llama-clt"])
def test_its_loader_reads_our_export_and_gives_the_same_codes(exported, tmp_path, name):
    ours = TranscoderSet.load(exported[name] / "ours")
    draw = torch.Generator().manual_seed(1)
    x = {layer: 2 * torch.randn(64, D, generator=draw) + 0.5 for layer in ours.layers}
    save_file({str(layer): rows for layer, rows in x.items()}, tmp_path / "rows.safetensors")
    run("encode", exported[name] / "theirs", tmp_path / "rows.safetensors", tmp_path / "out.safetensors")
    theirs, expected = load_file(tmp_path / "out.safetensors"), ours(x)
    for layer, codes in ours.encode(x).items():
        assert (theirs["codes"][layer] - dense(*codes, latents=N)).abs().max() < LARGEST_ERROR
        assert (theirs["y"][layer] - expected[layer]).abs().max() < LARGEST_ERROR


def names_of_theirs(found: dict[str, torch.Tensor]) -> list[tuple]:
    """Their nodes in the order of the adjacency, as (kind, layer, position, number)."""
    places = [(layer, position) for layer in range(L) for position in range(len(TOKENS))]
    last = len(TOKENS) - 1
    return [
        *(("feature", *row) for row in found["active"][found["selected"]].tolist()),
        *(("error", layer, position, -1) for layer, position in places),
        *(("embedding", -1, position, token) for position, token in enumerate(TOKENS)),
        *(("logit", L, last, token) for token in found["logit_tokens"].tolist()),
    ]


@pytest.mark.parametrize("name", CASES)
def test_a_graph_has_its_nodes_and_edges(exported, subjects, tmp_path, name):
    folder = subjects[CASES[name][0]]
    tokens = ",".join(map(str, TOKENS))
    run("graph", exported[name] / "theirs", folder, tokens, tmp_path, "--write-json")
    found = load_file(tmp_path / "graph.safetensors")
    subject = Subject.load(SubjectSpec(model=str(folder), dtype="float32", device="cpu"))
    graph = trace(subject, TranscoderSet.load(exported[name] / "ours"), TOKENS, max_features=10_000)
    ours, theirs = graph.index, {node: at for at, node in enumerate(names_of_theirs(found))}

    # It leaves out what position 0 does in its layers; the embedding there it keeps.
    def counts(node):
        return node[2] > 0 or node[0] == "embedding"

    nodes = sorted(filter(counts, ours))
    assert nodes == sorted(filter(counts, theirs))
    assert sum(node[0] == "feature" for node in nodes) > 10
    at, there = [ours[node] for node in nodes], [theirs[node] for node in nodes]
    mine, edges = graph.adjacency[at][:, at], found["adjacency"][there][:, there]
    if CASES[name][0] == "gpt2":
        # Its embeddings are the tokens' alone; Winnow's hold the learned positions, too.
        latents = torch.tensor([node[0] != "embedding" for node in nodes])
        assert (mine - edges)[:, ~latents].abs().max() > 0.01
        mine, edges = mine[:, latents], edges[:, latents]
    # Relative to the largest edge into a target: an edge may be a small difference of large paths.
    largest = edges.abs().amax(1, keepdim=True)
    assert ((mine - edges).abs() <= 1e-3 * largest).all()
    assert (mine - edges).norm() < 1e-5 * edges.norm()
    values = {node: graph.nodes[ours[node]].value for node in nodes if node[0] == "feature"}
    active = zip(found["active"].tolist(), found["activations"].tolist(), strict=True)
    for row, value in active:
        assert values["feature", *row] == pytest.approx(value, rel=1e-4)
    # Its file is read, unless it gave two nodes one id (findings/circuit_tracer_node_ids.sh).
    written = (tmp_path / "graph.json").read_bytes()
    ids = [node["node_id"] for node in json.loads(written)["nodes"]]
    if len(set(ids)) < len(ids):
        with pytest.raises(IntegrityError, match="same node_id"):
            Graph.from_json(written)
    else:
        read = Graph.from_json(written)
        assert {node[:4] for node in read.nodes if node.kind == "feature"} <= set(theirs)


@pytest.mark.parametrize("name", ["llama-plt", "llama-clt"])
def test_its_intervention_that_holds_nothing_is_our_edit(exported, subjects, tmp_path, name):
    subject = Subject.load(SubjectSpec(model=str(subjects["llama"]), dtype="float32", device="cpu"))
    set_ = TranscoderSet.load(exported[name] / "ours")
    graph = trace(subject, set_, TOKENS, max_features=10_000)
    of_layer: dict[int, list] = {}
    for node in graph.nodes:
        if node.kind == "feature" and node.position > 0:
            of_layer.setdefault(node.layer, []).append(node)
    # Another of the last layer may read what the first writes; at the last position it moves the logits.
    first = max(of_layer[0], key=lambda node: node.position)
    later = max(of_layer[L - 1], key=lambda node: node.position)
    for number, nodes in enumerate(([first], [first, later])):
        edits = [f"{node.layer}.{node.number}@{node.position}=0" for node in nodes]
        asked = [[node.layer, node.position, node.number, 0.0] for node in nodes]
        out, tokens = tmp_path / str(number), ",".join(map(str, TOKENS))
        run("intervene", exported[name] / "theirs", subjects["llama"], tokens, json.dumps(asked), out)
        logits = load_file(out / "logits.safetensors")
        ours = edit(subject, set_, graph, edits)
        at = [node.number for node in ours.logits]

        def change(way, logits=logits, at=at):
            moved = logits[way] - logits["unedited"]
            return (moved - moved.mean())[at]

        if len(nodes) == 1:
            assert torch.allclose(ours.found, change("nothing"), atol=1e-5)
            # It holds attention's patterns unless told otherwise, or norms and MLPs as well.
            assert all((ours.found - change(way)).abs().max() > 1e-3 for way in ("default", "all"))
        elif name == "llama-plt":
            # Ours add up changes from the unedited prompt; it sets the later latent as it then stands.
            assert later.position == len(TOKENS) - 1
            assert (ours.found - change("nothing")).abs().max() > 1e-2


def test_its_models_read_our_graph(exported, subjects, tmp_path):
    subject = Subject.load(SubjectSpec(model=str(subjects["llama"]), dtype="float32", device="cpu"))
    graph = trace(subject, TranscoderSet.load(exported["llama-clt"] / "ours"), TOKENS).prune()
    (tmp_path / "graph.json").write_bytes(graph.to_json())
    said = run("check", tmp_path / "graph.json")
    assert said == {"nodes": len(graph.nodes), "links": int((graph.adjacency != 0).sum()), "slug": "graph"}


def test_what_it_saves_is_read(exported, tmp_path):
    """Its own writer's files, of what it loaded from our export."""
    for name in ("llama-plt", "llama-clt"):
        out = tmp_path / name
        run("save", exported[name] / "theirs", out)
        (out / "config.yaml").write_bytes((exported[name] / "theirs" / "config.yaml").read_bytes())
        import_set(out, "circuit-tracer", str(tmp_path / f"{name}-back"))
        back, ours = (
            TranscoderSet.load(tmp_path / f"{name}-back"),
            TranscoderSet.load(exported[name] / "ours"),
        )
        x = {layer: torch.randn(32, D, generator=torch.Generator().manual_seed(2)) for layer in range(L)}
        for layer, expected in ours(x).items():
            assert (back(x)[layer] - expected).abs().max() < LARGEST_ERROR
