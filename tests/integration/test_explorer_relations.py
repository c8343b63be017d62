"""Latents of other layers of a set that feed a latent or are fed by it: against brute force, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from tests.support.explorer_site import make_site
from tests.support.set_site import LATENTS, LAYERS, indexed_set, layers_dataset, place_of
from winnow.explorer.place import Place
from winnow.explorer.site import relations
from winnow.explorer.site.desk import Desk, open_desk
from winnow.explorer.site.relations import Sample
from winnow.explorer.site.serve import make_app
from winnow.sae.sets import TranscoderSet
from winnow.schemas.config import Config
from winnow.store import ActivationStore
from winnow.subject import Subject


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Config:
    return layers_dataset(tmp_path_factory.mktemp("toy"))


def client_of(desk: Desk) -> TestClient:
    return TestClient(make_app(desk), base_url="http://127.0.0.1:8517")


def ask(client: TestClient, sae: int, latent: int) -> dict[str, Any]:
    reply = client.get(f"/api/saes/{sae}/features/{latent}/relations")
    assert reply.status_code == 200, reply.text
    return reply.json()


def weights_into(whole: TranscoderSet, layer: int, latent: int, source: int) -> torch.Tensor:
    """[N]: what each latent of an earlier layer adds to a latent's pre-activation, per unit of activation."""
    everything, reads = torch.arange(LATENTS), whole.encoder_rows(layer, torch.tensor([latent]))[0]
    between = [target for target in whole.targets(source) if target < layer]
    return sum(whole.decoder_rows(source, everything, target) @ reads for target in between)  # type: ignore


def codes_of_all_rows(config: Config, whole: TranscoderSet) -> dict[int, torch.Tensor]:
    """Layer -> dense activations [rows, N] of all rows that the layer's index counts."""
    dataset = ActivationStore.open(config.root)
    found: dict[int, torch.Tensor] = {}
    for layer in whole.layers:
        hook = whole.of.read_hook(layer)
        rows = torch.from_numpy(dataset.read_rows(hook, 0, dataset.rows))
        values, indices = whole[layer].encode(rows)
        dense = torch.zeros(len(rows), LATENTS).scatter_add_(1, indices, values)
        found[layer] = dense * torch.from_numpy(dataset.weights([hook], 0, dataset.rows))[:, None]
    return found


@pytest.mark.parametrize("cross", [False, True])
def test_relations_are_those_of_brute_force(toy, tmp_path, cross):
    uri = indexed_set(toy, tmp_path / "set", cross=cross)
    desk, whole = open_desk([uri], None, place_of(toy), seats=2), TranscoderSet.load(uri)
    client, codes = client_of(desk), codes_of_all_rows(toy, whole)
    table = desk.exhibits[1].table
    latent = next(n for n in range(LATENTS) if 40 < table.column("fires")[n] <= 120)
    reply = ask(client, 1, latent)
    assert (reply["layer"], reply["layers"], reply["missing"]) == (1, [0, 1, 2], [])
    own = codes[1][:, latent]
    fires = own > 0
    assert reply["rows"] == int(fires.sum()) == table.column("fires")[latent]

    weight = weights_into(whole, 1, latent, 0)
    # E[a_target a_source] / E[a_target], times the weight.
    twera = weight * (own @ codes[0]) / own.sum()
    together = (codes[0][fires] > 0).float().mean(0)
    check(reply["inputs"], 0, weight, twera, together)

    weight = torch.stack([weights_into(whole, 2, n, 1)[latent] for n in range(LATENTS)])
    # E[1(a_target > 0) a_source] over the rows on which the source fires, times the weight.
    era = weight * (own[fires] @ (codes[2][fires] > 0).float()) / fires.sum()
    together = (codes[2][fires] > 0).float().mean(0)
    check(reply["outputs"], 2, weight, era, together)


def check(found: dict[str, Any], layer: int, weight: torch.Tensor, expected: torch.Tensor, together) -> None:
    for name, measure in (("by_weight", weight), ("expected", expected)):
        rows = found[name]
        best = measure.abs().sort(descending=True).indices.tolist()
        assert [row["latent"] for row in rows] == [n for n in best if measure[n] != 0]
        assert {row["layer"] for row in rows} == {row["sae"] for row in rows} == {layer}
        for row in rows:
            n = row["latent"]
            assert row["weight"] == pytest.approx(weight[n].item(), rel=1e-4, abs=1e-6)
            assert row["expected"] == pytest.approx(expected[n].item(), rel=2e-2, abs=1e-5)
            assert row["together"] == pytest.approx(together[n].item(), abs=1e-5)


