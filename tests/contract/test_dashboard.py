"""The Grafana dashboard asks for metrics that there are, and docs/monitoring.md lists all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from winnow.harvester.run.ledger import RunLedger
from winnow.harvester.run.metrics import HarvestMetrics
from winnow.harvester.run.part import Part
from winnow.jobs.prometheus import ServiceMetrics
from winnow.jobs.service import Service
from winnow.schemas.service import RunStatus
from winnow.store.objects import open_store
from winnow.store.testing import make_plan
from winnow.trainer.run.metrics import RunMetrics

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "configs" / "monitoring"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, set[str]]:
    """Every sample's name, as Prometheus reads it, and its labels."""
    store = open_store(str(tmp_path_factory.mktemp("metrics")))
    harvest, runs = HarvestMetrics(), RunMetrics()
    harvest.show(RunLedger(store, make_plan(2)), store.uri, Part(0, 2), units=1, before=0)
    status = RunStatus(
        state="training", step=1, steps=2, tokens=3, latents=4, k=1, hook="resid_post.1", fvu=0.5,
        eta_seconds=6, cost=7, currency="USD", device="cpu", host="a", pid=1, beat=8.0,
    )  # fmt: skip
    runs.status("runs/a", status)
    figures = ("loss", "l0", "dead_share", "grad_norm", "lr", "bytes_read_per_s")
    runs.record("runs/a", dict.fromkeys(figures, 1.0))
    registry = CollectorRegistry()
    for collector in (harvest, runs, ServiceMetrics(Service(store, ["cpu0"], {}))):
        registry.register(collector)
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads((MONITORING / "grafana.json").read_text())


def queries(dashboard: dict[str, Any]) -> list[str]:
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert all(panel["targets"] and panel["title"] and panel["description"] for panel in panels)
    return [target["expr"] for panel in panels for target in panel["targets"]]


def selectors(node: Any) -> list[promql_parser.VectorSelector]:
    """Every series that an expression reads."""
    if isinstance(node, promql_parser.VectorSelector):
        return [node]
    if isinstance(node, promql_parser.MatrixSelector):
        return [node.vector_selector]
    below = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "param")]
    below += getattr(node, "args", [])
    return [found for child in below if child is not None for found in selectors(child)]


def test_every_query_parses_and_reads_exported_metrics_by_labels_they_have(dashboard, exported):
    asked = set()
    for query in queries(dashboard):
        plain = query.replace("$__rate_interval", "5m").replace("$__range", "6h")
        read = selectors(promql_parser.parse(plain))
        assert read, query
        for selector in read:
            assert selector.name in exported, query
            asked.add(selector.name)
            for matcher in selector.matchers.matchers:
                assert matcher.name in exported[selector.name], query
        for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
            for label in labels.split(", "):
                assert all(label in exported[selector.name] for selector in read), query
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
            assert label in exported[name]
    assert len(asked) >= 20


def test_counters_are_rated_and_gauges_are_not(dashboard):
    for query in queries(dashboard):
        for name in re.findall(r"winnow_\w+", query):
            rated = re.search(rf"(rate|increase)\({name}\b", query) is not None
            assert rated == name.endswith("_total"), query


def test_grafana_s_own_model_reads_the_whole_dashboard(dashboard):
    register_default_plugins()
    model = Dashboard.from_json(dashboard)
    back = json.loads(JSONEncoder().encode(model))
    # Each of our fields is one that the model knows: what it does not know, it drops.
    assert lost(dashboard, back) == []
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)


def lost(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Paths of what is in `ours` and not, or differently, in `theirs`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            where
            for key, value in ours.items()
            for where in (lost(value, theirs[key], f"{path}/{key}") if key in theirs else [f"{path}/{key}"])
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [where for index, pair in pairs for where in lost(*pair, f"{path}/{index}")]
    return [] if ours == theirs else [path]


def test_the_page_lists_every_metric_and_no_other(exported):
    page = (ROOT / "docs" / "monitoring.md").read_text()
    listed = set(re.findall(r"^\| `(winnow_\w+)`", page, re.MULTILINE))
    assert listed == set(exported)


def test_the_page_s_alerts_parse_and_survive_the_end_of_a_process(exported):
    page = (ROOT / "docs" / "monitoring.md").read_text()
    lines = page.split("## Questions worth an alert")[1].split("```")[1].strip().splitlines()
    for line in lines:
        for selector in selectors(promql_parser.parse(line.split("#")[0])):
            assert selector.name in exported, line
            assert {matcher.name for matcher in selector.matchers.matchers} <= exported[selector.name], line
    # A killed process ends its series: what asks for its silence must look back.
    assert "last_over_time(winnow_run_beat_timestamp_seconds[" in lines[0]


def test_prometheus_config_is_what_the_page_says():
    jobs = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    assert [job["job_name"] for job in jobs] == ["winnow", "winnow-jobs"]
