"""Circuits on tiny subjects of every architecture: what is held is the subject's own, and edges add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.sets import random_set
from tests.support.tiny import ARCHITECTURES, make_subject
from winnow.evaluator.circuits import trace
from winnow.evaluator.circuits.graph import Graph
from winnow.evaluator.circuits.held import Held
from winnow.evaluator.circuits.sources import Sources
from winnow.sae.sets import TranscoderSet
from winnow.schemas.errors import ConfigError, SaeMismatch
from winnow.subject.load import Subject

P, D, L = 7, 16, 3
IDS = torch.arange(5, 5 + 7 * P, 7)


def load(folder: Path, architecture: str = "llama", **extra: object) -> Subject:
    return Subject.load(str(make_subject(folder, architecture, layers=L, width=D, **extra)))


# Outside the table, parts proved at load: OPT's MLP has no module of its own, and reads flattened windows.
OTHERS: dict[str, dict[str, object]] = {
    "opt": {"ffn_dim": 2 * D},
    "biogpt": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
EVERY = (*ARCHITECTURES, *OTHERS)


@pytest.fixture(scope="module", params=EVERY)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load(tmp_path_factory.mktemp(request.param), request.param, **OTHERS.get(request.param, {}))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load(tmp_path_factory.mktemp("llama"))


def received(graph: Graph, held: Held, set_: TranscoderSet) -> tuple[Tensor, Tensor]:
    """Of every latent and logit: what edges should add up to, and do."""
    sources = Sources(set_, held)
    silent = {layer: (values * 0, latents) for layer, (values, latents) in sources.codes.items()}
    constant = set_.decode(silent, {layer: held.reads[layer] for layer in set_.layers})
    zeros = torch.zeros(P, D)
    # Without any source, only biases are left: the constant terms of everything.
    none = held.run(zeros, lambda layer, _: constant.get(layer, zeros))
    full = held.run(held.stream[0], lambda layer, _: held.mlp_out[layer])
    rows = held.unembedding - held.unembedding.mean(0)
    expected, found = [], []
    for at, node in enumerate(graph.nodes):
        if node.kind == "feature":
            row = set_.encoder_rows(node.layer, torch.tensor([node.number]))[0]
            change = full.reads[node.layer] - none.reads[node.layer]
            expected.append(row @ change[node.position])
        elif node.kind == "logit":
            expected.append(rows[node.number] @ (full.final - none.final)[-1])
        else:
            assert not graph.adjacency[at].any()
            continue
        found.append(graph.adjacency[at].sum())
    return torch.stack(expected), torch.stack(found)


SETS = {
    "plt": {"layers": L},
    "clt": {"layers": L, "cross": True, "activation": "jumprelu"},
    "a part of the layers, after the norm": {"layers": (1, 2), "cross": True, "reads": "mlp_in"},
}


@pytest.mark.parametrize("kind", SETS)
def test_edges_add_up_to_what_their_targets_receive(llama: Subject, kind: str):
    check_edges(llama, random_set(**SETS[kind]))


def test_edges_add_up_on_every_architecture(each: Subject):
    # Both sites in turn, so that each architecture costs one trace.
    at = EVERY.index(each.layout.architecture) % 2
    check_edges(each, random_set(L, cross=True, reads=("resid_mid", "mlp_in")[at]))


def check_edges(subject: Subject, set_: TranscoderSet) -> None:
    graph = trace(subject, set_, IDS, max_features=10_000)
    held = Held(subject, IDS[None], set_.of.reads)
    expected, found = received(graph, held, set_)
    scale = graph.adjacency.abs().sum(1).max()
    assert (found - expected).abs().max() < 1e-5 * scale
    # The layers outside the set's range are errors as a whole.
    assert sum(node.kind == "error" for node in graph.nodes) == L * P


def test_the_replacement_model_gives_the_subjects_logits(each: Subject):
    set_ = random_set(L, cross=True)
    held = Held(each, IDS[None], "resid_mid")
    sources = Sources(set_, held)

    def replaced(layer: int, read: Tensor) -> Tensor:
        codes = set_.encode({**dict(enumerate(held.reads[:layer])), layer: read})
        return set_.decode(codes, targets=[layer])[layer] + sources.errors[layer]

    final = held.run(held.stream[0], replaced).final
    head = each.model.get_submodule(str(each.layout.unembedding))
    found = head(final)
    cap = getattr(each.model.config, "final_logit_softcapping", None)
    found = torch.tanh(found / cap) * cap if cap else found
    assert (found - each.logits(IDS[None])[0]).abs().max() < 1e-4


def test_limits_keep_the_most_influential(llama: Subject):
    set_ = random_set(L)
    whole = trace(llama, set_, IDS, max_features=10_000, max_logits=3)
    part = trace(llama, set_, IDS, max_features=30, max_logits=3)
    features = [node for node in part.nodes if node.kind == "feature"]
    assert len(features) == 30
    assert part.origin is not None
    assert part.origin.left_out.latents == sum(node.kind == "feature" for node in whole.nodes) - 30
    # Edges among the nodes that both have are the same.
    at = torch.tensor([whole.index[node[:4]] for node in part.nodes])
    assert torch.allclose(whole.adjacency[at][:, at], part.adjacency, atol=1e-6)
    # What was chosen by estimate holds more influence than as many latents chosen at random.
    ranked = whole.influence[whole.of("feature")].sort(descending=True).values
    chosen = whole.influence[at[part.of("feature")]]
    assert chosen.sum() > 0.8 * ranked[:30].sum()


def test_chosen_targets_and_skip_paths(llama: Subject):
    set_ = random_set(L)
    for layer in range(L):
        sae = set_[layer]
        sae.parts = sae.parts.model_copy(update={"skip": True})
        sae.W_skip = torch.nn.Parameter(torch.randn(D, D) / 8, requires_grad=False)
    graph = trace(llama, set_, IDS, max_features=10_000, targets=[7, 300])
    logits = [node.number for node in graph.nodes if node.kind == "logit"]
    assert sorted(logits) == [7, 300]
    held = Held(llama, IDS[None], "resid_mid")
    # A skip path carries what is read: it is no source of its own, so silence has to pass through it too.
    sources = Sources(set_, held)
    silent = {layer: (values * 0, latents) for layer, (values, latents) in sources.codes.items()}

    def constant(layer: int, read: Tensor) -> Tensor:
        return set_.decode({layer: silent[layer]}, {layer: read})[layer]

    none = held.run(torch.zeros(P, D), constant)
    rows = held.unembedding - held.unembedding.mean(0)
    full = held.run(held.stream[0], lambda layer, _: held.mlp_out[layer])
    for at, node in enumerate(graph.nodes):
        if node.kind == "logit":
            expected = rows[node.number] @ (full.final - none.final)[-1]
            assert graph.adjacency[at].sum() == pytest.approx(float(expected), abs=1e-4)


def test_what_does_not_fit_is_refused(llama: Subject):
    with pytest.raises(ConfigError, match="too long"):
        trace(llama, random_set(L), torch.ones(257, dtype=torch.int64))
    with pytest.raises(SaeMismatch, match="layers of the set"):
        trace(llama, random_set(L + 1), IDS)
    with pytest.raises(SaeMismatch, match="width D"):
        trace(llama, random_set(L, d_model=8), IDS)
    with pytest.raises(ConfigError, match="targets"):
        trace(llama, random_set(L), IDS, targets=[5, 5])
    with pytest.raises(ConfigError, match="limits"):
        trace(llama, random_set(L), IDS, mass=0.0)
    rowwise = random_set(L, scaled=False)
    rowwise[1].normalize_mode = "layer"
    with pytest.raises(SaeMismatch, match="normalisation of layer 1"):
        trace(llama, rowwise, IDS)


class Gated(torch.nn.Module):
    """A norm that is none: its output is not linear once a denominator is held."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class GatedNorm(Gated):
    """One whose name says that it is a norm."""


@pytest.mark.parametrize("kind", [Gated, GatedNorm])
def test_an_architecture_that_cannot_be_held_is_refused_by_name(tmp_path: Path, kind: type[torch.nn.Module]):
    subject = load(tmp_path)
    subject.model.get_submodule("model.layers.1").input_layernorm = kind()
    with pytest.raises(ConfigError, match=r"model\.layers\.1") as error:
        trace(subject, random_set(L), IDS)
    assert "not linear" in str(error.value)


def test_attention_of_its_own_is_refused_by_name(tmp_path: Path):
    subject = load(tmp_path)

    class Own(torch.nn.Module):
        def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
            return hidden_states.cumsum(1), None

    subject.model.get_submodule("model.layers.2").self_attn = Own()
    with pytest.raises(ConfigError, match=r"model\.layers\.2\.self_attn"):
        trace(subject, random_set(L), IDS)
