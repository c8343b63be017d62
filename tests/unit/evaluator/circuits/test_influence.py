"""Influence by dense linear algebra, thresholds and pruning, on matrices small enough to think through."""

from __future__ import annotations

import pytest
import torch

from winnow.evaluator.circuits import influence


def random_graph(features: int = 12, errors: int = 4, embeddings: int = 3, logits: int = 2, seed: int = 0):
    """Adjacency [n, n] of features that only read earlier ones, and weights of the logits."""
    draws = torch.Generator().manual_seed(seed)
    n = features + errors + embeddings + logits
    adjacency = torch.randn(n, n, generator=draws, dtype=torch.float64)
    adjacency[features : n - logits] = 0  # errors and embeddings receive nothing
    adjacency[:, n - logits :] = 0  # logits give nothing
    adjacency[:features, :features] = adjacency[:features, :features].tril(-1)
    weights = torch.zeros(n, dtype=torch.float64)
    weights[n - logits :] = torch.tensor([0.6, 0.3])
    return adjacency, weights


def test_influence_is_the_row_of_the_inverse_that_the_logits_weigh():
    adjacency, weights = random_graph()
    shares = influence.normalised(adjacency)
    eye = torch.eye(len(weights), dtype=torch.float64)
    dense = weights @ (torch.linalg.inv(eye - shares) - eye)
    assert torch.allclose(influence.node_influence(adjacency, weights), dense, atol=1e-12)
    edges = influence.edge_influence(adjacency, weights)
    assert torch.allclose(edges, shares * (dense + weights)[:, None], atol=1e-12)
    # What a node gives is what its edges carry.
    assert torch.allclose(edges.sum(0), dense, atol=1e-12)


def test_a_circle_is_refused():
    shares = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    with pytest.raises(ValueError, match="circle"):
        influence.total(shares, torch.tensor([1.0, 0.0]))


def test_scores_of_a_chain():
    # Embedding -> feature -> logit, and an error that gives a quarter of the feature and half of the logit.
    adjacency = torch.zeros(4, 4)
    adjacency[0, 1], adjacency[0, 2] = 1.0, 3.0  # feature: error, embedding
    adjacency[3, 0], adjacency[3, 1] = 2.0, -2.0  # logit: feature, error
    weights = torch.tensor([0.0, 0.0, 0.0, 0.8])
    errors, embeddings = torch.tensor([False, True, False, False]), torch.tensor([False, False, True, False])
    found = influence.scores_of(adjacency, weights, errors, embeddings)
    # Influence: feature 0.4, embedding 0.3, error 0.1 + 0.4.
    assert found.replacement == pytest.approx(0.3 / 0.8)
    reached = torch.tensor([0.4, 0.5, 0.3, 0.8])
    explained = torch.tensor([0.75, 1.0, 1.0, 0.5])
    assert found.completeness == pytest.approx(float((reached * explained).sum() / reached.sum()))


def test_completeness_is_one_half_where_errors_explain_everything():
    adjacency = torch.zeros(3, 3)
    adjacency[2, 1] = 1.0  # logit: error
    weights = torch.tensor([0.0, 0.0, 0.8])
    errors, embeddings = torch.tensor([False, True, False]), torch.tensor([True, False, False])
    assert influence.scores_of(adjacency, weights, errors, embeddings) == pytest.approx((0.0, 0.5))


def test_completeness_is_the_share_of_all_nodes_but_errors():
    adjacency, weights = random_graph()
    n = len(weights)
    errors, embeddings = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    errors[12:16] = True
    reached = influence.node_influence(adjacency, weights) + weights
    found = influence.scores_of(adjacency, weights, errors, embeddings).completeness
    assert found == pytest.approx(float(reached[~errors].sum() / reached.sum()))


def test_pruning_keeps_the_share_and_no_loose_ends():
    adjacency, weights = random_graph(features=40, errors=10)
    n = len(weights)
    features, fixed = torch.arange(n) < 40, torch.arange(n) >= 50
    kept = influence.prune(adjacency, weights, features, fixed, 0.8, 0.98)
    whole = influence.node_influence(adjacency, weights)
    inner = kept.nodes & ~fixed
    assert 0 < inner.sum() < 50
    assert kept.nodes[fixed].all()
    assert kept.links[:, inner].any(0).all()
    assert kept.links[kept.nodes & features].any(1).all()
    assert not kept.links[~kept.nodes].any()
    assert not kept.links[:, ~kept.nodes].any()
    # All that was left out is less influential than what stayed, loose ends aside.
    assert whole[~kept.nodes].max() <= influence.threshold(whole, 0.8) + whole[kept.nodes].max()
    everything = influence.prune(adjacency, weights, features, fixed, 1.0, 1.0)
    assert everything.nodes.sum() >= n - 1
    assert everything.links.sum() == (adjacency != 0)[everything.nodes][:, everything.nodes].sum()


def test_the_threshold_is_the_last_of_the_largest_that_hold_the_share():
    values = torch.tensor([4.0, 1.0, 3.0, 2.0])
    assert influence.threshold(values, 0.4) == 4
    assert influence.threshold(values, 0.41) == 3
    assert influence.threshold(values, 1.0) == 1
    assert torch.allclose(influence.cumulative(values), torch.tensor([0.4, 1.0, 0.7, 0.9]))
