"""The explorer's API: answers against brute force, refusals, the queue, the gate, a fuzz."""

from __future__ import annotations

import json
import logging
import shutil
import time

import numpy as np
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from starlette.testclient import TestClient

from tests.support.explorer_site import HOOK, LATENTS, Site, make_dataset, make_site
from winnow.explorer.index.subjects import LazySubject
from winnow.explorer.index.table import INDEX_KEY, FeatureTable
from winnow.explorer.place import Place
from winnow.explorer.site.api import steering
from winnow.explorer.site.bodies import MAX_TEXT, SteerBody
from winnow.explorer.site.desk import Desk, add_explanations, open_desk
from winnow.explorer.site.exhibit import Exhibit
from winnow.explorer.site.lane import Busy, Lane
from winnow.explorer.site.serve import make_app
from winnow.sae.model import Sae
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError, NoSae, SaeMismatch
from winnow.schemas.evaluation import Evaluation
from winnow.schemas.features import Explanation
from winnow.store import ActivationStore
from winnow.subject.load import Subject

TEXT = "the brown fox leaps over a sparse harvest of grain"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    site = make_site(tmp_path_factory.mktemp("site"))
    note = Explanation(latent=7, text="Talks of Winnowing", source="somebody", score=0.5)
    with open(f"{site.saes[0]}/features/explanations.jsonl", "w") as file:  # noqa: PTH123
        file.write(note.model_dump_json() + "\n")
    return site


@pytest.fixture(scope="module")
def desk(site) -> Desk:
    return open_desk(list(site.saes), None, Place.of(site.config_path, None), seats=4)


@pytest.fixture(scope="module")
def app(desk):
    return make_app(desk)


