"""Transcoder sets: predictions add up over layers; storage holds every layer and is checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.sets import random_set
from winnow.sae.sets import TranscoderSet
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.layers import SetSpec
from winnow.schemas.training import TrainSpec
from winnow.store.objects import open_store


def rows_of(whole: TranscoderSet, count: int = 7) -> dict[int, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    return {
        layer: torch.randn(count, whole.d_model, generator=draws, dtype=torch.float64)
        for layer in whole.layers
    }


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
@pytest.mark.parametrize("cross", [False, True])
def test_a_prediction_is_the_sum_of_raw_decoder_rows_over_the_layers_below(
    cross: bool, activation: str
) -> None:
    whole = random_set(3, cross=cross, activation=activation, dtype=torch.float64)
    rows = rows_of(whole)
    codes = whole.encode(rows)
    found = whole.decode(codes)
    for target in whole.layers:
        own = whole[target]
        norm = own.target_norm[: whole.d_model] if own.target_norm.ndim else own.target_norm
        expected = (norm * own.b_dec[: whole.d_model] + own.target_mean[: whole.d_model]).expand(7, -1)
        for layer in whole.layers:
            if target not in whole.targets(layer):
                continue
            values, latents = codes[layer]
            for slot in range(values.shape[1]):
                written = whole.decoder_rows(layer, latents[:, slot], target)
                expected = expected + values[:, slot, None] * written
        torch.testing.assert_close(found[target], expected)


def test_raw_encoder_rows_are_the_gradient_of_the_codes() -> None:
    whole = random_set(2, activation="relu", dtype=torch.float64)
    x = rows_of(whole)[1].requires_grad_()
    values, latents = whole[1].select(whole[1].normalise(x)[0])
    (slope,) = torch.autograd.grad(values[3, 0], x)
    torch.testing.assert_close(slope[3], whole.encoder_rows(1, latents[3, :1])[0])


def test_a_cross_layer_set_without_cross_decoders_predicts_what_a_per_layer_set_does() -> None:
    plain, cross = random_set(3), random_set(3, cross=True)
    with torch.no_grad():
        for layer in cross.layers:
            own = slice(0, cross.d_model)
            cross[layer].W_dec.zero_()
            for name in ("W_dec", "b_dec", "target_mean"):
                getattr(cross[layer], name)[..., own] = getattr(plain[layer], name)
            for name in ("W_enc", "b_enc", "b_pre", "input_mean", "input_scale"):
                getattr(cross[layer], name).copy_(getattr(plain[layer], name))
    rows = {layer: x.float() for layer, x in rows_of(plain).items()}
    found, expected = cross(rows), plain(rows)
    for layer in plain.layers:
        torch.testing.assert_close(found[layer], expected[layer])


@pytest.mark.parametrize("cross", [False, True])
def test_a_published_set_is_read_back_and_a_changed_layer_is_refused(tmp_path: Path, cross: bool) -> None:
    whole = random_set((2, 4), cross=cross)
    card = whole.save(open_store(str(tmp_path / "set")), metrics={"fvu_normalised.raw": 0.5})
    found = TranscoderSet.load(tmp_path / "set")
    assert found.card == card
    assert (found.layers, found.cross) == (range(2, 5), cross)
    rows = {layer: x.float() for layer, x in rows_of(whole).items()}
    for layer, prediction in whole(rows).items():
        assert torch.equal(found(rows)[layer], prediction)
    path = tmp_path / "set" / "layer_3" / "sae.json"
    path.write_bytes(path.read_bytes().replace(b'"hook": "resid_mid.3"', b'"hook": "resid_mid.2"'))
    with pytest.raises(IntegrityError, match=r"layer_3/sae\.json is not the file that set\.json describes"):
        TranscoderSet.load(tmp_path / "set")


def test_layers_that_are_missing_or_of_other_widths_are_refused() -> None:
    whole = random_set(3)
    with pytest.raises(ConfigError, match=r"every layer from 0 to 2.*without \[1\]"):
        TranscoderSet({0: whole[0], 2: whole[2]}, whole.of)
    with pytest.raises(ConfigError, match="one width"):
        TranscoderSet({0: whole[0], 1: whole[1], 2: random_set(3, d_model=8)[2]}, whole.of)
    with pytest.raises(ConfigError, match="the transcoder of layer 0"):
        TranscoderSet({layer: whole[layer] for layer in range(3)}, SetSpec(layers=(0, 2), cross=True))


def test_a_spec_of_a_set_names_every_layer_s_hooks() -> None:
    spec = TrainSpec.model_validate(
        {"out": "runs/clt", "latents": 64, "k": 4, "set": {"layers": [1, 3], "cross": True}}
    )
    assert spec.set is not None
    assert spec.normalize == "dataset"
    assert spec.set.hooks == (
        "resid_mid.1", "mlp_out.1", "resid_mid.2", "mlp_out.2", "resid_mid.3", "mlp_out.3",
    )  # fmt: skip
    last = spec.layer_spec(2)
    assert (last.out, last.read_hooks) == ("runs/clt/layer_2", ("resid_mid.2", "mlp_out.2", "mlp_out.3"))
    # what is stored names the set, and is read back as the same
    assert TrainSpec.model_validate(last.model_dump()) == last
    with pytest.raises(ConfigError, match="layers from 0 to 2"):
        spec.set.of(3)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hook": "resid_post.1"}, "leave them out"),
        ({"normalize": "layer"}, "normalize: dataset or none"),
        ({"set": {"layers": [3, 1]}}, r"\[first, last\]"),
        ({"set": {"cross": True}, "skip": True}, "skip: True does not go with a cross-layer set"),
        ({"set": {"cross": True}, "activation": "jumprelu"}, "activation: jumprelu does not go with"),
    ],
)
def test_a_spec_that_no_set_has_is_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainSpec.model_validate({"out": "o", "latents": 64, "k": 4, "set": {}} | fields)
