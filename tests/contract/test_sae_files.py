"""The published SAE: two files, no pickle, a digest that holds them together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from winnow.sae import Sae
from winnow.sae.init import initialise
from winnow.schemas.errors import IntegrityError, MissingObject, UnsupportedVersion
from winnow.schemas.training import SaeParts
from winnow.store.objects import open_store

D, N, K = 8, 24, 3


def publish(folder, normalize="layer") -> Sae:
    sae = Sae(D, N, K, normalize)
    sample = torch.randn(200, D, generator=torch.Generator().manual_seed(0)) + 3
    initialise(sae, sample, torch.ones(200), seed=1)
    sae.save(open_store(str(folder)), hook="resid_post.1", metrics={"fvu_normalised.raw": 0.5})
    return sae


@pytest.mark.parametrize("normalize", ["layer", "dataset", "none"])
def test_a_saved_sae_loads_and_encodes_alike(tmp_path, normalize):
    sae = publish(tmp_path, normalize)
    for place in (tmp_path, f"file://{tmp_path}"):
        loaded = Sae.load(place)
        assert loaded.card == sae.card
        x = torch.randn(50, D)
        assert torch.equal(loaded(x), sae(x))
        assert all(torch.equal(a, b) for a, b in zip(loaded.encode(x), sae.encode(x), strict=True))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_files_hold_what_the_format_says(tmp_path):
    publish(tmp_path, "dataset")
    tensors = safetensors.torch.load_file(tmp_path / "sae.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "W_enc": (N, D),
        "b_enc": (N,),
        "W_dec": (N, D),
        "b_pre": (D,),
        "input_mean": (D,),
        "input_scale": (),
    }
    card = json.loads((tmp_path / "sae.json").read_text())
    assert (card["kind"], card["version"], card["normalize"]) == ("winnow.sae", "1.1", "dataset")


def test_a_flipped_byte_is_refused(tmp_path):
    publish(tmp_path)
    data = bytearray((tmp_path / "sae.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "sae.safetensors").write_bytes(data)
    with pytest.raises(IntegrityError, match="sha256"):
        Sae.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"version": "2.0"}, UnsupportedVersion, "version"),
        ({"kind": "winnow.plan"}, UnsupportedVersion, "another kind"),
        ({"latents": 23}, IntegrityError, "W_enc"),
        ({"normalize": "dataset"}, IntegrityError, "input_mean"),
        ({"surprise": 1}, IntegrityError, "surprise"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(tmp_path, change, error, words):
    publish(tmp_path)
    card = json.loads((tmp_path / "sae.json").read_text())
    (tmp_path / "sae.json").write_text(json.dumps(card | change))
    with pytest.raises(error, match=words):
        Sae.load(tmp_path)


def test_a_folder_without_an_sae_is_said_to_be_one(tmp_path):
    with pytest.raises(MissingObject, match=r"sae\.json"):
        Sae.load(tmp_path)


@pytest.mark.parametrize(
    ("parts", "hooks"),
    [
        (SaeParts(activation="batchtopk", matryoshka=(4, 12)), {}),
        (SaeParts(activation="relu"), {}),
        (SaeParts(activation="jumprelu"), {}),
        (SaeParts(d_out=5, target_normalize="dataset", skip=True), {"target_hook": "mlp_out.1"}),
        (SaeParts(widths=(5, 3)), {"with_hooks": ("mlp_out.1",)}),
    ],
)
def test_every_part_survives_saving_and_loading(tmp_path, parts, hooks):
    sae = Sae(D, N, K, "dataset", parts)
    with torch.no_grad():
        for tensor in sae.tensors().values():
            tensor.copy_(torch.rand(tensor.shape))
    sae.save(open_store(str(tmp_path)), hook="resid_post.1", **hooks)
    loaded = Sae.load(tmp_path)
    assert loaded.card == sae.card
    assert loaded.parts == parts
    outputs = {"target_hook": ("mlp_out.1",), "with_hooks": ("resid_post.1", "mlp_out.1")}
    assert loaded.card.output_hooks == next((outputs[name] for name in hooks), ("resid_post.1",))
    x = torch.randn(20, D)
    assert torch.equal(loaded(x), sae(x))


def test_a_card_of_version_1_0_still_loads():
    sae = Sae.load(Path(__file__).parent / "golden" / "sae-1.0")
    assert sae.card is not None
    assert (sae.card.version, sae.parts, sae.card.spec.activation) == ("1.0", SaeParts(), "topk")
    assert sae.card.window is None
    assert "window" not in json.loads(sae.card.to_json())  # nothing is added to what it said
    found = sae(torch.arange(8.0).view(2, 4))
    expected = [[-0.0435589, 1.6533148, 0.8389797, 4.2098894], [0.0217031, 5.4982133, 7.3977203, 5.6622448]]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_a_card_whose_parts_do_not_fit_its_hooks_is_refused(tmp_path):
    publish(tmp_path)
    card = json.loads((tmp_path / "sae.json").read_text())
    (tmp_path / "sae.json").write_text(json.dumps(card | {"target_hook": "mlp_out.1"}))
    with pytest.raises(IntegrityError, match="belong together"):
        Sae.load(tmp_path)
