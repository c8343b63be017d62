"""The explorer's benchmarks at tiny size."""

from __future__ import annotations

import pytest

from benchmarks import explorer, steering
from tests.support.explorer_site import Site, make_site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


def test_costs_are_measured(site):
    found = explorer.measure(site.root, site.saes[0], latents=96, k=4, units=2, requests=5)
    assert found["windows"] == 128
    assert 0 < found["page_median_ms"] <= found["page_p95_ms"]
    assert 0 < found["index_over_encode"] < found["index_over_forward_encode"]
    assert found["index_96"]["index_bytes"] > 0


def test_steering_is_measured_and_zero_changes_nothing(site):
    figures = steering.measure(site.saes[0], site.root, None, windows=4, multiple=4.0, count=3, seed=0)
    assert figures["windows"] == 4
    assert figures["zero_is_identical"] is True
    each = figures["raise_nats"]
    assert each["low"] <= each["mean"] <= each["high"]
    assert each["mean"] != 0
    page = steering.page(figures | {"date": "today", "versions": {"winnow": "0"}})
    assert f"Latent {figures['latent']} of `sae-0`" in page
    assert "bit-identical" in page
