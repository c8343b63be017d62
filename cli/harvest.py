"""`winnow plan` and `winnow harvest`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from winnow.cli.console import (
    LOOPBACK,
    MetricsHost,
    MetricsPort,
    emit,
    guard,
    print_table,
    serving_metrics_if,
)
from winnow.common.figures import count_of, human_bytes
from winnow.common.reporter import say
from winnow.common.signals import interrupted_by_signals

if TYPE_CHECKING:
    from winnow.schemas.config import Config
    from winnow.schemas.harvest import HarvestManifest, HarvestPlan
    from winnow.store.objects import ObjectStore

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml.")
]
Sets = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a field: `--set plan.train_units=4`; repeatable, the last of a field wins.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the harvester's commands to `app`."""
    app.command("plan")(plan_command)
    app.command("harvest")(harvest_command)


def plan_command(config: ConfigPath, set: Sets = [], json: AsJson = False) -> None:  # noqa: B006
    """Read the corpus, tokenise and shuffle it into windows, and write the dataset's plan.

    Streams the corpus: memory stays flat however large it is. Run again, it finds the plan and does nothing,
    or completes what an interrupted run left out. `winnow harvest` plans by itself. Relative paths in a
    config are relative to the working directory, not to the config's folder.

    Example: `winnow plan configs/quickstart.yaml --set root=s3://bucket/data`
    """
    with guard(), interrupted_by_signals():
        from winnow.common.config_file import load_config
        from winnow.store.objects import open_store

        cfg = load_config(config, set)
        # After the config is read: a mistake in it is told at once.
        from winnow.harvester.run.driver import ensure_plan

        store = open_store(cfg.root, cfg.storage)
        plan = ensure_plan(cfg, store)
        emit(_plan_facts(plan, store), json, lambda: _show_plan(plan, store))


def harvest_command(
    config: ConfigPath,
    set: Sets = [],  # noqa: B006
    json: AsJson = False,
    forecast: Annotated[
        bool,
        typer.Option("--forecast", help="Print the remaining work and its cost, then exit; writes nothing."),
    ] = False,
    accept_quarantined: Annotated[
        bool,
        typer.Option(
            "--accept-quarantined",
            help="Try the remaining units once more, and commit those that fail again as void: their rows "
            "keep their places with weight 0.",
        ),
    ] = False,
    single_writer: Annotated[
        bool,
        typer.Option(
            "--single-writer",
            help="For a store without if-none-match that nothing else writes to: harvest the units in this "
            "process, one after another (sets storage.single_writer).",
        ),
    ] = False,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="First recompute what is missing, incomplete or corrupted, from corpus and subject. "
            "Nothing else may write to the root meanwhile.",
        ),
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(
            "--part",
            metavar="I/N",
            help="Harvest every N-th unit from unit I only (I from 0), as one job of an array; needs a plan. "
            "The part that finishes last seals the dataset.",
        ),
    ] = None,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = LOOPBACK,
) -> None:
    """Run the subject model over the planned windows and store its activations.

    Plans first if there is no plan. May be interrupted or killed at any time: the same command resumes, and
    units that have a receipt are never run again. Refuses a root that holds another plan. At SIGTERM or
    SIGUSR1 it commits the units that have begun and exits with 130. Relative paths in a config are relative
    to the working directory, not to the config's folder.

    Example: `winnow harvest configs/quickstart.yaml --set harvest.actors=2`
    """
    # At INFO Ray prints its start and its dashboard's address between our lines.
    logging.getLogger("ray").setLevel(logging.WARNING)
    with guard(), interrupted_by_signals():
        from winnow.common.config_file import load_config
        from winnow.store.objects import open_store

        # Last, so that the option wins over a --set.
        cfg = load_config(config, [*set, "storage.single_writer=true"] if single_writer else set)
        store = open_store(cfg.root, cfg.storage)
        # First: a forecast writes nothing, not even a plan, and repairs nothing.
        if forecast:
            _forecast(cfg, store, json)
            return
        with serving_metrics_if(metrics_port, metrics_host):
            # Before the plan is ensured: a repair needs the stored plan and must not make one.
            if repair:
                _repair(cfg, store)
            _harvest(cfg, store, accept_quarantined, part, json)


def _forecast(config: Config, store: ObjectStore, json: bool) -> None:
    from winnow.harvester.plan.parent import Parent
    from winnow.harvester.plan.planner import find_plan
    from winnow.harvester.run import forecast as forecasts

    plan = find_plan(config, store)
    if plan is None:
        config = Parent.written_out(config)
    # Measuring runs the subject: it is called only if the ledger has no rate.
    found = forecasts.forecast(config, store, plan, measure=lambda: forecasts.measure_rate(config))
    title = f"harvest of {store.uri}"
    emit(found.model_dump(mode="json"), json, lambda: print_table(title, forecasts.table_rows(found)))


def _harvest(
    config: Config, store: ObjectStore, accept_quarantined: bool, part: str | None, json: bool
) -> None:
    from winnow.harvester.run import start
    from winnow.harvester.run.part import Part

    if part is None:
        dataset = start.harvest(config, accept_quarantined=accept_quarantined)
        facts = _harvest_facts(dataset.manifest, dataset.plan, store)
    else:
        own = Part.parse(part)
        _require_plan(config, store)
        plan, manifest = start.harvest_part(config, own, accept_quarantined=accept_quarantined)
        if manifest is None:
            _show_part(part, store, plan, json)
            return
        facts = _harvest_facts(manifest, plan, store)
    emit(facts, json, lambda: _show_harvest(facts))


