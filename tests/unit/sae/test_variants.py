"""Every variant's model against its dense definition under plain autograd, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from winnow.sae import Sae
from winnow.sae.codes import encode_batchtopk, jump_relu, step_above
from winnow.schemas.training import SaeParts, TrainSpec

B, D, N, K, OUT = 30, 10, 36, 4, 7
PARTS = {
    "topk": SaeParts(),
    "batchtopk": SaeParts(activation="batchtopk"),
    "relu": SaeParts(activation="relu"),
    "jumprelu": SaeParts(activation="jumprelu"),
    "transcoder": SaeParts(d_out=OUT, target_normalize="dataset"),
    "skip": SaeParts(d_out=OUT, target_normalize="none", skip=True),
    "crosscoder": SaeParts(widths=(6, 4), activation="batchtopk"),
    "matryoshka": SaeParts(matryoshka=(9, 18)),
}


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(parts: SaeParts, normalize="dataset") -> Sae:
    sae = Sae(D, N, K, normalize, parts, dtype=torch.float64)
    with torch.no_grad():
        for seed, tensor in enumerate(sae.tensors().values()):
            tensor.copy_(draw(*tensor.shape, seed=seed))
        sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
        sae.input_scale.abs_()
        if sae.has_target:
            sae.target_scale.abs_()
        if parts.activation in ("batchtopk", "jumprelu"):
            sae.threshold.abs_()
    return sae


def dense_output(sae: Sae, rows: torch.Tensor) -> torch.Tensor:
    """The definition, over all N latents, from raw rows to raw rows."""
    scale = sae.input_scale
    if sae.parts.widths:
        scale = torch.cat([s.expand(w) for s, w in zip(scale, sae.parts.widths, strict=True)])
    x = (rows - sae.input_mean) / scale if sae.normalize_mode == "dataset" else rows
    pre = (x - sae.b_pre) @ sae.W_enc.T + sae.b_enc
    if sae.parts.activation == "topk":
        z = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, 1.0) * pre.relu()
    else:
        z = pre * (pre > (0.0 if sae.parts.activation == "relu" else sae.threshold))
    out = z @ sae.W_dec + (sae.b_dec if sae.has_target else sae.b_pre)
    if sae.W_skip is not None:
        out = out + x @ sae.W_skip.T
    if sae.has_target:
        return out * sae.target_scale + sae.target_mean if sae.parts.target_normalize == "dataset" else out
    return out * scale + sae.input_mean if sae.normalize_mode == "dataset" else out


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("normalize", ["dataset", "none"])
def test_a_call_is_the_dense_definition(parts, normalize):
    sae, x = make(parts, normalize), draw(B, D, seed=77)
    torch.testing.assert_close(sae(x), dense_output(sae, x))
    values, indices = sae.encode(x)
    torch.testing.assert_close(sae.decode(values, indices, like=x), sae(x))
    assert values.shape == indices.shape
    assert values.shape[1] == (K if parts.activation == "topk" else int((values > 0).sum(1).max()))
    assert (values >= 0).all()
    assert (values.diff(dim=1) <= 0).all()
    assert sae(x.float()).dtype == torch.float32


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_gradients_outside_training_are_the_dense_ones(parts):
    sae, x = make(parts), draw(B, D, seed=78).requires_grad_()
    wanted = [x] + [getattr(sae, name) for name in sae.parameter_names if name != "threshold"]
    g = draw(B, sae.d_out, seed=79)
    found = torch.autograd.grad((sae(x) * g).sum(), wanted)
    expected = torch.autograd.grad((dense_output(sae, x) * g).sum(), wanted)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_codes_of_silent_rows_are_one_slot_of_0():
    sae = make(PARTS["batchtopk"])
    sae.threshold.fill_(1e9)
    values, indices = sae.encode(draw(B, D, seed=1))
    assert values.shape == indices.shape == (B, 1)
    assert not values.any()
    assert sae.encode(draw(0, D, seed=1))[0].shape == (0, 1)


def test_many_rows_are_encoded_in_pieces_to_the_same_codes(monkeypatch):
    sae, x = make(PARTS["jumprelu"]), draw(B, D, seed=5)
    whole, out = sae.encode(x), sae(x)
    monkeypatch.setattr("winnow.sae.codes.DENSE_BYTES", 8 * N * 7)  # 7 rows at a time
    torch.testing.assert_close(sae(x), out)
    values, indices = sae.encode(x)
    torch.testing.assert_close(values, whole[0])
    assert torch.equal(indices[values > 0], whole[1][values > 0])


@pytest.mark.parametrize("groups", [(30,), (10, 20), (1,) * 30, (0, 30)])
def test_batchtopk_is_the_best_k_a_row_of_each_group(groups):
    sae, x, g = make(PARTS["batchtopk"], "none"), draw(B, D, seed=6), draw(B, D, seed=7)
    b = sae.b_enc - sae.W_enc @ sae.b_pre
    values, indices = encode_batchtopk(x, sae.W_enc, b, K, groups)
    pre = (x - sae.b_pre) @ sae.W_enc.T + sae.b_enc
    masks = []
    for part in pre.split(list(groups)):
        quota = K * len(part)
        edge = part.flatten().sort(descending=True).values[quota - 1] if quota else 0.0
        masks.append((part >= edge) & (part > 0))
    expected = (pre * torch.cat(masks)) @ sae.W_dec
    assert int((values > 0).sum()) == int(torch.cat(masks).sum()) <= K * B
    found = sae.reconstruct(values, indices) - sae.b_pre
    torch.testing.assert_close(found, expected)
    wanted = [sae.W_enc, sae.W_dec, sae.b_enc]
    for a, b in zip(
        torch.autograd.grad((found * g).sum(), wanted),
        torch.autograd.grad((expected * g).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_jumprelu_has_the_papers_gradients():
    pre, threshold, width = draw(200, 5, seed=8), draw(5, seed=9).abs().requires_grad_(), 0.3
    pre.requires_grad_()
    g = draw(200, 5, seed=10)
    near = ((pre - threshold).abs() < width / 2).double()
    z = jump_relu(pre, threshold, width)
    torch.testing.assert_close(z, pre * (pre > threshold))
    by_pre, by_threshold = torch.autograd.grad((z * g).sum(), [pre, threshold])
    torch.testing.assert_close(by_pre, g * (pre > threshold))
    torch.testing.assert_close(by_threshold, (-threshold / width * near * g).sum(0))
    (by_threshold,) = torch.autograd.grad((step_above(pre, threshold, width) * g).sum(), [threshold])
    torch.testing.assert_close(by_threshold, (-near * g / width).sum(0))


def test_a_transcoder_with_skip_cannot_decode_without_its_rows():
    sae = make(PARTS["skip"])
    with pytest.raises(ValueError, match="skip"):
        sae.decode(*sae.encode(draw(3, D, seed=1)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_hook": "h.2", "target_normalize": "layer"}, "unknown at inference"),
        ({"target_hook": "h.1"}, "hook itself"),
        ({"skip": True}, "skip needs target_hook"),
        ({"with_hooks": ["h.2"]}, "normalize: dataset or none"),
        ({"with_hooks": ["h.1"], "normalize": "none"}, "twice"),
        ({"with_hooks": ["h.2"], "target_hook": "h.3", "normalize": "none"}, "its own hooks"),
        ({"matryoshka": [8, 4]}, "ascending"),
        ({"matryoshka": [8, 64]}, "at most latents"),
        ({"multi_topk": True, "activation": "relu"}, "multi_topk"),
        ({"selection_groups": 3}, "divide lanes"),
        ({"activation": "gelu"}, "topk"),
    ],
)
def test_parts_that_do_not_go_together_are_refused_in_words(fields, words):
    with pytest.raises(ValidationError, match=words):
        TrainSpec.model_validate({"out": "x", "hook": "h.1", "latents": 32, "k": 4} | fields)


@pytest.mark.parametrize("name", PARTS)
def test_the_autocast_of_a_subjects_pass_changes_nothing(name):
    """In bfloat16 products of rows far from 0 a third of the latents were others."""
    sae = make(PARTS[name], "none").float()
    with torch.no_grad():
        sae.b_pre.add_(100.0)
    x = draw(B, D, seed=1).float() + 100.0

    def codes_and_output():
        return (*sae.encode(x), sae(x), sae.decode(*sae.encode(x), like=x))

    plain = codes_and_output()
    with torch.autocast("cpu", torch.bfloat16):
        inside = codes_and_output()
    assert all(torch.equal(one, other) for one, other in zip(plain, inside, strict=True))
