"""Steering and ablating by a part of a crosscoder: in its own subject, by that part's decoder row."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from tests.support.crosscoders import (
    BASE_ONLY,
    HOOKS,
    LATENTS,
    SHARED,
    WIDTHS,
    make_pair,
    random_crosscoder,
    save_crosscoder,
)
from tests.support.evaluated import save_sae, toy_config
from winnow import Latents
from winnow.explorer.index.make import make_index
from winnow.explorer.place import Place
from winnow.explorer.site.desk import open_desk
from winnow.explorer.site.reading import read_tokens
from winnow.explorer.site.serve import make_app
from winnow.sae import Sae
from winnow.schemas.errors import ConfigError, SaeMismatch
from winnow.schemas.features import IndexSpec
from winnow.store.objects import open_store
from winnow.subject import Subject
from winnow.subject.generate import Steer, steered, steered_hooks

SPEC = IndexSpec(top=2, bands=2, per_band=1, before=4, after=2, logits=5, neighbours=2, coactivation_rows=16)
TEXT = "the brown fox leaps over a sparse harvest of grain"
HOOK = "resid_post.1"
PROMPT = [5, 99, 300, 17, 42, 260]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A crosscoder of two subjects with its index: config, address, and the subjects by name."""
    folder = tmp_path_factory.mktemp("made")
    pair = make_pair(folder, units=1)
    config, uri = save_crosscoder(pair, folder / "sae", random_crosscoder())
    make_index(uri, Place.in_config(config), f"{uri}/features", None, SPEC)
    specs = {name: one.subject for name, one in zip(("base", "chat"), pair, strict=True)}
    return config, uri, {name: Subject.load(spec) for name, spec in specs.items() if spec is not None}


@pytest.fixture(scope="module")
def subjects(made) -> dict[str, Subject]:
    return made[2]


@pytest.fixture(scope="module")
def sae(made) -> Sae:
    return Sae.load(made[1])


@pytest.fixture(scope="module")
def latents(made) -> Latents:
    return Latents.open(made[1], made[0])


@pytest.fixture(scope="module")
def client(made):
    desk = open_desk([made[1]], None, Place.in_config(made[0]), seats=2)
    return TestClient(make_app(desk), base_url="http://127.0.0.1:8517", raise_server_exceptions=False)


def logits(subject: Subject, *steers: Steer) -> torch.Tensor:
    run = subject.generate(PROMPT, steer={HOOK: steers}, max_new_tokens=4, seed=1)
    return torch.stack([token.logits for token in run])


def parts(sae: Sae, latent: int) -> dict[str, torch.Tensor]:
    """The latent's decoder row in each part, in the raw scale (the crosscoder does not normalise)."""
    return dict(zip(("base", "chat"), sae.W_dec.detach()[latent].split(list(WIDTHS)), strict=True))


@pytest.mark.parametrize("name", ["base", "chat"])
def test_the_loaded_subject_says_which_part_is_added(subjects, sae, name):
    found = logits(subjects[name], Steer(sae, SHARED, "add", 3.0))
    row = 3.0 * parts(sae, SHARED)[name]

    def add(rows: torch.Tensor) -> torch.Tensor:
        kept = torch.arange(len(rows))[:, None] < 1
        return torch.where(kept, rows, rows + row)

    wanted = subjects[name].logits([PROMPT], {HOOK: add})[0, -1]
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], logits(subjects[name])[0], atol=1e-2)
    # By name and by hook it is the same.
    for part in (name, f"{name}/{HOOK}"):
        assert torch.equal(logits(subjects[name], Steer(sae, SHARED, "add", 3.0, part=part)), found)
    # Nothing added, or a row of zeros, changes no bit.
    assert torch.equal(logits(subjects[name], Steer(sae, SHARED, "add", 0.0)), logits(subjects[name]))


def test_a_latent_of_the_other_subject_changes_nothing(subjects, sae):
    clean = logits(subjects["chat"])
    assert torch.allclose(logits(subjects["chat"], Steer(sae, BASE_ONLY, "add", 5.0)), clean, atol=1e-4)
    assert not torch.allclose(
        logits(subjects["base"], Steer(sae, BASE_ONLY, "add", 5.0)), logits(subjects["base"]), atol=1e-2
    )