def _require_plan(config: Config, store: ObjectStore) -> None:
    # Otherwise every job of an array would tokenise the whole corpus.
    from winnow.harvester.plan.planner import find_plan
    from winnow.schemas.errors import ConfigError

    if find_plan(config, store) is None:
        raise ConfigError(
            f"{store.uri} has no complete plan, which --part needs",
            expected="a plan that all parts share",
            fix="Run `winnow plan` with the same config first",
        )


def _show_part(part: str, store: ObjectStore, plan: HarvestPlan, json: bool) -> None:
    from winnow.store.read.reader import receipts_present

    left = plan.units - len(receipts_present(store, plan))
    facts = {"root": store.uri, "part": part, "units": plan.units, "units_to_do": left}
    told = (
        f"part {part} is complete; of {count_of(plan.units, 'unit')} {left:,} to do, and the last part seals"
    )
    emit(facts, json, lambda: say(told))


def _repair(config: Config, store: ObjectStore) -> None:
    from winnow.harvester.plan.planner import refuse_other
    from winnow.harvester.run.mend import mend
    from winnow.store.read.reader import load_plan

    plan = load_plan(store)
    # Tokens and rows are recomputed from this config: with another plan none would be the stored ones.
    refuse_other(plan, config, store)
    report = mend(config, store, plan)
    for key in report.restored:
        say(f"repair: {key} was written anew")
    for key in report.removed:
        say(f"repair: {key} was removed; the harvest runs its unit again")
    say(
        f"repair: {count_of(len(report.restored), 'object')} written, "
        f"{count_of(len(report.revised), 'unit')} with a new receipt, "
        + ("a new manifest" if report.manifest else "the manifest is unchanged")
    )


def _plan_facts(plan: HarvestPlan, store: ObjectStore) -> dict[str, Any]:
    facts = plan.corpus_facts
    return {
        "root": store.uri,
        "fingerprint": plan.fingerprint,
        "documents": facts.documents,
        "corpus_tokens": facts.tokens,
        "units": plan.units,
        "validation_units": plan.spec.validation_units,
        "rows": plan.rows,
        "windows": plan.windows,
        "windows_unused": facts.windows_unused,
        "bos_token": plan.bos_token,
        "attend": plan.spec.attend,
        "join": plan.spec.join,
        "join_token": plan.join_token,
        "duplicates_dropped": facts.duplicates_dropped,
        "bad_records": facts.bad_records,
        "bad_first": facts.bad_first,
        # Before compression, whose gain only the receipts will tell.
        "bytes": sum(plan.shard_bytes(site.name) for site in plan.sites) * plan.units,
    }


def _show_plan(plan: HarvestPlan, store: ObjectStore) -> None:
    from winnow.store.check.info import bad_records, hook_rows, label_rows, token_rows

    facts = _plan_facts(plan, store)
    print_table(
        f"plan {plan.fingerprint[:12]} at {store.uri}",
        [
            ("subject", plan.subject.model),
            *hook_rows({site.name: site.d_model for site in plan.sites}),
            ("documents", f"{facts['documents']:,} ({facts['duplicates_dropped']:,} duplicates dropped)"),
            *bad_records(facts["bad_records"], facts["bad_first"]),
            ("corpus", f"{facts['corpus_tokens']:,} tokens"),
            ("units", f"{plan.units} ({plan.spec.validation_units} held out)"),
            (
                "windows",
                f"{plan.windows:,} of {plan.spec.context_length} ({facts['windows_unused']:,} unused)",
            ),
            *token_rows(plan),
            *label_rows(plan.labels, [source.uri for source in plan.corpus.sources]),
            ("rows", f"{plan.rows:,}"),
            ("size when harvested", human_bytes(facts["bytes"])),
        ],
    )


def _harvest_facts(manifest: HarvestManifest, plan: HarvestPlan, store: ObjectStore) -> dict[str, Any]:
    from winnow.harvester.run.ledger import account, read_ledger

    # Rates come from the ledger, not from this process: units of earlier, interrupted runs count too.
    ledger = read_ledger(store)
    return {
        "root": store.uri,
        "dataset_sha256": manifest.dataset_sha256,
        "plan_fingerprint": manifest.plan_fingerprint,
        "units": manifest.units,
        "rows": manifest.rows,
        "bytes": manifest.bytes,
        "sinks": manifest.sinks,
        "void_units": list(manifest.void_units),
        "tokens": plan.windows * plan.spec.context_length,
        "tokens_per_s": ledger.tokens_per_second,
        "bytes_per_s": ledger.bytes_per_second,
        "storage_wait_s": ledger.storage_wait_seconds,
        "tokens_account": account(plan, manifest).model_dump(mode="json"),
    }


def _show_harvest(facts: dict[str, Any]) -> None:
    # A ledger may be lost or empty; then there is no rate, and a 0 would be false.
    rate, kept = facts["tokens_per_s"], facts["tokens_account"]
    print_table(
        f"dataset {facts['dataset_sha256'][:12]} at {facts['root']}",
        [
            ("units", facts["units"]),
            ("rows", f"{facts['rows']:,}"),
            ("size", human_bytes(facts["bytes"])),
            ("sinks (weight 0)", ", ".join(f"{hook}: {count}" for hook, count in facts["sinks"].items())),
            ("tokens not stored", f"{kept['beyond_plan'] + kept['tails'] + kept['leading']:,}"),
            ("  beyond the plan", f"{kept['beyond_plan']:,}"),
            ("  tails, in no window", f"{kept['tails']:,}"),
            ("  leading positions", f"{kept['leading']:,}"),
            ("harvest", f"{rate:,.0f} tokens/s" if rate else "-"),
            ("written", f"{human_bytes(facts['bytes_per_s'])}/s" if facts["bytes_per_s"] else "-"),
            ("LM waited for storage", f"{facts['storage_wait_s']:,.1f} s"),
        ],
    )
