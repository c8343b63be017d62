"""`winnow info` and `winnow verify`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from winnow.cli.console import emit, guard, print_table, stdout
from winnow.common.figures import count_of, human_bytes
from winnow.common.reporter import Progress, say

if TYPE_CHECKING:
    from winnow.store.check.info import DatasetInfo
    from winnow.store.check.verify import Problem
    from winnow.store.objects import ObjectStore


def register(app: typer.Typer) -> None:
    """Add the store's commands to `app`."""
    app.command("info")(info_command)
    app.command("verify")(verify_command)


# A copy: typer needs the choices when the command is defined, and the module of the originals imports numpy.
class LevelChoice(Enum):
    """The levels of `winnow.store.check.verify`, for typer."""

    LIST = "list"
    SIZE = "size"
    INDEX = "index"
    FULL = "full"


Uri = Annotated[
    str,
    typer.Argument(metavar="ROOT", help="The dataset's root: a local path, file:// or s3://bucket/prefix."),
]
Place = Annotated[
    str, typer.Argument(metavar="ROOT", help="A dataset's root, or the folder or URI of an SAE or set.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
AllowHttp = Annotated[
    bool, typer.Option("--allow-http", help="Permit an http:// endpoint beyond this machine's loopback.")
]
Timeout = Annotated[float, typer.Option(help="Time limit of one request, in seconds.", min=0.1)]


def info_command(
    uri: Place, json: Json = False, allow_http: AllowHttp = False, timeout_seconds: Timeout = 60.0
) -> None:
    """Describe a dataset and its progress, an SAE or a set. Digests in full: --json.

    Example: winnow info data/quickstart
    """
    with guard():
        from winnow.schemas.sets import CARD_KEY, SET_KEY
        from winnow.store.check.info import dataset_info

        store = _open(uri, allow_http, timeout_seconds)
        if store.size(SET_KEY) is not None:
            from winnow.cli.sets import describe_set, show_set

            value = describe_set(store)
            emit(value, json, lambda: show_set(store.uri, value))
            return
        if store.size(CARD_KEY) is not None:
            from winnow.cli.sets import describe_sae, show_sae

            value = describe_sae(store)
            emit(value, json, lambda: show_sae(store.uri, value))
            return
        found = dataset_info(store)
        emit(found.model_dump(mode="json"), json, lambda: _show_info(found))


def verify_command(
    uri: Uri,
    level: Annotated[
        LevelChoice,
        typer.Option(
            help="list: every object exists. size: and has its length. index: and every shard's index is "
            "valid. full: and every byte is the committed one."
        ),
    ] = LevelChoice.LIST,
    json: Json = False,
    allow_http: AllowHttp = False,
    timeout_seconds: Timeout = 60.0,
    threads: Annotated[int, typer.Option(help="Number of shards read at a time.", min=1)] = 4,
    repair_: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="First restore what the rest of the dataset determines: metadata, receipts, checksums, "
            "manifests. Nothing else may write meanwhile. Sets --level full. Lost rows and tokens need "
            "`winnow harvest CONFIG --repair`.",
        ),
    ] = False,
) -> None:
    """List what is missing, incomplete or corrupted; exit with 1 if anything is.

    If the dataset is not sealed yet, the committed part is checked. Without --repair nothing is changed.

    Example: winnow verify s3://bucket/run7 --level full
    """
    with guard():
        from winnow.schemas.errors import IntegrityError, UnsupportedVersion
        from winnow.store.check.info import dataset_info
        from winnow.store.check.repair import repair
        from winnow.store.check.verify import damage

        store = _open(uri, allow_http, timeout_seconds)
        # The whole dataset is read after a repair: only then is it known to be sound.
        if repair_:
            level = LevelChoice.FULL
            for key in repair(store).restored:
                say(f"repair: {key} was written anew")
        problems = _verify(store, level, threads)
        broken, facts = damage(problems), None
        try:
            facts = dataset_info(store)
        except (IntegrityError, UnsupportedVersion):
            # Without plan or manifest a dataset has no state to report; the problem itself says so.
            if not broken:
                raise
        value = {
            "uri": store.uri,
            "level": level.value,
            "ok": not broken,
            "state": facts.state if facts else None,
            "units": facts.units if facts else None,
            "units_committed": facts.units_committed if facts else None,
            "problems": [asdict(problem) for problem in broken],
            "strays": [problem.key for problem in problems if problem.stray],
        }
        emit(value, json, lambda: _show_problems(store.uri, level.value, problems, facts, repair_))
    # After the result is written: a program wants the JSON of a damaged dataset most of all.
    if broken:
        raise typer.Exit(1)