@pytest.fixture(scope="module")
def client(app) -> TestClient:
    return TestClient(app, base_url="http://127.0.0.1:8517", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def subject(site) -> Subject:
    return Subject.load(site.config.subject)


@pytest.fixture(scope="module")
def codes(site, subject) -> tuple[list[int], np.ndarray]:
    """(token ids, activations [T, N]) of TEXT by brute force; the first position is not read."""
    ids = subject.tokenizer.encode(TEXT, add_special_tokens=False)
    values, indices = Sae.load(site.saes[0]).encode(subject.activations([ids], [HOOK])[HOOK][0])
    dense = torch.zeros(len(ids), LATENTS).scatter_add_(1, indices, values)
    dense[0] = 0
    return ids, dense.numpy()


def test_explanations_of_every_dataset_are_shown_the_indexs_own_first(site, tmp_path):
    table = FeatureTable.open(f"{site.saes[1]}/features")
    mine = table.meta.plan_fingerprint

    def on(plan: str, text: str, **more) -> Evaluation:
        judged = {"latent": 3, "text": text, "detection": 0.5, "fuzzing": None}
        family = {"settings_sha256": "0" * 64, "figures": (), "details": {"latents": [judged]}}
        return Evaluation.model_validate(
            {
                "sae": "x", "sae_sha256": table.meta.sae_sha256, "plan_fingerprint": plan,
                "dataset_sha256": None, "subject_model": "m", "subject_weights_sha256": "0" * 64,
                "hook": HOOK, "latents": LATENTS, "k": 5, "trained_on_this": plan == mine,
                "families": {"judge": family | {"seconds": 1.0, "finished": "now"}},
            } | more
        )  # fmt: skip

    stored = on("0" * 64, "on other text", others=(on(mine, "on this text"),))
    (tmp_path / "evaluation.json").write_bytes(stored.to_json())
    add_explanations(table, str(tmp_path), site.config.storage)
    assert [each.text for each in table.explanations[3]] == ["on this text", "on other text"]


# ---- pages that need the index only --------------------------------------------------------------


def test_a_feature_page_is_the_index_in_words(client, desk):
    page = client.get("/api/saes/0/features/7").json()
    row, texts = desk.exhibits[0].table.latent(7), desk.exhibits[0].table.texts
    assert page["figures"]["fires"] == row["fires"]
    assert [each["token"] for each in page["promoted"]] == [texts[number] for number in row["promoted_ids"]]
    assert page["examples"][0]["tokens"] == [texts[number] for number in row["examples"][0]["tokens"]]
    assert page["examples"][0]["values"] == pytest.approx(row["examples"][0]["values"], rel=1e-3)
    assert page["explanations"][0]["text"] == "Talks of Winnowing"
    assert page["brief"]["explanation"] == "Talks of Winnowing"


def test_search_finds_explanations_and_tokens_and_filters_by_density(client, desk):
    def found(**query):
        return client.get("/api/saes/0/latents", params={"limit": 100} | query).json()

    assert [row["latent"] for row in found(q="winnowING")["rows"]] == [7]
    token = desk.exhibits[0].table.latent(3)["promoted_ids"][0]
    rows = found(q=desk.exhibits[0].table.texts[token])["rows"]
    assert 3 in [row["latent"] for row in rows]
    density = desk.exhibits[0].table.density()
    middle = float(np.median(density))
    assert found(low=middle)["total"] == int((density >= middle).sum())
    shares = [row["density"] for row in found(sort="density", descending=False)["rows"]]
    assert shares == sorted(shares)
    points = client.get("/api/saes/0/map", params={"x": "density", "y": "largest"}).json()
    assert points["latents"] == list(range(LATENTS))
    assert points["x"] == pytest.approx(density.tolist(), rel=1e-3)


def test_counterparts_are_the_nearest_directions(client, site):
    one, other = (Sae.load(uri).W_dec for uri in site.saes)
    best = (other @ one[7]).topk(8)
    reply = client.get("/api/compare/0/1/7").json()
    assert [each["latent"] for each in reply["matches"]] == best.indices.tolist()
    over = client.get("/api/compare/0/1").json()
    assert over["median"] == pytest.approx((one @ other.T).max(1).values.median().item(), rel=1e-5)
    assert sum(over["counts"]) == over["sampled"] == LATENTS


# ---- pages that run the subject ------------------------------------------------------------------


def test_text_says_which_latents_fire(client, codes):
    ids, dense = codes
    reply = client.post("/api/saes/0/text", json={"text": TEXT}).json()
    assert "".join(each["token"] for each in reply["tokens"]) == TEXT
    assert reply["tokens"][0] | {"token": ""} == {"token": "", "read": False, "latents": []}
    for at in range(1, len(ids)):
        best = reply["tokens"][at]["latents"]
        assert best[0][0] == int(dense[at].argmax())
        assert best[0][1] == pytest.approx(dense[at].max(), abs=1e-4)
    strongest = reply["latents"][0]
    assert strongest["latent"] == int(dense.sum(0).argmax())
    assert strongest["values"] == pytest.approx(dense[:, strongest["latent"]].tolist(), abs=1e-4)


def test_monitor_reports_chosen_latents(client, codes, desk):
    _, dense = codes
    reply = client.post("/api/saes/0/monitor", json={"text": TEXT, "latents": [3, 7]}).json()
    assert reply["sae_sha256"] == desk.exhibits[0].table.meta.sae_sha256
    for each in reply["latents"]:
        assert each["values"] == pytest.approx(dense[:, each["latent"]].tolist(), abs=1e-5)
        assert each["fires"] == int((dense[:, each["latent"]] > 0).sum())


def test_ablation_is_the_splice_without_the_latent(client, site, subject, codes):
    ids, dense = codes
    latent = int(dense.sum(0).argmax())
    sae = Sae.load(site.saes[0])

    def without(rows: torch.Tensor) -> torch.Tensor:
        norm = sae.normalise(rows)[1].norm
        return rows - torch.from_numpy(dense[:, latent])[:, None] * norm * sae.W_dec[latent]

    clean, cut = (subject.logits([ids], replace)[0].log_softmax(1) for replace in (None, {HOOK: without}))
    kl = (clean.exp() * (clean - cut)).sum(1)
    reply = client.post("/api/saes/0/ablate", json={"latent": latent, "text": TEXT}).json()
    assert reply["kl"] == pytest.approx(kl.tolist(), abs=2e-5)
    change = (clean[:-1] - cut[:-1])[range(len(ids) - 1), ids[1:]]
    assert reply["loss_change"][:-1] == pytest.approx(change.tolist(), abs=2e-5)
    assert reply["loss_change"][-1] is None
    at = int(kl.argmax())
    lost = (cut.exp() - clean.exp())[at]
    texts = subject.tokenizer.convert_ids_to_tokens([int(lost.argmin())])
    assert reply["down"][at][0]["change"] == pytest.approx(lost.min().item(), abs=2e-6), texts


def test_a_window_can_be_ablated_and_is_remembered(client, site, desk):
    window = desk.exhibits[0].table.latent(7)["examples"][0]["window"]
    reply = client.post("/api/saes/0/ablate", json={"latent": 7, "window": window}).json()
    tokens = ActivationStore.open(site.root).tokens(window)
    assert reply["tokens"] == desk.exhibits[0].words(tokens.tolist())
    assert max(reply["values"]) == pytest.approx(
        max(desk.exhibits[0].table.latent(7)["examples"][0]["values"]), rel=0.02
    )  # stored rows are bfloat16
    key = ("ablation", 0, 7, None, window, "")
    assert desk.effects[key]["kl"] == reply["kl"]
    desk.effects[key]["kl"] = ["remembered"]
    again = client.post("/api/saes/0/ablate", json={"latent": 7, "window": window}).json()
    assert again["kl"] == ["remembered"]


def test_promotion_is_the_mean_change_over_windows_in_which_the_latent_is_clamped(
    client, site, subject, desk
):
    table, sae = desk.exhibits[0].table, Sae.load(site.saes[0])
    row, drop, dataset = table.latent(7), table.meta.drop_leading, ActivationStore.open(site.root)
    drawn = sorted(np.random.default_rng(0).choice(table.meta.windows, 8, replace=False).tolist())

    def clamped(rows: torch.Tensor) -> torch.Tensor:
        code = torch.zeros(len(rows), LATENTS).scatter_add_(1, *reversed(sae.encode(rows)))[:, 7]
        norm = sae.normalise(rows)[1].norm
        new = rows + (row["largest"] - code)[:, None] * norm * sae.W_dec[7]
        return torch.cat([rows[:drop], new[drop:]])

    moved, kl = [], []
    for window in drawn:
        ids = [dataset.tokens(window).tolist()]
        clean, pushed = (
            subject.logits(ids, replace)[0, drop:].log_softmax(1) for replace in (None, {HOOK: clamped})
        )
        moved.append(pushed - clean)
        kl.append((clean.exp() * (clean - pushed)).sum(1))
    change = torch.cat(moved).mean(0)[: len(table.texts)]
    reply = client.post("/api/saes/0/promotion", json={"latent": 7}).json()
    assert reply["strength"] == row["largest"]
    assert (reply["windows"], reply["positions"]) == (8, len(torch.cat(kl)))
    assert reply["kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-3)
    best = change.topk(5)
    assert [each["id"] for each in reply["up"]] == best.indices.tolist()
    assert [each["score"] for each in reply["up"]] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert [each["id"] for each in reply["down"]] == change.topk(5, largest=False).indices.tolist()
    assert [each["id"] for each in reply["direct"]] == row["promoted_ids"]
    order = change.argsort(descending=True).tolist()
    for each in reply["direct"]:
        assert each["change"] == pytest.approx(change[each["id"]].item(), abs=1e-4)
        assert each["rank"] == order.index(each["id"]) + 1
        assert each["shared"] == (each["rank"] <= 5)
    # Remembered, and another strength is another question.
    desk.effects["promotion", 0, 7, row["largest"], ""]["kl"] = "remembered"
    assert client.post("/api/saes/0/promotion", json={"latent": 7}).json()["kl"] == "remembered"
    weaker = client.post("/api/saes/0/promotion", json={"latent": 7, "strength": 0.1}).json()
    assert weaker["kl"] < torch.cat(kl).mean()


def test_the_map_by_direction_is_the_decoders_principal_components(client, site, desk):
    rows = Sae.load(site.saes[0]).W_dec.double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    _, _, vectors = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    reply = client.get("/api/saes/0/map?x=direction_1&y=direction_2").json()
    for found, axis in ((reply["x"], vectors[0]), (reply["y"], vectors[1])):
        wanted = (rows - rows.mean(0)) @ axis
        sign = 1 if axis[axis.abs().argmax()] > 0 else -1
        assert found == pytest.approx((sign * wanted).tolist(), abs=1e-4)
    assert "direction_1" in desk.exhibits[0].facts()["axes"]


def test_an_older_index_has_no_map_by_direction(site):
    table = FeatureTable.open(f"{site.saes[0]}/features")
    table.summary = table.summary.drop_columns(["direction_1", "direction_2"])
    older = Exhibit("older", site.saes[0], table)
    assert "direction_1" not in older.facts()["axes"]
    assert "density" in older.facts()["axes"]
    with pytest.raises(ConfigError, match="an index that has it"):
        older.axis("direction_1")


def test_no_field_of_the_address_is_a_file(client):
    assert client.get("/?name=style.css").headers["content-type"].startswith("text/html")
    assert client.get("/style.css").headers["content-type"].startswith("text/css")
    assert client.get("/nothing.css").status_code == 404


def test_labels_say_what_the_tokens_of_the_examples_are(client, site, desk):
    dataset = ActivationStore.open(site.root)
    reply = client.get("/api/saes/0/features/7/labels").json()
    assert reply["sources"] == ["corpus.jsonl", "letters.jsonl"]
    assert reply["roles"] == list(dataset.plan.labels.roles)
    examples = desk.exhibits[0].table.latent(7)["examples"]
    assert len(reply["tokens"]) == len(examples) > 0
    for found, each in zip(reply["tokens"], examples, strict=True):
        unit, window = divmod(each["window"], dataset.plan.spec.windows_per_unit)
        labels = dataset.unit_labels(unit)
        wanted = {name: int(labels[name][window, each["position"]]) for name in ("role", "turn", "source")}
        assert found == wanted
    assert {found["source"] for found in reply["tokens"]} == {0, 1}
    assert client.get("/api/site").json()["labels"]


def test_labels_of_another_dataset_are_refused(desk):
    with pytest.raises(ConfigError, match="the dataset that was indexed"):
        desk.kinds.of("0" * 64, [(0, 1)])


def test_promotion_needs_the_dataset_and_a_latent(client, site, tmp_path):
    reply = client.post("/api/saes/0/promotion", json={"latent": LATENTS})
    assert reply.status_code == 400
    assert "latent" in reply.json()["error"]
    alone = open_desk([site.saes[0]], None, Place(str(tmp_path), site.config.subject, StorageSpec()), seats=2)
    there = TestClient(make_app(alone), base_url="http://127.0.0.1:8517")
    reply = there.post("/api/saes/0/promotion", json={"latent": 7})
    assert reply.status_code == 400
    assert "the dataset is not available" in reply.json()["error"]


def lines(reply) -> list[dict]:
    return [json.loads(line) for line in reply.text.splitlines()]


def test_steering_streams_both_runs_and_changes_only_the_steered_one(client, subject):
    def runs(**edit):
        body = {"prompt": TEXT, "tokens": 6, "edits": [{"latent": 3} | edit], "seed": 5}
        found = lines(client.post("/api/steer", json=body))
        assert found[-1] == {"done": True}
        return ([each for each in found[:-1] if each["run"] == run] for run in ("clean", "steered"))

    clean, same = runs(op="scale", strength=1.0)
    assert [each["logprob"] for each in clean] == [each["logprob"] for each in same]  # bit for bit
    alone = list(subject.generate(TEXT, max_new_tokens=6, seed=5, temperature=0.8))
    assert [each["logprob"] for each in clean] == pytest.approx([each.logprob for each in alone], abs=1e-5)
    clean, steered = runs(op="clamp", strength=5.0)
    assert clean[0]["logprob"] != steered[0]["logprob"]


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("get", "/api/saes/9/features/0", None),
        ("get", f"/api/saes/0/features/{LATENTS}", None),
        ("get", f"/api/compare/0/1/{LATENTS}", None),
        ("post", "/api/saes/0/monitor", {"text": TEXT, "latents": [LATENTS]}),
        ("post", "/api/saes/0/ablate", {"latent": 0}),
        ("post", "/api/saes/0/ablate", {"latent": 0, "window": 10**6}),
        ("post", "/api/steer", {"prompt": TEXT, "edits": [{"latent": LATENTS}]}),
        ("post", "/api/saes/0/text", {"text": "word " * 700}),
    ],
)
def test_what_does_not_exist_is_refused_in_a_sentence(client, method, path, body):
    reply = client.get(path) if method == "get" else client.post(path, json=body)
    assert reply.status_code == 400
    assert "expected" in reply.json()["error"]
    assert client.app.openapi() is not None