@pytest.mark.parametrize(("cross", "reads"), [(True, "resid_mid"), (True, "mlp_in"), (False, "mlp_in")])
def test_a_weight_is_the_same_from_both_ends(toy, tmp_path, monkeypatch, cross, reads):
    uri = indexed_set(toy, tmp_path / "set", cross=cross, reads=reads)
    # Nothing is kept: each layer is read anew, as of a set that does not fit.
    monkeypatch.setattr(relations, "_HELD_BYTES", 0)
    client = client_of(open_desk([uri], None, place_of(toy), seats=2))
    out = ask(client, 0, 5)["outputs"]["by_weight"]
    assert {row["layer"] for row in out} <= {1, 2}
    for row in out[:3]:
        back = ask(client, row["sae"], row["latent"])["inputs"]["by_weight"]
        same = next(each for each in back if (each["layer"], each["latent"]) == (0, 5))
        assert same["weight"] == pytest.approx(row["weight"], rel=1e-4)
    first, last = ask(client, 0, 5), ask(client, LAYERS - 1, 5)
    assert first["inputs"] == last["outputs"] == {"by_weight": [], "expected": []}


def test_of_a_set_behind_norms_the_gain_is_part_of_the_weight(toy, tmp_path):
    uri = indexed_set(toy, tmp_path / "set", reads="mlp_in")
    client, whole = client_of(open_desk([uri], None, place_of(toy), seats=2)), TranscoderSet.load(uri)
    subject = Subject.load(toy.subject)
    norm = subject.model.get_submodule(str(subject.layout.path(1, "mlp_norm")))
    reads = whole.encoder_rows(1, torch.tensor([5]))[0] * norm.get_parameter("weight").detach().float()
    weight = whole.decoder_rows(0, torch.arange(LATENTS), 0) @ reads
    rows = ask(client, 1, 5)["inputs"]["by_weight"]
    assert [row["latent"] for row in rows] == weight.abs().sort(descending=True).indices.tolist()
    assert rows[0]["weight"] == pytest.approx(weight[rows[0]["latent"]].item(), rel=1e-3)


def test_without_the_dataset_there_are_weights_only(toy, tmp_path):
    uri = indexed_set(toy, tmp_path / "set")
    desk = open_desk([uri], None, Place(str(tmp_path / "none"), toy.subject, toy.storage), seats=2)
    reply = ask(client_of(desk), 1, 5)
    assert reply["rows"] == 0
    assert reply["inputs"]["expected"] == []
    assert reply["inputs"]["by_weight"][0]["expected"] is None


def test_of_single_saes_it_is_refused_in_words(tmp_path):
    site = make_site(tmp_path)
    desk = open_desk(list(site.saes), None, Place.of(site.config_path, None), seats=2)
    client = client_of(desk)
    assert client.get("/api/site").json()["set"] is False
    reply = client.get("/api/saes/0/features/5/relations")
    assert reply.status_code == 400
    assert "expected a transcoder set" in reply.json()["error"]


def test_each_drawn_row_stands_for_its_share_of_the_activations():
    def example(band: int, window: int) -> dict[str, Any]:
        values = [0.0, 1.0 + window, 0.0]
        return {"band": band, "window": window, "position": 4, "first": 3, "values": values}

    # 10 activations in 2 bands of 5, of which 1 and 2 are drawn; the strongest window is not.
    row = {"fires": 10, "examples": [example(-1, 9), example(0, 1), example(1, 2), example(1, 3)]}
    sample = Sample.of(row, 2)
    assert sample.window.tolist() == [1, 2, 3]
    assert sample.activation.tolist() == [2.0, 3.0, 4.0]
    assert sample.share.tolist() == pytest.approx([0.5, 0.25, 0.25])
    # A latent that fires in fewer places than there are bands: all of its windows.
    row = {"fires": 2, "examples": [example(-1, 9), example(-1, 8)]}
    assert Sample.of(row, 5).share.tolist() == pytest.approx([0.5, 0.5])
