"""Others' figures in the terms of Winnow's, as docs/evaluation.md tells them: `make test-formats`."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from winnow.evaluator.families.downstream import costs
from winnow.sae.metrics import Fvu

if importlib.util.find_spec("sae_lens") is None:
    pytest.skip("the peers' libraries are not here: `make test-formats`", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
D, N, V, WINDOWS, T = 32, 48, 97, 8, 16
HOOK = "blocks.0.hook_resid_post"
PARTS = {
    "encoder": 0.2 * torch.randn(D, N, generator=torch.Generator().manual_seed(1)),
    "decoder": 0.2 * torch.randn(N, D, generator=torch.Generator().manual_seed(2)),
    "bias": 0.5 * torch.randn(D, generator=torch.Generator().manual_seed(3)),
}
"""Of an SAE that is none too good, and whose error has a mean."""


@pytest.fixture
def model():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=T, d_head=8, n_heads=4, d_mlp=64, d_vocab=V, act_fn="gelu",
        normalization_type="LN", init_weights=False, device="cpu",
    )  # fmt: skip
    made = HookedTransformer(config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in made.parameters():
            value.normal_(0, 0.3, generator=random)
    return made


@pytest.fixture
def tokens():
    return torch.randint(V, (WINDOWS, T), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def rows(model, tokens):
    with torch.no_grad():
        return model.run_with_cache(tokens)[1][HOOK].flatten(0, 1)


def reconstruct(rows):
    return torch.relu((rows - PARTS["bias"]) @ PARTS["encoder"]) @ PARTS["decoder"] + PARTS["bias"]


def fvu(*batches):
    """FVU of rows in the batches, each [B, D]: Winnow's."""
    found = Fvu(D)
    for batch in batches:
        found.add(batch, reconstruct(batch))
    return found.value


@pytest.fixture
def lens():
    from sae_lens import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=D, d_sae=N))
    sae.cfg.metadata.hook_name = HOOK
    with torch.no_grad():
        sae.W_enc.copy_(PARTS["encoder"])
        sae.b_enc.zero_()
        sae.W_dec.copy_(PARTS["decoder"])
        sae.b_dec.copy_(PARTS["bias"])
    return sae


