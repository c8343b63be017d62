"""`winnow harvest --forecast` against what a harvest then does, and the ledger it leaves."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from tests.support.pipeline import pipeline_config
from winnow.cli.main import app
from winnow.common.config_file import load_config
from winnow.harvester.run import forecast as forecasts
from winnow.harvester.run import ledger as ledgers
from winnow.harvester.run.driver import ensure_plan
from winnow.harvester.run.forecast import forecast, table_rows
from winnow.harvester.run.ledger import RunLedger, UnitFacts, read_ledger, settle_account
from winnow.harvester.run.waiting import StorageWait
from winnow.harvester.run.worker import UnitWorker
from winnow.schemas.config import Config, PricesSpec
from winnow.schemas.errors import ConfigError
from winnow.store.format import order
from winnow.store.format.order import LaneOrder
from winnow.store.objects import open_store
from winnow.store.objects.local import LocalStore
from winnow.store.read.stream import memory_bytes
from winnow.store.testing import make_plan
from winnow.store.write.writer import seal

PUTS = ("put_new", "put", "delete")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(forecasts, "MEASURE_SECONDS", 0.0)


def test_a_forecast_from_the_config_alone_is_what_the_harvest_takes(tmp_path, monkeypatch):
    path = pipeline_config(
        tmp_path, prices={"gib_month": 0.02, "puts_1000": 5, "gets_1000": 1, "actor_hour": 3}
    )
    result = CliRunner().invoke(app, ["harvest", str(path), "--forecast", "--json"])
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    config = load_config(path)
    root = tmp_path / "data"
    assert not [item for item in root.rglob("*") if item.is_file()], "a forecast writes nothing"

    counts: Counter[str] = Counter()
    for name in PUTS:
        real = getattr(LocalStore, name)

        def counted(self, *arguments, _name=name, _real=real):
            counts[_name] += 1
            return _real(self, *arguments)

        monkeypatch.setattr(LocalStore, name, counted)
    store = open_store(config.root)
    plan = ensure_plan(config, store)
    store.probe()
    worker = UnitWorker(plan.to_json(), config.root, config.storage, config.subject, 1, 16)
    with RunLedger(store, plan) as run:
        run.start()
        for unit in range(plan.units):
            run.add(worker.run(unit))
    settle_account(store, plan, seal(store, plan))

    assert sum(counts.values()) == said["requests"]["puts"]
    stored = list(store.list())
    assert len(stored) == said["objects"]
    assert sum(size for _, size in stored) == pytest.approx(said["bytes"], rel=0.05)
    assert said["bytes_to_do"] == sum(run.bytes for run in read_ledger(store).runs)
    assert said["tokens_to_do"] == plan.windows * plan.spec.context_length
    assert said["rate_from"] == "measured"
    money = said["money"]
    assert money["actors"] == pytest.approx(3 * said["hours"])
    assert money["total"] == pytest.approx(money["storage"] + money["requests"] + money["actors"])
    done = forecast(config, store, plan)
    assert (done.units_to_do, done.bytes_to_do, done.rate_from) == (0, 0, "ledger")


def test_every_token_of_the_corpus_is_accounted_for(tmp_path):
    for number, plan_fields in enumerate(({}, {"drop_leading": 3}, {"drop_leading": 0})):
        path = pipeline_config(tmp_path / str(number), plan=plan_fields)
        config = load_config(path)
        plan = ensure_plan(config, open_store(config.root))
        found = ledgers.account(plan)
        assert (
            found.corpus + found.bos_added == found.beyond_plan + found.tails + found.leading + found.stored
        )
        assert found.stored == plan.rows
        assert found.beyond_plan > 0


def test_no_prices_no_money_and_no_units_no_forecast(tmp_path):
    path = pipeline_config(tmp_path)
    result = CliRunner().invoke(app, ["harvest", str(path), "--forecast"])
    assert result.exit_code == 0, result.stderr
    assert "tokens/s" in result.stdout
    assert "USD" not in result.stdout
    result = CliRunner().invoke(app, ["harvest", str(path), "--forecast", "--set", "plan.train_units=null"])
    assert result.exit_code == 2
    assert "winnow plan" in " ".join(result.stderr.split())
    config = load_config(path)
    with pytest.raises(ConfigError, match="train_units"):
        forecast(config, open_store(config.root), None)
    priced = config.model_copy(update={"prices": PricesSpec(gib_month=1)})
    plan = ensure_plan(config, open_store(config.root))
    found = forecast(priced, open_store(config.root), plan)
    assert found.hours is None
    assert found.money is not None
    assert found.money.actors is None


def test_a_killed_run_leaves_its_entry_and_the_next_run_keeps_it(tmp_path, monkeypatch):
    config = load_config(pipeline_config(tmp_path))
    store = open_store(config.root)
    plan = ensure_plan(config, store)
    monkeypatch.setattr(ledgers, "WRITE_SECONDS", 0.0)
    killed, other = RunLedger(store, plan), RunLedger(store, plan)
    killed.start()
    killed.add(UnitFacts(0, 1000, 2.0, 0.5))
    with other:
        other.start()
        other.add(UnitFacts(1, 1000, 1.0, 0.25))
    entries = {run.ended: run for run in read_ledger(store).runs}
    assert entries[False].units == 1
    assert entries[False].bytes == 1000
    assert read_ledger(store).storage_wait_seconds == 0.75


def test_the_memory_of_sixty_hooks_is_stated(tmp_path, monkeypatch):
    """That of an actor, and that of a stream over all of them, as the stream itself counts it."""
    monkeypatch.setattr(order, "LARGEST_DESIGN_EFFECT", float("inf"))
    hooks = {f"{site}.{layer}": 64 for layer in range(30) for site in ("mlp_in", "mlp_out")}
    plan = make_plan(units=40, windows_per_unit=128, hooks=hooks, dtype="int8")
    config = Config.model_validate({"root": str(tmp_path), "harvest": {"batch_windows": 4}})
    found = forecast(config, open_store(config.root), plan)
    unit, batch = plan.rows_per_unit * 60 * 68, 4 * 9 * 60 * (4 * 64 + 2 * 68)
    assert found.actor_bytes == 2 * unit + batch
    lanes = LaneOrder.for_plan(plan, batch_rows=2048, seed=0)
    assert found.stream_bytes == memory_bytes(plan, lanes, list(hooks))
    assert 1 <= found.open_files <= 8
    said = dict(table_rows(found))
    assert said["a stream of all hooks"].endswith(f", {found.open_files} objects open")


def test_a_run_lasts_until_its_last_receipt(tmp_path, monkeypatch):
    config = load_config(pipeline_config(tmp_path))
    store = open_store(config.root)
    plan = ensure_plan(config, store)
    now = [100.0]
    monkeypatch.setattr(ledgers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with RunLedger(store, plan) as run:
        now[0] = 105.0  # the subject is loaded
        run.start()
        now[0] = 112.0
        run.add(UnitFacts(0, 1000, 2.0, 0.5))
        now[0] = 115.0  # Ray is shut down
    assert [run.seconds for run in read_ledger(store).runs] == [7.0]


def test_the_lm_waits_while_tokens_come_and_while_every_unit_is_being_stored():
    now = [0.0]
    wait = StorageWait(lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    with wait.tokens():
        passes(1)
    with wait.lm():
        passes(10)
    commit = wait.commit()
    commit.__enter__()
    with wait.lm():
        passes(5)  # the other unit's: nothing waits
    passes(3)  # nothing to do but storage: waited, once the LM goes on
    commit.__exit__(None, None, None)
    passes(7)  # neither: the driver has nothing to hand out
    with wait.lm():
        passes(2)
    with wait.commit():
        passes(100)  # after the last unit: no LM is delayed
    assert wait.take() == (17.0, 4.0)
    assert wait.take() == (0.0, 0.0)