@pytest.mark.parametrize("normalize", ["dataset", "none"])
def test_the_delta_is_the_parts_row_in_its_raw_scale(made, tmp_path, normalize):
    own = random_crosscoder(seed=3)
    if normalize == "dataset":
        fields = (own.d_model, own.latents, own.k, normalize, own.parts)
        scaled = Sae(*fields).requires_grad_(False)
        scaled.W_enc.copy_(own.W_enc)
        scaled.W_dec.copy_(own.W_dec)
        scaled.b_pre.normal_()
        scaled.input_mean.normal_()
        scaled.input_scale.copy_(torch.tensor([2.0, 5.0]))
        own = scaled
    own.save(open_store(str(tmp_path)), hook=HOOKS[0], with_hooks=HOOKS[1:])
    rows = torch.randn(10, WIDTHS[1])
    scale = 5.0 if normalize == "dataset" else 1.0
    found = steered([Steer(own, 7, "add", 0.5, part="chat", skip=0)], 5)(rows)
    torch.testing.assert_close(
        found, rows + 0.5 * scale * own.W_dec.detach()[7, WIDTHS[0] :], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"op": "clamp", "strength": 1.0}, "expected add, got clamp.*rows of all its parts"),
        ({"op": "ablate"}, "expected add, got ablate.*Latents.ablate"),
        ({"op": "add", "part": "chta"}, "expected base or chat, got chta"),
    ],
)
def test_what_needs_other_rows_or_names_no_part_is_refused(sae, asked, message):
    with pytest.raises(ConfigError, match=message):
        Steer(sae, SHARED, **asked)


def test_a_part_of_another_subject_or_hook_is_refused(subjects, sae):
    steer = Steer(sae, SHARED, "add", 1.0, part="chat")
    with pytest.raises(SaeMismatch, match="subject of the part chat"):
        subjects["base"].generate(PROMPT, steer={HOOK: [steer]})
    with pytest.raises(ConfigError, match=r"base \(base/resid_post.1\), chat \(chat/resid_post.1\)"):
        subjects["base"].generate(PROMPT, steer={"resid_post.0": [Steer(sae, SHARED, "add", 1.0)]})
    # A whole pass does not know its subject, and both parts are read at this hook.
    with pytest.raises(ConfigError, match=r"expected base or chat, got none\. Name it"):
        steered_hooks({HOOK: [Steer(sae, SHARED, "add", 1.0)]}, 6)
    with pytest.raises(ConfigError, match="expected base or chat, got none"):
        steered([Steer(sae, SHARED, "add", 1.0)], 6)
    with pytest.raises(ConfigError, match="a published crosscoder"):
        Steer(random_crosscoder(), SHARED, "add", 1.0)
    known = Steer(sae, SHARED, "ablate", part="base", codes=torch.zeros(6))
    with pytest.raises(ConfigError, match="new tokens have no codes"):
        subjects["base"].generate(PROMPT, steer={HOOK: [known]})
    with pytest.raises(ConfigError, match="expected a crosscoder"):
        Steer(Sae(16, 8, 2), 1, "add", 1.0, part="base")


@pytest.mark.parametrize("name", ["base", "chat"])
def test_an_ablation_removes_the_parts_row_times_the_code_of_both(subjects, sae, latents, name):
    latent = latents.read(TEXT).strongest(1)[0]
    found = latents.ablate(TEXT, latent, part=name).effect
    ids = latents.read(TEXT).reading.ids
    codes = read_tokens(subjects, sae, ids).of(latent)
    removed = codes[:, None] * parts(sae, latent)[name]
    assert found.activation == codes.tolist()
    before, after = (
        subjects[name].logits([ids], replace)[0].float().log_softmax(1)
        for replace in ({}, {HOOK: lambda rows: rows - removed})
    )
    kl = (before.exp() * (before - after)).sum(1)
    assert float(kl.max()) > 1e-4
    assert found.kl == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-5)