def batches_of(tokens):
    """A store of SAELens': a batch of windows at each call."""
    left = iter(tokens.split(WINDOWS // 2))
    return SimpleNamespace(get_batch_tokens=lambda _: next(left))


def test_saelens_explained_variance_is_one_less_fvu_raw_and_its_legacy_figure_is_not(
    model, tokens, rows, lens
):
    from sae_lens.evals import get_sparsity_and_variance_metrics
    from sae_lens.training.activation_scaler import ActivationScaler

    found = get_sparsity_and_variance_metrics(
        lens, model, batches_of(tokens), ActivationScaler(), n_batches=2, compute_l2_norms=False,
        compute_sparsity_metrics=True, compute_variance_metrics=True, eval_batch_size_prompts=WINDOWS // 2,
        compute_featurewise_density_statistics=False, model_kwargs={},
    )[0]  # fmt: skip
    error = (rows - reconstruct(rows)).square().sum(1)
    assert found["explained_variance"] == pytest.approx(1 - fvu(rows), rel=1e-4)
    assert found["mse"] == pytest.approx(error.mean().item(), rel=1e-5)
    codes = torch.relu((rows - PARTS["bias"]) @ PARTS["encoder"])
    assert found["l0"] == pytest.approx((codes > 0).sum(1).double().mean().item())
    each = [
        1 - some / (batch - batch.mean(0)).square().sum(1)
        for some, batch in zip(error.chunk(2), rows.chunk(2), strict=True)
    ]
    legacy = found["explained_variance_legacy"]
    assert legacy == pytest.approx(torch.cat(each).mean().item(), rel=1e-4)
    assert abs(legacy - (1 - fvu(rows))) > 0.01


def test_saelens_compares_a_transcoders_prediction_with_the_rows_that_it_reads(model, tokens):
    from sae_lens.evals import get_sparsity_and_variance_metrics
    from sae_lens.saes.transcoder import SkipTranscoder, SkipTranscoderConfig
    from sae_lens.training.activation_scaler import ActivationScaler

    theirs = SkipTranscoder(SkipTranscoderConfig(d_in=D, d_out=D, d_sae=N, apply_b_dec_to_input=False))
    source, target = "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"
    theirs.cfg.metadata.hook_name, theirs.cfg.metadata.hook_name_out = source, target
    with torch.no_grad():
        for name, value in (*PARTS.items(), ("skip", torch.eye(D))):
            parameter = {"encoder": "W_enc", "decoder": "W_dec", "bias": "b_dec", "skip": "W_skip"}[name]
            getattr(theirs, parameter).copy_(value)
        cache = model.run_with_cache(tokens)[1]
        read = cache[source].flatten(0, 1)
        predicted = torch.relu(read @ PARTS["encoder"]) @ PARTS["decoder"] + PARTS["bias"]
        assert torch.allclose(theirs(read), predicted + read, atol=1e-4)
    found = get_sparsity_and_variance_metrics(
        theirs, model, batches_of(tokens), ActivationScaler(), n_batches=2, compute_l2_norms=False,
        compute_sparsity_metrics=False, compute_variance_metrics=True, eval_batch_size_prompts=WINDOWS // 2,
        compute_featurewise_density_statistics=False, model_kwargs={},
    )[0]  # fmt: skip
    # Neither the target nor the skip occurs in it.
    away = (read - predicted).square().sum() / (read - read.mean(0)).square().sum()
    assert found["explained_variance"] == pytest.approx(1 - away.item(), rel=1e-4)


def test_saelens_scores_are_loss_recovered_zero_and_its_kl_has_one_more_position(model, tokens, lens):
    from sae_lens.evals import get_downstream_reconstruction_metrics
    from sae_lens.training.activation_scaler import ActivationScaler

    found = get_downstream_reconstruction_metrics(
        lens, model, batches_of(tokens), ActivationScaler(), compute_kl=True, compute_ce_loss=True,
        n_batches=2, eval_batch_size_prompts=WINDOWS // 2,
    )  # fmt: skip
    with torch.no_grad():
        clean = model(tokens)
        spliced = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda rows, **_: reconstruct(rows))])
        zeroed = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda rows, **_: 0 * rows)])
    ce, _ = costs(clean, tokens)
    ce_spliced, kl = costs(spliced, tokens, clean)
    ce_zeroed, _ = costs(zeroed, tokens)
    assert kl is not None
    assert found["ce_loss_without_sae"] == pytest.approx(ce.mean().item(), rel=1e-5)
    assert found["ce_loss_with_sae"] == pytest.approx(ce_spliced.mean().item(), rel=1e-5)
    recovered = 1 - (ce_spliced - ce).mean() / (ce_zeroed - ce).mean()
    assert found["ce_loss_score"] == pytest.approx(recovered.item(), rel=1e-4)
    p, q = clean.log_softmax(-1), spliced.log_softmax(-1)
    every = (p.exp() * (p - q)).sum(-1)
    assert found["kl_div_with_sae"] == pytest.approx(every.mean().item(), rel=1e-4)
    assert kl.mean().item() == pytest.approx(every[:, :-1].mean().item(), rel=1e-4)
    assert abs(kl.mean().item() - found["kl_div_with_sae"]) > 5e-4


def test_sparsify_s_fvu_is_of_each_batch_about_its_own_mean(rows):
    from sparsify import SparseCoder, SparseCoderConfig

    # All latents are among the K largest, so that it computes a ReLU SAE.
    coder = SparseCoder(D, SparseCoderConfig(num_latents=N, k=N))
    with torch.no_grad():
        coder.encoder.weight.copy_(PARTS["encoder"].T)
        coder.encoder.bias.zero_()
        coder.W_dec.copy_(PARTS["decoder"])
        coder.b_dec.copy_(PARTS["bias"])
        halves = rows.chunk(2)
        found = [coder(batch).fvu.item() for batch in halves]
    assert found == pytest.approx([fvu(batch) for batch in halves], rel=1e-4)
    assert abs(sum(found) / 2 - fvu(*halves)) > 1e-5


def test_dictionary_learning_takes_the_mean_off_the_error(rows):
    from dictionary_learning.dictionary import AutoEncoder
    from dictionary_learning.evaluation import evaluate

    learnt = AutoEncoder(D, N)
    with torch.no_grad():
        learnt.encoder.weight.copy_(PARTS["encoder"].T)
        learnt.encoder.bias.zero_()
        learnt.decoder.weight.copy_(PARTS["decoder"].T)
        learnt.bias.copy_(PARTS["bias"])
    found = evaluate(learnt, iter([rows]))
    error = rows - reconstruct(rows)
    of_the_mean = len(rows) * error.mean(0).square().sum() / (rows - rows.mean(0)).square().sum()
    assert of_the_mean > 0.01
    explained = 1 - fvu(rows) + of_the_mean.item()
    assert found["frac_variance_explained"] == pytest.approx(explained, abs=1e-4)
    assert found["l2_loss"] == pytest.approx(error.norm(dim=1).mean().item(), rel=1e-4)
