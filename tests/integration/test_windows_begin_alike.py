"""What a plan says of how a window begins holds for every text that is run beside its dataset."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from typer.testing import CliRunner

from tests.support.bos_subject import BOS, bos_config, make_bos_subject
from tests.support.evaluated import HOOK, random_sae, toy_config
from tests.support.explorer_site import SPEC
from tests.support.pipeline import pipeline_config
from tests.support.sets import random_set
from tests.support.tiny import SENTENCES
from winnow.cli.main import app
from winnow.evaluator import sequences
from winnow.evaluator.circuits.report import windows_of
from winnow.evaluator.judge import family as judge
from winnow.evaluator.n2g import family as n2g
from winnow.evaluator.n2g import learn as n2g_learn
from winnow.evaluator.probes.family import pooled
from winnow.evaluator.prompt import attribute_prompt
from winnow.evaluator.setting import Setting
from winnow.explorer.index.make import make_index
from winnow.explorer.place import Place
from winnow.explorer.site.desk import open_desk
from winnow.explorer.site.monitor import monitor
from winnow.explorer.site.reading import read_tokens, tokenise
from winnow.explorer.site.serve import make_app
from winnow.harvester.plan.tokenise import DocumentTokenizer
from winnow.sae.formats.convert import export_sae, import_sae
from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError
from winnow.schemas.evaluation import EvaluateSpec
from winnow.schemas.features import FeatureIndex
from winnow.schemas.harvest import PlanSpec
from winnow.schemas.window import WindowRule
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.subject.load import Subject
from winnow.trainer.run.loop import train

TIGHT = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return bos_config(tmp_path_factory.mktemp("bos"), dtype="float32")


@pytest.fixture(scope="module")
def uri(config):
    """An SAE with the card that training gives it."""
    sae, uri = random_sae(), f"{config.root}-sae"
    rule = WindowRule.of(ActivationStore.open(config.root).plan)
    sae.save(open_store(uri), hook=HOOK, window=rule)
    return uri


@pytest.fixture(scope="module")
def setting(config, uri):
    return Setting.open(uri, config.root, EvaluateSpec(n2g_latents=3, n2g_examples=2, n2g_train_rows=64))


@pytest.fixture(scope="module")
def stored(setting):
    """(text of a stored window, its tokens [T], its stored rows [T - 1, D], their codes [T, N])."""
    dataset, subject = setting.dataset, setting.subject
    number = next(
        n for n in range(64) if subject.tokenizer.decode(dataset.tokens(n)[1:]).count("\ufffd") == 0
        and subject.encode(text_of(setting, n), setting.window) == dataset.tokens(n).tolist()
    )  # fmt: skip
    windows, positions = dataset.locate(np.arange(dataset.plan.rows_per_unit))
    mine = np.flatnonzero(windows == number)
    mine = mine[np.argsort(positions[mine])]
    rows = torch.from_numpy(dataset.read_rows(HOOK, 0, dataset.plan.rows_per_unit)[mine])
    values, indices = setting.sae.encode(rows)
    dense = torch.zeros(len(rows) + 1, setting.sae.latents)
    dense[1:].scatter_add_(1, indices, values)
    return text_of(setting, number), dataset.tokens(number).tolist(), rows, dense


def text_of(setting, number: int) -> str:
    return setting.subject.tokenizer.decode(setting.dataset.tokens(number)[1:])


@pytest.fixture(scope="module")
def desk(config, uri):
    make_index(uri, Place(config.root, config.subject, config.storage), f"{uri}/features", None, SPEC)
    return open_desk([uri], None, Place(config.root, config.subject, config.storage), seats=4)


def test_a_texts_rows_are_the_stored_rows_of_its_tokens(setting, stored):
    text, tokens, rows, dense = stored
    assert setting.subject.tokenizer.convert_ids_to_tokens(tokens[0]) == BOS
    ids = tokenise(setting.subject, text, 512, setting.window)
    assert ids == tokens
    found = setting.subject.activations([ids], [HOOK])[HOOK][0, 1:]
    torch.testing.assert_close(found, rows, **TIGHT)
    without = setting.subject.activations([ids[1:]], [HOOK])[HOOK][0]
    assert ((without - rows).norm() / rows.norm()) > 0.05  # what the tools did before
    reading = read_tokens(setting.subject, setting.sae, ids)
    torch.testing.assert_close(reading.of(7), dense[:, 7], **TIGHT)


def test_a_text_that_spells_bos_has_it_once(setting, stored):
    text, tokens, _, _ = stored
    spelt = WindowRule(bos=True, control_tokens="token")
    assert setting.subject.encode(BOS + text, spelt) == tokens
    assert setting.subject.encode(BOS + text, spelt.inside) == tokens
    # Read as text, the spelling is none.
    assert len(setting.subject.encode(BOS + text, setting.window)) > len(tokens)


def test_the_text_page_and_the_monitor_read_what_is_stored(desk, stored):
    text, tokens, _, dense = stored
    client = TestClient(make_app(desk), base_url="http://127.0.0.1:8517")
    page = client.post("/api/saes/0/text", json={"text": text}).json()
    assert [token["token"] for token in page["tokens"]][:1] == [BOS]
    for token, row in zip(page["tokens"], dense, strict=True):
        for latent, value in token["latents"]:
            assert value == pytest.approx(float(row[latent]), abs=1e-4)
    active = int((dense > 0).sum())
    assert sum(len(token["latents"]) for token in page["tokens"]) == active > 0
    report = client.post("/api/saes/0/monitor", json={"text": text, "latents": [7, 9]}).json()
    assert report["bos"] is True
    assert report["token_ids"] == tokens
    assert report["latents"][0]["values"] == pytest.approx(dense[:, 7].tolist(), abs=1e-4)
    assert client.get("/api/site").json()["saes"][0]["bos"] is True


def test_an_ablation_of_a_text_is_that_of_its_window(desk, setting, stored):
    text, tokens, _, dense = stored
    client = TestClient(make_app(desk), base_url="http://127.0.0.1:8517")
    latent = int(dense.sum(0).argmax())
    window = next(n for n in range(64) if setting.dataset.tokens(n).tolist() == tokens)
    one = client.post("/api/saes/0/ablate", json={"latent": latent, "text": text}).json()
    other = client.post("/api/saes/0/ablate", json={"latent": latent, "window": window}).json()
    assert one == other
    assert max(one["values"]) > 0


def test_steering_continues_a_prompt_as_a_window(desk, setting, stored):
    text, tokens, _, _ = stored
    client = TestClient(make_app(desk), base_url="http://127.0.0.1:8517")
    body = {"prompt": text, "edits": [], "tokens": 3, "temperature": 0}
    lines = [json.loads(line) for line in client.post("/api/steer", json=body).text.splitlines()]
    clean = [line["logprob"] for line in lines if line.get("run") == "clean"]
    expected = setting.subject.generate(tokens, max_new_tokens=3, temperature=0)
    assert clean == pytest.approx([token.logprob for token in expected], abs=1e-5)


def test_the_card_tells_the_monitor_in_python(setting, stored):
    text, tokens, _, dense = stored
    report = monitor(text, setting.sae, [7], setting.subject)
    assert report.token_ids == tuple(tokens)
    assert report.latents[0].values == pytest.approx(dense[:, 7].tolist(), abs=1e-4)
    assert monitor(text, setting.sae, [7], setting.subject, rule=WindowRule()).token_ids == tuple(tokens[1:])


def test_attribution_reads_what_is_stored_and_says_so(config, uri, setting, stored):
    text, tokens, _, dense = stored
    answer = setting.subject.tokenizer.decode([setting.dataset.tokens(1)[3]])
    found = attribute_prompt(setting, text, answer, None, 30)
    assert found["bos"] is True
    for effect in found["effects"]:
        assert effect["position"] > 0
        expected = float(dense[effect["position"], effect["latent"]])
        assert effect["code"] == pytest.approx(expected, abs=1e-4)
    assert found["metric"] == pytest.approx(
        float(setting.subject.logits([tokens])[0, -1].log_softmax(0)[setting.dataset.tokens(1)[3]]), abs=1e-5
    )
    arguments = ["attribute", uri, "--root", config.root, "--prompt", text, "--answer", answer]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert "BOS goes before the prompt" in " ".join(result.stderr.split())


def test_generation_begins_as_it_is_told_or_as_the_tokenizer_does(setting, stored):
    subject, (text, tokens, _, _) = setting.subject, stored

    def first(prompt, **more):
        return next(subject.generate(prompt, temperature=0, max_new_tokens=1, **more)).logits

    assert torch.equal(first(text), first(tokens))
    assert torch.equal(first(text, bos=True), first(tokens))
    assert torch.equal(first(text, bos=False), first(tokens[1:]))
    assert not torch.equal(first(text), first(text, bos=False))
    assert subject.encode(text) == tokens
    assert subject.encode(text, WindowRule()) == tokens[1:]


def test_the_plans_own_bos_and_its_reading_of_control_tokens_travel(setting):
    subject, plan = setting.subject, setting.dataset.plan
    bos, plain = plan.bos_token, subject.encode("grain <s> chaff", setting.window)
    assert setting.window == WindowRule(bos=True, bos_token=bos, control_tokens="text")
    assert plain.count(bos) == 1
    spelled = plan.model_copy(
        update={"bos_token_id": 9, "spec": plan.spec.model_copy(update={"control_tokens": "token"})}
    )
    ids = subject.encode("grain <s> chaff", WindowRule.of(spelled))
    assert ids[0] == 9
    assert ids.count(bos) == 1
    assert len(ids) < len(plain)


def test_a_tokenizer_without_bos_adds_none_and_cannot_be_made_to(tmp_path):
    subject = Subject.load(pipeline_subject(tmp_path))
    assert subject.encode("every harvest") == subject.encode("every harvest", WindowRule())
    with pytest.raises(ConfigError, match="BOS token"):
        subject.generate("every harvest", bos=True)


def test_text_begins_with_a_bos_that_only_the_configuration_adds(tmp_path):
    """In plans, and in every window for a set whose card says nothing of how its windows began."""
    folder = make_bos_subject(tmp_path)
    for name, field, value in (
        ("tokenizer.json", "post_processor", None),
        ("tokenizer_config.json", "add_bos_token", True),
    ):
        facts = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**facts, field: value}))
    subject = Subject.load(str(folder))
    bos = subject.tokenizer.convert_tokens_to_ids(BOS)
    planned = DocumentTokenizer(subject.tokenizer, subject.identity, PlanSpec(hooks=(HOOK,)))
    assert (planned.spec.bos, planned.bos) == ("window", bos)
    windows = windows_of(subject, random_set(), " ".join(SENTENCES), 8, 3)
    assert windows[:, 0].tolist() == [bos] * 3
    assert windows[:, 1:].flatten().tolist() == subject.encode(" ".join(SENTENCES), WindowRule())[:21]


def pipeline_subject(folder) -> str:
    pipeline_config(folder)
    return str(folder / "subject")


def test_probes_and_n_grams_read_what_is_stored(setting, stored):
    text, tokens, _, dense = stored
    (codes,) = sequences.sequence_codes(setting, [tokens[1:]], "test")
    row = torch.zeros(len(codes.values), setting.sae.latents).scatter_add_(1, codes.indices, codes.values)
    torch.testing.assert_close(row, dense[1:], **TIGHT)
    features, latents = pooled(setting, [text], "test")
    expected = dense[1:].mean(0)[torch.from_numpy(latents)]
    np.testing.assert_allclose(features["mean"][0], expected, rtol=1e-3, atol=1e-4)


def test_bos_is_no_text_of_an_n_gram_or_of_a_judges_snippet(setting, monkeypatch):
    bos = setting.window.bos_token
    seen: list[int] = []
    learn = n2g_learn.learn

    def watched(setting, examples, slots, tokens):
        seen.extend(token for example in examples for token in example.ids)
        seen.extend(tokens.reshape(-1).tolist())
        return learn(setting, examples, slots, tokens)

    monkeypatch.setattr(n2g, "learn", watched)
    n2g.measure(setting)
    assert seen
    assert bos not in seen
    spec = EvaluateSpec(judge={"endpoint": "http://127.0.0.1:1/v1", "model": "none", "examples": 2})
    judged = judge.Judged(
        Setting.open(setting.uri, setting.dataset.store.uri, spec), endpoint=None, given={7: "x"}
    )
    snippet = judged._unseen.around(np.zeros((64, 17), np.bool_), 0, 1)
    assert snippet.tokens[0] == ""
    assert BOS not in snippet.text()


def test_training_writes_it_on_the_card_and_exports_say_it(config, tmp_path):
    out = str(tmp_path / "run")
    spec = config.train.model_copy(update={"out": out, "epochs": 0.5})
    train(config.model_copy(update={"train": spec}))
    card = Sae.load(out).card
    assert card.window == WindowRule.of(ActivationStore.open(config.root).plan)
    assert card.window.bos
    export_sae(out, "saelens", tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "cfg.json").read_text())["metadata"]["prepend_bos"] is True
    back = import_sae(tmp_path / "theirs", "saelens", str(tmp_path / "back"))
    assert back.window == WindowRule(bos=True)
    export_sae(str(tmp_path / "back"), "saelens", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "cfg.json").read_text())["metadata"]["prepend_bos"] is True


def test_an_sae_of_other_windows_is_warned_of(uri, tmp_path, caplog):
    plain = toy_config(tmp_path / "plain", units=1)
    Setting.open(uri, plain.root)
    words = "was trained on a dataset in which windows begin with BOS; in this one windows begin with text"
    assert words in caplog.text


def test_an_index_of_before_begins_as_its_datasets_plan_says(config, uri, desk, caplog):
    store = open_store(f"{uri}/features")
    meta = FeatureIndex.from_json(store.get("index.json"), origin="test")
    assert meta.window == desk.exhibits[0].window
    old = meta.model_copy(update={"window": None})
    assert "window" not in json.loads(old.to_json())
    store.put("index.json", old.to_json())
    try:
        again = open_desk([uri], None, Place(config.root, config.subject, config.storage), seats=1)
        assert again.exhibits[0].window == meta.window
        away = open_desk([uri], None, Place("nowhere", config.subject, config.storage), seats=1)
        assert not away.exhibits[0].window.bos
        assert "texts are read without it" in caplog.text
    finally:
        store.put("index.json", meta.to_json())