def test_a_notebook_steers_the_subject_of_the_part(subjects, sae, latents):
    largest = latents.brief(SHARED).largest
    found = latents.steer(TEXT, {SHARED: 2.0}, tokens=5, temperature=0, op="add", part="chat")
    ids = latents.read(TEXT).reading.ids
    drop = latents.exhibit.table.meta.drop_leading
    texts = []
    for steers in ([], [Steer(sae, SHARED, "add", 2.0 * largest, skip=drop)]):
        run = subjects["chat"].generate(ids, steer={HOOK: steers}, max_new_tokens=5, temperature=0)
        texts.append("".join(token.text for token in run))
    assert [found.clean, found.steered] == texts
    with pytest.raises(ConfigError, match="expected add, got clamp"):
        latents.steer(TEXT, {SHARED: 2.0}, part="chat")
    for ask in (lambda: latents.steer(TEXT, {SHARED: 2.0}, op="add"), lambda: latents.ablate(TEXT, SHARED)):
        with pytest.raises(ConfigError, match="a part of it: base or chat, got none"):
            ask()


def test_the_pages_steer_measure_and_ablate_a_part(client, latents, sae):
    def edit(**fields: Any) -> dict[str, Any]:
        return {"sae": 0, "latent": SHARED, "op": "add", "strength": 4.0} | fields

    def steer(*edits: dict[str, Any]) -> Any:
        return client.post("/api/steer", json={"prompt": TEXT, "edits": edits, "tokens": 4, "temperature": 0})

    assert client.get("/api/site").json()["saes"][0]["steers"]
    lines = [json.loads(line) for line in steer(edit(part="chat")).text.splitlines()]
    assert lines[-1] == {"done": True}
    assert [line["run"] for line in lines[:-1]].count("steered") == 4
    refused = [
        (steer(edit()), "a part of it: base or chat, got none"),
        (steer(edit(part="chat", op="clamp")), "expected add, got clamp"),
        (steer(edit(part="chat"), edit(part="base")), "parts of one subject"),
        (client.post("/api/saes/0/ablate", json={"latent": 1, "text": TEXT}), "got none"),
        (client.post("/api/saes/0/promotion", json={"latent": 1}), "got none"),
    ]
    for reply, message in refused:
        assert reply.status_code == 400
        assert message in reply.json()["error"]
    reading, latent = latents.read(TEXT).reading, latents.read(TEXT).strongest(1)[0]
    effects = {}
    for part in ("base", "chat"):
        body = {"latent": latent, "part": part}
        effects[part] = client.post("/api/saes/0/ablate", json=body | {"text": TEXT}).json()
        assert effects[part]["values"] == pytest.approx(reading.of(latent).tolist(), abs=1e-4)
        assert client.post("/api/saes/0/ablate", json=body | {"window": 3}).json()["kl"]
        found = client.post("/api/saes/0/promotion", json={"latent": SHARED, "part": part}).json()
        page = client.get(f"/api/saes/0/features/{SHARED}").json()
        own = next(one for one in page["parts"] if one["name"] == part)
        assert [one["id"] for one in found["direct"]] == [one["id"] for one in own["promoted"]]
        assert found["kl"] > 0
    assert effects["base"]["kl"] != effects["chat"]["kl"]


def test_a_crosscoder_of_one_subject_is_steered_at_each_of_its_hooks(tmp_path):
    config = toy_config(tmp_path / "toy", units=1)
    hooks = ("resid_post.1", "mlp_out.0")
    uri = save_sae(config, tmp_path / "sae", random_crosscoder((16, 16)), hook=hooks[0], with_hooks=hooks[1:])
    make_index(uri, Place.in_config(config), f"{uri}/features", None, SPEC)
    latents = Latents.open(uri, config)
    row = latents.sae.W_dec.detach()[SHARED, 16:]
    # The hook says which part is meant.
    steer = Steer(latents.sae, SHARED, "add", 2.0)
    found = next(latents.subject.generate(PROMPT, steer={"mlp_out.0": [steer]})).logits
    kept = torch.arange(len(PROMPT))[:, None] < 1
    wanted = latents.subject.logits(
        [PROMPT], {"mlp_out.0": lambda rows: torch.where(kept, rows, rows + 2.0 * row)}
    )
    torch.testing.assert_close(found, wanted[0, -1], rtol=1e-4, atol=1e-4)
    assert len(latents) == LATENTS
    assert latents.ablate(TEXT, latents.read(TEXT).strongest(1)[0], part="mlp_out_0").rows
