"""The text around an example across the windows of its document."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from starlette.testclient import TestClient

from tests.support.bos_subject import bos_config
from tests.support.explorer_site import Site, make_site
from winnow.explorer.place import Place
from winnow.explorer.site import context
from winnow.explorer.site.context import Contexts
from winnow.explorer.site.desk import Desk, open_desk
from winnow.explorer.site.serve import make_app
from winnow.schemas.errors import ConfigError
from winnow.store import ActivationStore


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def desk(site) -> Desk:
    return open_desk(list(site.saes), None, Place.of(site.config_path, None), seats=4)


@pytest.fixture(scope="module")
def client(desk) -> TestClient:
    return TestClient(make_app(desk), base_url="http://127.0.0.1:8517")


def documents_of(dataset: ActivationStore, *, bos: bool = False) -> dict[int, dict[int, int]]:
    """Document -> offset -> token, from all windows."""
    found: dict[int, dict[int, int]] = {}
    for unit in range(dataset.plan.units):
        labels, tokens = dataset.unit_labels(unit), dataset.unit_tokens(unit)
        for window, at in np.ndindex(*tokens.shape):
            if not (bos and at == 0):
                document, offset = (int(labels[name][window, at]) for name in ("document", "offset"))
                found.setdefault(document, {})[offset] = int(tokens[window, at])
    return found


def check_around(
    dataset: ActivationStore, window: int, position: int, reach: int, *, bos: bool = False
) -> int:
    """Compare with brute force; returns how many windows the text spans at least."""
    contexts = Contexts(lambda: dataset)
    found = contexts.around(dataset.plan.fingerprint, window, position, reach, reach)
    unit, within = divmod(window, dataset.plan.spec.windows_per_unit)
    labels = dataset.unit_labels(unit)
    document, offset = (int(labels[name][within, position]) for name in ("document", "offset"))
    whole = documents_of(dataset, bos=bos)[document]
    first = last = offset
    while first - 1 in whole and offset - first < reach:
        first -= 1
    while last + 1 in whole and last - offset < reach:
        last += 1
    assert found.ids == [whole[at] for at in range(first, last + 1)]
    assert found.at == offset - first
    assert found.begins == (first == 0)
    assert (found.before, found.after) == (first - 1 in whole, last + 1 in whole)
    assert found.document
    return -(-len(found.ids) // dataset.plan.spec.context_length)


@pytest.mark.parametrize("reach", [3, 40, 2000])
def test_the_text_around_an_example_is_that_of_its_document(site, desk, reach):
    dataset = ActivationStore.open(site.root)
    examples = desk.exhibits[0].table.latent(7)["examples"][:3]
    spans = [check_around(dataset, each["window"], each["position"], reach) for each in examples]
    if reach > 3:
        assert max(spans) > 1


def test_bos_of_a_window_is_no_token_of_the_document(tmp_path):
    dataset = ActivationStore.open(bos_config(tmp_path).root)
    assert check_around(dataset, 3, 5, 60, bos=True) > 1
    # BOS itself stands for the token after it.
    contexts = Contexts(lambda: dataset)
    here, after = (contexts.around(dataset.plan.fingerprint, 3, at, 5, 5) for at in (0, 1))
    assert here == after


def test_the_route_answers_with_texts_and_refuses_what_is_not_there(client, desk):
    one = desk.exhibits[0].table.latent(7)["examples"][0]
    where = {"window": one["window"], "position": one["position"]}
    reply = client.get("/api/saes/0/context", params=where | {"before": 2, "after": 500}).json()
    assert reply["at"] <= 2
    assert (
        reply["tokens"][reply["at"]]
        == desk.exhibits[0].words([one["tokens"][one["position"] - one["first"]]])[0]
    )
    for wrong in ({"window": 10**6}, {"position": 17}):
        refused = client.get("/api/saes/0/context", params=where | wrong)
        assert refused.status_code == 400
        assert "a window below" in refused.json()["error"]
    assert client.get("/api/saes/0/context", params=where | {"before": 10**6}).status_code == 422
    with pytest.raises(ConfigError, match="the dataset that was indexed"):
        desk.contexts.around("0" * 64, 0, 0, 1, 1)


def test_of_a_dataset_that_is_too_large_to_search_there_is_the_window(site, monkeypatch):
    monkeypatch.setattr(context, "_SEARCHED_TOKENS", 1)
    dataset = ActivationStore.open(site.root)
    contexts = Contexts(cache(lambda: dataset))
    found = contexts.around(dataset.plan.fingerprint, 3, 5, 2, 2000)
    assert found.ids == dataset.tokens(3).tolist()[3:]
    assert (found.at, found.begins, found.before, found.after) == (2, False, True, False)
    assert not found.document
