"""`subject.engine`: rows of interp-engine's eager backend, and the comparison that its units must pass."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.pipeline import make_alone, pipeline_config
from tests.support.tiny import make_subject
from winnow.common.config_file import load_config
from winnow.harvester.plan.planner import find_plan
from winnow.harvester.run.driver import ensure_plan
from winnow.harvester.run.engine_check import EngineCheck
from winnow.harvester.run.worker import UnitWorker
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError, DependencyMissing, PlanMismatch
from winnow.store.objects import open_store
from winnow.store.records.commit import load_receipt
from winnow.subject import Subject, engine
from winnow.subject.engine import EngineReader, deviation

HERE = "subject.engine=interp-engine"
TOKENS = torch.arange(1, 37).view(3, 12)


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    if "absent" not in request.node.name:
        pytest.importorskip("interp_engine")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_config(tmp_path_factory.mktemp("base"), units=3)


def planned(base: Path, root: Path, *settings: str) -> Config:
    config = load_config(base, [f"root={root}", HERE, *settings])
    ensure_plan(config, open_store(config.root))
    return config


def worker_of(config: Config) -> UnitWorker:
    assert config.subject is not None
    plan = find_plan(config, open_store(config.root))
    assert plan is not None
    return UnitWorker(plan.to_json(), config.root, config.storage, config.subject, 1, 16)


# Norms before, after and on both sides of the sublayers; attention and MLP in parallel after one norm.
@pytest.mark.parametrize("architecture", ["llama", "olmo2", "gemma2", "phi"])
def test_every_site_that_the_engine_serves_has_the_rows_of_transformers(
    architecture: str, tmp_path: Path
) -> None:
    make_subject(tmp_path, architecture)
    subject = Subject.load({"model": str(tmp_path), "device": "cpu"})
    hooks = [f"{site}.2" for site in engine._POINTS if (architecture, site) != ("phi", "resid_mid")]
    found = EngineReader(subject, "interp-engine", hooks).activations(TOKENS, hooks)
    right = subject.activations(TOKENS, hooks)
    assert {hook: deviation(found[hook], right[hook]).relative < 1e-6 for hook in hooks} == dict.fromkeys(
        hooks, True
    )
    if architecture == "phi":
        with pytest.raises(ConfigError, match=r"'resid_mid.2' is not served .* which calls it resid_mid.2"):
            EngineReader(subject, "interp-engine", ["resid_mid.2"])


def test_a_harvest_names_its_engine_and_compares_every_nth_unit(base: Path, tmp_path: Path) -> None:
    ours, theirs = load_config(base, [f"root={tmp_path / 'ours'}"]), tmp_path / "theirs"
    config = planned(base, theirs, "subject.engine_check_every=2")
    (right, _), (plan, _) = make_alone(ours), make_alone(config)
    assert plan.subject.engine == "interp-engine"
    assert plan.fingerprint != right.fingerprint
    assert "engine" not in right.subject.model_dump(mode="json"), "older plans keep their fingerprints"
    store = open_store(config.root)
    attempts = [load_receipt(store, plan, unit).attempt for unit in range(plan.units)]
    compared = [attempt.engine_difference for attempt in attempts]
    assert [one is not None for one in compared] == [True, False, True, False]
    assert all(one is None or one < 1e-6 for one in compared)
    # Each plan has its own order of rows inside a unit.
    mine, other = (worker_of(one).make(0)[0] for one in (ours, config))
    for hook in plan.spec.hooks:
        assert sorted(map(bytes, mine[hook])) == sorted(map(bytes, other[hook]))
    # the same root with the other engine: two kinds of rows in one dataset
    asked = load_config(base, [f"root={theirs}"])
    with pytest.raises(
        PlanMismatch, match=r"subject.engine: stored .*interp-engine.*, asked for .*transform"
    ):
        find_plan(asked, open_store(asked.root))


def test_a_point_that_is_one_norm_too_early_ends_the_harvest_before_a_unit_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "subject").mkdir()
    make_subject(tmp_path / "subject", "gemma2", layers=2, width=16)
    base = pipeline_config(tmp_path, units=2, plan={"hooks": ["resid_post.0", "attn_out.1"]})
    config = planned(base, tmp_path / "data")
    monkeypatch.setitem(engine._POINTS, "attn_out", "attn_out")
    at_work = worker_of(config)
    before = list(open_store(config.root).list())
    # the second unit too: after a difference nothing is taken on trust
    for unit in (0, 1):
        words = (
            rf"unit {unit}, hook attn_out.1: interp-engine gives other.* at most 0.0001 .*got [\d.]+, the l"
        )
        with pytest.raises(ConfigError, match=words):
            at_work.run(unit)
    assert list(open_store(config.root).list()) == before
    loose = load_config(base, [f"root={config.root}", HERE, "subject.engine_tolerance=100"])
    worker_of(loose).run(0)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("plan.hooks=[model.layers.1.mlp]", "'model.layers.1.mlp' is not served by subject.engine"),
        ("plan.hooks=[router.1]", "'router.1' is not served by subject.engine"),
        ("plan.attend=document", "takes no positions, so documents"),
    ],
)
def test_what_no_engine_serves_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path, setting: str, words: str
) -> None:
    config = load_config(base, [f"root={tmp_path / 'data'}", HERE, setting])
    with pytest.raises(ConfigError, match=words):
        ensure_plan(config, open_store(config.root))
    assert not list(open_store(config.root).list())


def test_an_absent_engine_is_named_with_the_command_that_installs_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = planned(base, tmp_path / "data")
    monkeypatch.setitem(sys.modules, "interp_engine", None)
    with pytest.raises(DependencyMissing, match=r"pip install 'winnow-sae\[engine\]'"):
        worker_of(config).ready()


def test_the_vllm_backend_needs_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import interp_engine

    make_subject(tmp_path)
    subject = Subject.load({"model": str(tmp_path), "device": "cpu"})
    monkeypatch.setattr(interp_engine, "vllm_installed", lambda: False)
    with pytest.raises(DependencyMissing, match=r"needs vLLM: got not installed.*interp-engine\[vllm\]"):
        EngineReader(subject, "interp-engine-vllm", ["resid_post.0"])
    monkeypatch.setattr(interp_engine, "vllm_installed", lambda: True)
    with pytest.raises(ConfigError, match=r"expected a GPU, got subject\.device cpu"):
        EngineReader(subject, "interp-engine-vllm", ["resid_post.0"])


def test_the_farthest_row_is_named_with_its_place_if_the_engine_is_absent() -> None:
    reference = torch.ones(2, 3, 4)
    reference[0, 0] = 0.0
    rows = reference.clone()
    assert deviation(rows, reference).relative == 0.0
    rows[1, 2, 3] += 1.0
    assert deviation(rows, reference) == (0.5, 1.0, 1, 2, 0.0)
    rows[0, 1, 0] = torch.nan
    assert deviation(rows, reference)[:3:2] == (float("inf"), 0)
    # NaN of the subject itself is no difference: the harvest has an error of its own for it
    assert deviation(rows, rows).relative == 0.0
    assert deviation(rows, rows.bfloat16()).relative == 0.0


def test_in_16_bits_single_rows_may_be_rounded_far_and_half_of_them_may_not_if_the_engine_is_absent(
    tmp_path: Path,
) -> None:
    make_subject(tmp_path)
    subject = Subject.load({"model": str(tmp_path), "device": "cpu", "dtype": "bfloat16"})
    spec = subject.spec.model_copy(update={"engine": "interp-engine-vllm"})
    tokens, hook = TOKENS.numpy().astype(np.uint32), "resid_post.1"
    right = subject.activations(TOKENS, [hook])[hook].float()
    check = EngineCheck(subject, spec, 1)
    check.begin()
    rounded = right.clone()
    rounded[:, ::4] *= 1.2
    check.compare(0, 0, tokens, {hook: rounded})
    assert check.farthest == pytest.approx(0.2, rel=0.01)
    # As of a stream without what one of many layers adds: no row is far from its own, and none is right.
    with pytest.raises(
        ConfigError, match=r"at most 0.25 .*, and 0.05 half of the rows, got 0.1, .*, and 0.1"
    ):
        check.compare(0, 0, tokens, {hook: right * 1.1})
