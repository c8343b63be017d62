"""Indexes of transcoders and of sets, the explorer on one, and their exports."""

from __future__ import annotations

import json

import pytest
import torch
from starlette.testclient import TestClient
from typer.testing import CliRunner

from tests.support.evaluated import D_MODEL, toy_config
from tests.support.sets import publish_set
from tests.support.transcoders import LATER, READ, TARGET, random_transcoder, save_transcoder
from winnow.cli.main import app
from winnow.explorer.index import make
from winnow.explorer.index.directions import DirectLogits
from winnow.explorer.index.make import make_index
from winnow.explorer.index.table import FeatureTable
from winnow.explorer.place import Place
from winnow.explorer.site.desk import open_desk
from winnow.explorer.site.serve import make_app
from winnow.sae import Sae
from winnow.schemas.features import IndexSpec
from winnow.schemas.layers import SetSpec
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.subject import Subject

LAYERS = 3


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    hooks = [READ, *SetSpec(layers=(0, LAYERS - 1)).hooks]
    return toy_config(tmp_path_factory.mktemp("toy"), plan={"hooks": hooks}, units=1)


def winnow(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


# ---- explorer ------------------------------------------------------------------------------------

SPEC = IndexSpec(top=4, bands=3, per_band=2, before=6, after=3, logits=5, neighbours=4, coactivation_rows=64)


def indexed(config, uri: str) -> FeatureTable:
    place = Place(config.root, config.subject, config.storage)
    make_index(uri, place, f"{uri}/features", None, SPEC)
    return FeatureTable.open(f"{uri}/features")


@pytest.mark.parametrize("targets", [1, 2])
def test_an_index_promotes_what_all_targets_add_to_the_stream(toy, tmp_path, targets):
    more = {"with_targets": (LATER,)} if targets == 2 else {}
    uri = save_transcoder(toy, tmp_path / "sae", random_transcoder(targets), **more)
    table, sae = indexed(toy, uri), Sae.load(uri)
    assert table.meta.target_hooks == (TARGET, LATER)[:targets]
    stream = (sae.W_dec * sae.target_norm).view(48, targets, D_MODEL).sum(1)
    logits = DirectLogits(Subject.load(toy.subject))(stream[7:8])[0]
    found = table.latent(7)
    assert found["promoted_ids"] == logits.topk(5).indices.tolist()
    cosine = torch.nn.functional.cosine_similarity(sae.W_enc[7], sae.W_dec[7, :D_MODEL], dim=0)
    assert found["enc_dec_cosine"] == pytest.approx(cosine.item(), abs=1e-5)
    store = ActivationStore.open(toy.root)
    rows = torch.from_numpy(store.read_rows(READ, 0, store.rows))
    keep = torch.from_numpy(store.weights([READ, *table.meta.target_hooks], 0, store.rows)) > 0
    codes, latents = sae.encode(rows[keep])
    assert found["fires"] == int(((latents == 7) & (codes > 0)).sum())


def test_the_explorer_reads_ablates_and_steers_a_transcoder(toy, tmp_path):
    uri = save_transcoder(toy, tmp_path / "sae", random_transcoder())
    indexed(toy, uri)
    desk = open_desk([uri], None, Place(toy.root, toy.subject, toy.storage), seats=2)
    client = TestClient(make_app(desk), base_url="http://127.0.0.1:8517")
    shown = client.get("/api/site").json()["saes"][0]
    assert (shown["hook"], shown["targets"]) == (READ, [TARGET])
    text = "the quick brown fox jumps over the lazy dog"
    read = client.post("/api/saes/0/text", json={"text": text}).json()
    latent = read["latents"][0]["latent"]
    cut = client.post("/api/saes/0/ablate", json={"latent": latent, "text": text}).json()
    assert max(cut["kl"]) > 0
    edits = [{"sae": 0, "latent": latent, "op": "scale", "strength": 30.0}]
    lines = client.post("/api/steer", json={"prompt": text, "edits": edits, "tokens": 4}).text.splitlines()
    runs = [json.loads(line) for line in lines]
    clean, changed = (
        [each["logprob"] for each in runs if each.get("run") == run] for run in ("clean", "steered")
    )
    assert clean != changed
    watched = client.post("/api/saes/0/monitor", json={"text": text, "latents": [latent]}).json()
    assert watched["latents"][0]["largest"] > 0


# ---- index and export ----------------------------------------------------------------------------


def test_a_set_is_indexed_layer_by_layer_and_resumes(toy, tmp_path, monkeypatch):
    published = publish_set(toy, tmp_path / "set", cross=True)
    command = ("index", published, "--root", toy.root, "--top", 4, "--neighbours", 4)
    real = make.make_index

    def dies(sae, *rest, **more):
        if sae.endswith("layer_1"):
            raise KeyboardInterrupt
        return real(sae, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(make, "make_index", dies)
        winnow(*command)
    first = open_store(f"{published}/layer_0/features").get("index.json")
    assert open_store(f"{published}/layer_1/features").size("index.json") is None
    code, out, err = winnow(*command, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [found[str(layer)]["hook"] for layer in range(LAYERS)] == [f"resid_mid.{n}" for n in range(LAYERS)]
    assert open_store(f"{published}/layer_0/features").get("index.json") == first
    assert winnow(*command)[0] == 0

    export = ("export-features", published, "--latents", "0-2", "--out")
    code, _, err = winnow(*export, tmp_path / "all")
    assert code == 0, err
    assert (tmp_path / "all" / "layer_2" / "features.html").exists()
    code, _, err = winnow(
        "export-features", f"{published}/layer_1", "--latents", "1", "--out", tmp_path / "one"
    )
    assert code == 0, err
    assert (tmp_path / "one" / "features.html").exists()
    code, _, err = winnow("export-features", published, "--latents", "99", "--out", tmp_path / "none")
    assert code == 2
    assert not (tmp_path / "none").exists()


def test_a_set_that_does_not_fit_is_refused_and_no_index_is_written(toy, tmp_path):
    cases = {
        "also resid_mid.3. Harvest into another root with plan.hooks = [resid_mid.0": {"layers": 4},
        "the subject of": {"weights": "0" * 64},
        "width D": {"d_model": 8},
    }
    for number, (words, how) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        uri = publish_set(toy, folder, **how)
        before = sorted(folder.rglob("*"))
        code, _, err = winnow("index", uri, "--root", toy.root)
        assert code == 2, err
        assert words in err
        assert sorted(folder.rglob("*")) == before