def test_inputs_are_bounded(client):
    assert client.post("/api/saes/0/text", json={"text": "x" * (MAX_TEXT + 1)}).status_code == 422
    assert client.post("/api/saes/0/text", json={"text": "x" * 70_000}).status_code == 413
    chunks = (b"x" * 1000 for _ in range(100))  # no length is told
    reply = client.post("/api/saes/0/text", content=chunks, headers={"Content-Type": "application/json"})
    assert 400 <= reply.status_code < 500
    steer = {"prompt": TEXT, "edits": [], "tokens": 10**6}
    assert client.post("/api/steer", json=steer).status_code == 422


def test_a_full_queue_says_busy_and_streams_give_their_seat_back(client, desk):
    for _ in range(desk.lane.seats):
        desk.lane.sit()
    try:
        reply = client.post("/api/saes/0/text", json={"text": TEXT})
        assert reply.status_code == 503
        assert reply.headers["Retry-After"]
        assert "busy" in reply.json()["error"]
        assert client.get("/api/saes/0/features/0").status_code == 200  # pages are not queued
    finally:
        for _ in range(desk.lane.seats):
            desk.lane.leave()
    for _ in range(desk.lane.seats + 1):
        body = {"prompt": TEXT, "tokens": 1, "edits": []}
        assert client.post("/api/steer", json=body).status_code == 200
        assert client.post("/api/steer", json=body | {"edits": [{"latent": 10**6}]}).status_code == 400