def _verify(store: ObjectStore, level: LevelChoice, threads: int) -> list[Problem]:
    from winnow.store.check.verify import verify

    with Progress(f"verify --level {level.value}", None, "shards") as bar:

        def report(done: int, total: int) -> None:
            # The number of shards is known only after plan and receipts are read.
            bar.total = total
            bar.update(done)

        return verify(store, level.value, report, threads)


def _open(uri: str, allow_http: bool, timeout_seconds: float) -> ObjectStore:
    from winnow.schemas.config import StorageSpec
    from winnow.store.objects import open_store

    return open_store(uri, StorageSpec(allow_http=allow_http, timeout_seconds=timeout_seconds))


def _show_info(found: DatasetInfo) -> None:
    from winnow.store.check.info import bad_records, derived_rows, hook_rows, label_rows, token_rows

    progress = f"{found.units_committed:,} of {count_of(found.units, 'unit')}"
    rows: list[tuple[str, object]] = [
        ("state", f"{found.state} ({progress})" if found.state != "sealed" else f"sealed ({progress})"),
        *derived_rows(found.derived),
        ("subject", found.subject),
        ("weights", f"{found.subject_weights_sha256[:16]}..."),
        ("corpus", ", ".join(found.corpus)),
        ("documents", f"{found.documents:,}"),
        *bad_records(found.bad_records, found.bad_first),
        ("corpus tokens", f"{found.corpus_tokens:,}"),
        *hook_rows(found.hooks),
        ("rows per hook", f"{found.rows:,}"),
        (
            "unit",
            f"{count_of(found.windows_per_unit, 'window')} of {found.context_length} tokens, "
            f"{found.rows_per_unit:,} rows",
        ),
        *token_rows(found),
        *label_rows(found.labels, found.corpus),
        ("validation units", found.validation_units),
        ("stored as", found.dtype),
        ("activations", f"{human_bytes(found.stored_bytes)} of {human_bytes(found.planned_bytes)}"),
        ("plan fingerprint", f"{found.plan_fingerprint[:16]}..."),
    ]
    # Known once the dataset is sealed.
    if found.sinks is not None:
        marked = ", ".join(f"{hook}: {count:,}" for hook, count in found.sinks.items())
        rows += [
            ("marked sinks", marked),
            ("void units", found.void_units),
            ("dataset sha256", f"{(found.dataset_sha256 or '')[:16]}..."),
        ]
    if found.revision:
        rows.append(("repairs", found.revision))
    print_table(found.uri, rows)


def _show_problems(
    uri: str, level: str, problems: list[Problem], facts: DatasetInfo | None, repaired: bool
) -> None:
    from winnow.store.check.verify import LEVELS, damage

    for problem in problems:
        stdout.print(str(problem), markup=False, soft_wrap=True)
    # Strays are printed but are no damage: no plan, receipt or manifest names them, so nothing reads them.
    broken = len(damage(problems))
    if facts and facts.state != "sealed":
        done, units = facts.units_committed, count_of(facts.units, "unit")
        say(f"{uri} is {facts.state}: {done:,} of {units} committed")
    deeper = LEVELS[-1] if level != LEVELS[-1] else None
    if broken:
        say(f"{uri}: {count_of(broken, 'problem')} at level {level}")
        for line in _advice(uri, damage(problems), facts, repaired):
            say(line)
    else:
        hint = f" (--level {deeper} reads every byte)" if deeper else ""
        say(f"{uri}: nothing wrong at level {level}{hint}")


def _advice(uri: str, broken: list[Problem], facts: DatasetInfo | None, repaired: bool) -> list[str]:
    """Return lines on what repairs the problems, cheapest first."""
    from winnow.store.format.layout import PLAN_KEY

    if any(problem.key == PLAN_KEY for problem in broken):
        return [
            f"nothing else says what {PLAN_KEY} held: put back a copy of it, byte for byte. If it is gone, "
            "`winnow plan` with the same config, or `winnow derive` with the same options, makes it again"
        ]
    again = "`winnow harvest CONFIG --repair` makes again {}, from corpus and subject"
    if facts and facts.derived:  # no corpus and no subject gives its rows
        made = f"dataset {facts.derived.parent[:12]}: {facts.derived.rule.words}, stored as {facts.dtype}"
        again = (
            f"`winnow derive` with the same options into another root makes the same objects (from {made}): "
            "copy from there {}"
        )
    # `verify --repair` cannot recompute rows and tokens, and has nothing left to do if it just ran.
    if repaired or all(problem.lost for problem in broken):
        return [again.format("what is damaged")]
    cheap = (
        f"`winnow verify {shlex.quote(uri)} --repair` puts right what the rest of the dataset tells: "
        "metadata, receipts, manifests, and indexes and checksums of shards"
    )
    return [cheap, again.format("what is damaged after that")]
