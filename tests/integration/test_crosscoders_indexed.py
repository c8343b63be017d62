"""Crosscoders in the index and the explorer: what each part contributes, and whose a latent is."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from typer.testing import CliRunner

from tests.support.crosscoders import (
    BASE_ONLY,
    CHAT_ONLY,
    HOOKS,
    LATENTS,
    SHARED,
    WIDTHS,
    make_pair,
    random_crosscoder,
    save_crosscoder,
    write_config,
)
from tests.support.evaluated import save_sae, toy_config
from winnow import Latents
from winnow.cli.main import app
from winnow.evaluator.families.diffing import relative_norms
from winnow.explorer.index.build import Recipe
from winnow.explorer.index.crew import IndexWorker
from winnow.explorer.index.directions import DirectLogits
from winnow.explorer.index.make import make_index
from winnow.explorer.index.table import FeatureTable
from winnow.explorer.place import Place
from winnow.explorer.site.desk import open_desk
from winnow.explorer.site.serve import make_app
from winnow.sae import Sae
from winnow.schemas.features import IndexSpec
from winnow.store.read.joined import open_roots
from winnow.subject import Subject

SPEC = IndexSpec(top=4, bands=3, per_band=2, before=6, after=3, logits=5, neighbours=4, coactivation_rows=64)
TEXT = "the brown fox leaps over a sparse harvest of grain"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), units=1)


@pytest.fixture(scope="module")
def made(pair, tmp_path_factory):
    """A config, the crosscoder's address; it is indexed by a command that names nothing else."""
    folder = tmp_path_factory.mktemp("made")
    config, uri = save_crosscoder(pair, folder / "sae", random_crosscoder())
    command = ["index", uri, "--top", "4", "--logits", "5", "--neighbours", "4", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert [part["name"] for part in json.loads(done.stdout)["parts"]] == ["base", "chat"]
    return config, uri


@pytest.fixture(scope="module")
def table(made):
    return FeatureTable.open(f"{made[1]}/features")


@pytest.fixture(scope="module")
def client(made):
    desk = open_desk([made[1]], None, Place.in_config(made[0]), seats=2)
    return TestClient(make_app(desk), base_url="http://127.0.0.1:8517", raise_server_exceptions=False)


def rows_of(config, sae):
    """All rows of weight 1, normalised, their windows and positions."""
    dataset = open_roots("", config.train.roots)
    count = dataset.plan.rows_per_unit * dataset.plan.units
    x = np.concatenate([dataset.read_rows(hook, 0, count) for hook in HOOKS], axis=1)
    keep = dataset.weights(HOOKS, 0, count) > 0
    window, position = dataset.locate(np.arange(count))
    return torch.from_numpy(x[keep]), window[keep], position[keep]


def test_every_part_is_shown_beside_the_activation(made, table):
    config, uri = made
    sae = Sae.load(uri)
    x, window, position = rows_of(config, sae)
    values, indices = sae.encode(x)
    dense = torch.zeros(len(x), LATENTS).scatter(1, indices, values)
    alone = [
        (part - bias) @ rows.T
        for part, bias, rows in zip(
            x.split(WIDTHS, 1), sae.b_pre.split(WIDTHS), sae.W_enc.split(WIDTHS, 1), strict=True
        )
    ]
    at = {(int(w), int(p)): row for row, (w, p) in enumerate(zip(window, position, strict=True))}
    assert table.meta.rows == len(x)
    shown = 0
    for latent in (SHARED, 11):
        found = table.latent(latent)
        assert found["fires"] == int((dense[:, latent] > 0).sum())
        for each in found["examples"]:
            for i, value in enumerate(each["values"]):
                row = at.get((each["window"], each["first"] + i))
                active = row is not None and dense[row, latent] > 0
                assert value == pytest.approx(float(dense[row, latent]) if active else 0, abs=1e-5)
                for number in range(2):
                    wanted = float(alone[number][row, latent]) if active else 0
                    assert each[f"part_{number}"][i] == pytest.approx(wanted, abs=1e-4)
                if active:
                    together = each["part_0"][i] + each["part_1"][i] + sae.b_enc[latent].item()
                    assert together == pytest.approx(value, abs=1e-4)
                    shown += 1
    assert shown > 20


def test_each_part_promotes_in_its_own_subject(pair, made, table):
    sae = Sae.load(made[1])
    for latent in (SHARED, 11, CHAT_ONLY):
        found = table.latent(latent)
        for number, (config, rows) in enumerate(zip(pair, sae.W_dec.split(WIDTHS, 1), strict=True)):
            logits = DirectLogits(Subject.load(config.subject))(rows[latent : latent + 1])[0]
            wanted = logits.topk(5).indices.tolist() if rows[latent].any() else []
            assert found[f"promoted_ids_{number}"] == wanted
        home = int(relative_norms(sae)[latent].argmax())
        assert found["promoted_ids"] == found[f"promoted_ids_{home}"]


def test_latents_are_listed_and_filtered_by_whose_they_are(made, client):
    norms = relative_norms(Sae.load(made[1]))
    shown = client.get("/api/site").json()
    facts = shown["saes"][0]
    assert [part["hook"] for part in facts["parts"]] == list(HOOKS)
    assert [part["model"] for part in facts["parts"]] == ["subject", "chat"]
    assert facts["classes"] == ["base", "chat", "shared", "neither"]
    assert {"relative_norm.base", "relative_norm.chat"} <= set(facts["axes"]) & set(shown["axes"])

    def listed(**query):
        reply = client.get("/api/saes/0/latents", params={"limit": 100} | query)
        assert reply.status_code == 200, reply.text
        return [row["latent"] for row in reply.json()["rows"]]

    assert listed(of="base") == [BASE_ONLY]
    assert listed(of="chat") == [CHAT_ONLY]
    assert SHARED in listed(of="shared")
    assert sorted(listed(of="shared") + listed(of="neither") + [BASE_ONLY, CHAT_ONLY]) == list(range(LATENTS))
    order = listed(sort="relative_norm.chat")
    assert order[0] == CHAT_ONLY
    assert order[-1] == BASE_ONLY
    assert order == sorted(order, key=lambda latent: -norms[latent, 1])
    points = client.get("/api/saes/0/map", params={"x": "relative_norm.chat", "of": "shared"}).json()
    assert points["x"] == pytest.approx([norms[n, 1].item() for n in points["latents"]], rel=1e-3)
    for query in ({"of": "nobody"}, {"sort": "relative_norm.other"}, {"sort": "no such axis"}):
        reply = client.get("/api/saes/0/latents", params=query)
        assert reply.status_code in (400, 422)
    brief = client.get(f"/api/saes/0/brief/{CHAT_ONLY}").json()
    assert (brief["owner"], brief["norms"]) == ("chat", [0, 1])


def test_a_latents_page_has_the_parts(client):
    page = client.get(f"/api/saes/0/features/{SHARED}").json()
    assert [part["name"] for part in page["parts"]] == ["base", "chat"]
    assert [part["relative_norm"] for part in page["parts"]] == pytest.approx([0.5, 0.5], abs=1e-6)
    assert page["brief"]["owner"] == "shared"
    assert all(len(part["promoted"]) == 5 for part in page["parts"])
    example = page["examples"][0]
    assert [len(values) for values in example["parts"]] == [len(example["tokens"])] * 2
    assert not {key for key in example if key.startswith("part_")}


def test_texts_are_read_by_both_subjects(pair, made, client):
    base, chat = (Subject.load(config.subject) for config in pair)
    ids = base.tokenizer.encode(TEXT, add_special_tokens=False)
    rows = [subject.activations([ids], ["resid_post.1"])["resid_post.1"][0] for subject in (base, chat)]
    sae = Sae.load(made[1])
    values, indices = sae.encode(torch.cat(rows, dim=1))
    found = client.post("/api/saes/0/text", json={"text": TEXT}).json()
    for at, token in enumerate(found["tokens"][1:], start=1):
        if token["read"]:
            best = int(indices[at][values[at].argmax()])
            assert token["latents"][0] == [best, pytest.approx(float(values[at].max()), rel=1e-4)]
    assert sum(token["read"] for token in found["tokens"]) > 5
    watched = client.post("/api/saes/0/monitor", json={"text": TEXT, "latents": [SHARED]}).json()
    assert watched["hook"] == HOOKS[0]


def test_notebook_and_export_take_it_too(made, tmp_path):
    config, uri = made
    latents = Latents.open(uri, config)
    assert "chat/resid_post.1" in repr(latents)
    assert len(latents.read(TEXT).strongest(3)) == 3
    command = ["export-features", uri, "--latents", f"{SHARED},{CHAT_ONLY}", "--out", str(tmp_path / "site")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    page = (tmp_path / "site" / "features.html").read_text()
    assert "shared; relative decoder norm: base 0.50, chat 0.50" in page
    assert "base/resid_post.1, chat/resid_post.1 of subject, chat" in page


def test_datasets_and_subjects_that_have_moved_are_named_by_the_config(pair, made, tmp_path):
    config, uri = made
    raw = config.model_dump(mode="json") | {"evaluate": {"subjects": {"chat": pair[0].subject.model}}}
    path = write_config(type(config).model_validate(raw), tmp_path / "config.yaml")
    done = CliRunner().invoke(app, ["index", uri, "--config", str(path), "--out", str(tmp_path / "index")])
    assert done.exit_code == 2
    assert "subject" in done.stderr
    assert not list(tmp_path.glob("index/*.json"))


def test_two_workers_make_the_same_bytes(made, tmp_path):
    """`--workers 2` without Ray: each worker opens both datasets and subjects from what the driver sends."""
    config, uri = made
    place, spec = Place.in_config(config), FeatureTable.open(f"{uri}/features").meta.spec
    recipe = Recipe(
        uri, config.root, str(tmp_path / "shared"), None, spec, None, config.storage, part_latents=16,
        roots=place.roots, subjects=place.subjects,
    )  # fmt: skip
    workers = [IndexWorker(pickle.loads(pickle.dumps(recipe)), torch.get_num_threads()) for _ in range(2)]

    def make_all(step: str, todo: list[int], done: Callable[[], object]) -> None:
        for worker in workers:
            worker.ready()
        for number in todo:
            workers[number % 2].run(step, number)
            done()

    recipe.open().run(make_all=make_all)
    alone = replace(recipe, out=str(tmp_path / "alone"))
    alone.open().run()
    names = [path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*.parquet")]
    assert len([name for name in names if name.parts[0] == "latents"]) == 3
    for name in names:
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


def test_a_crosscoder_of_one_subject_is_indexed_and_read(tmp_path):
    config = toy_config(tmp_path / "toy", units=1)
    hooks = ("resid_post.1", "mlp_out.0")
    uri = save_sae(config, tmp_path / "sae", random_crosscoder((16, 16)), hook=hooks[0], with_hooks=hooks[1:])
    place = Place.in_config(config)
    meta = make_index(uri, place, f"{uri}/features", None, SPEC)
    assert [part.name for part in meta.parts] == ["resid_post_1", "mlp_out_0"]
    assert (meta.subjects, meta.roots) == ({}, {})
    desk = open_desk([uri], None, place, seats=2)
    client = TestClient(make_app(desk), base_url="http://127.0.0.1:8517")
    assert client.post("/api/saes/0/text", json={"text": TEXT}).status_code == 200
    rows = client.get("/api/saes/0/latents", params={"of": "mlp_out_0"}).json()["rows"]
    assert [row["latent"] for row in rows] == [CHAT_ONLY]


def test_an_index_of_chosen_rows_names_them_and_the_labels_are_read(made, tmp_path):
    config, uri = made
    place, rows = Place.in_config(config), {"rows": {"min_offset": 3}}
    make_index(uri, place, str(tmp_path / "index"), None, IndexSpec(**{**SPEC.model_dump(), **rows}))
    desk = open_desk([uri], [str(tmp_path / "index")], place, seats=1)
    client = TestClient(make_app(desk), base_url="http://127.0.0.1:8517")
    assert client.get("/api/site").json()["saes"][0]["reading"] == "min_offset=3"
    page = client.get(f"/api/saes/0/features/{SHARED}").json()
    found = client.get(f"/api/saes/0/features/{SHARED}/labels").json()
    assert len(found["tokens"]) == len(page["examples"]) > 0