def test_a_visitor_who_leaves_gives_the_seat_back(desk):
    lane, desk_lane = Lane(1), desk.lane
    desk.lane = lane
    try:
        stream = steering(desk, SteerBody(prompt=TEXT, edits=[], tokens=50))
        with pytest.raises(Busy):
            lane.sit()

        async def gone(_):
            raise OSError("the connection is closed")

        async def nothing():
            return {"type": "http.disconnect"}

        import anyio

        async def call():
            await stream({"type": "http", "asgi": {"spec_version": "2.4"}}, nothing, gone)

        with pytest.raises(Exception):  # noqa: B017  (starlette's name for it differs by version)
            anyio.run(call)
        deadline = time.monotonic() + 60  # the thread that was making a token ends it first
        while True:
            try:
                return lane.sit()
            except Busy:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        desk.lane = desk_lane


# ---- the gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8517", "127.0.0.1.evil.example", "", "[::1"])
def test_other_hosts_names_are_refused(client, host):
    for path in ("/", "/api/site", "/main.js"):
        assert client.get(path, headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1:8517", "localhost:1", "[::1]:8517"])
def test_loopback_names_are_answered(client, host):
    assert client.get("/api/site", headers={"Host": host}).status_code == 200


def test_other_sites_cannot_post_here(client):
    body = {"text": TEXT}
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        assert client.post("/api/saes/0/text", json=body, headers={"Origin": origin}).status_code == 403
    own = {"Origin": "http://127.0.0.1:8517"}
    assert client.post("/api/saes/0/text", json=body, headers=own).status_code == 200


def test_beyond_loopback_a_token_is_asked_for(desk):
    client = TestClient(make_app(desk, "right"), base_url="http://box.example:8517", follow_redirects=False)
    for path in ("/", "/main.js", "/api/site", "/?token=wrong", "/?token="):
        assert client.get(path).status_code == 401
    assert client.get("/api/site", headers={"Authorization": "Bearer right"}).status_code == 200
    reply = client.get("/?page=map&token=right")
    assert reply.status_code == 303
    assert reply.headers["Location"] == "/?page=map"
    assert "HttpOnly" in reply.headers["Set-Cookie"]
    assert "SameSite=strict" in reply.headers["Set-Cookie"]
    assert client.get("/api/site").status_code == 200  # the cookie


@pytest.mark.parametrize(
    "path", ["/%2e%2e/serve.py", "/..%2fserve.py", "/%2fetc%2fpasswd", "/serve.py", "/x/y", "/a%00b"]
)
def test_no_path_reaches_the_file_system(client, path):
    assert client.get(path).status_code == 404


def test_every_reply_carries_the_policy(client):
    for path in ("/", "/main.js", "/api/site", "/nothing"):
        policy = client.get(path).headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "*" not in policy


def test_what_is_not_indexed_is_refused(site, tmp_path):
    place = Place.of(site.config_path, None)
    sae = shutil.copytree(site.saes[0], tmp_path / "sae", ignore=shutil.ignore_patterns("features"))
    with pytest.raises(ConfigError, match="no finished index"):
        open_desk([str(sae)], None, place, 1)
    with pytest.raises(NoSae, match=r"holds no SAE: .* got a dataset"):
        open_desk([site.root], None, place, 1)


def test_an_sae_that_is_not_the_one_that_was_indexed_is_refused(site):
    table = FeatureTable.open(f"{site.saes[0]}/features")
    exhibit = Exhibit("sae-1", site.saes[1], table)
    with pytest.raises(SaeMismatch, match=r"the weights of sae-1: .* \(the index's\).*Index it again"):
        exhibit.sae()


def test_a_dataset_that_was_not_indexed_is_not_shown(site, tmp_path, caplog):
    _, other = make_dataset(tmp_path, units=4)
    desk = open_desk(list(site.saes), None, Place.of(site.config_path, other.root), seats=1)
    assert desk.dataset is None
    assert f"the plan of the dataset at {other.root}: expected" in caplog.text
    assert "(the index's)" in caplog.text


def test_a_subject_of_other_weights_and_saes_of_two_subjects_are_refused(site, desk, tmp_path):
    meta = desk.exhibits[0].table.meta
    planned = meta.subject.model_copy(update={"weights_sha256": "0" * 64})
    with pytest.raises(SaeMismatch, match=r"the weights of subject .* \(the dataset's\), got"):
        LazySubject(site.config.subject, planned).whole()
    copy = shutil.copytree(f"{site.saes[1]}/features", tmp_path / "features")
    other = FeatureTable.open(str(copy)).meta.model_copy(update={"subject": planned})
    (copy / INDEX_KEY).write_bytes(other.to_json())
    with pytest.raises(SaeMismatch, match=rf"the subject of {site.saes[1]}: .* \({site.saes[0]}'s\), got"):
        open_desk(
            list(site.saes), [f"{site.saes[0]}/features", str(copy)], Place.of(site.config_path, None), 1
        )


# ---- fuzz ----------------------------------------------------------------------------------------


def test_no_request_makes_the_server_fail(app, caplog):
    caplog.set_level(logging.CRITICAL, "winnow.explorer")  # what it logs of every refused request
    headers = {"Host": "127.0.0.1"}
    described = schemathesis.openapi.from_asgi("/api/openapi.json", app, headers=headers)
    operations = [each.ok() for each in described.get_all_operations()]
    assert len(operations) == 19
    for operation in operations:
        assert fuzzed(operation, headers) >= 1


def fuzzed(operation, headers: dict[str, str]) -> int:
    """How many requests were tried."""
    seen: list[int] = []

    @settings(max_examples=15, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def fuzz(case):
        reply = case.call(headers=headers)
        seen.append(reply.status_code)
        assert reply.status_code < 500 or reply.status_code == 503, case.as_curl_command()

    fuzz()
    return len(seen)
