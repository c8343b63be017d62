"""`winnow index`, `winnow explore` and `winnow export-features`."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from winnow.cli.console import emit, guard, print_table
from winnow.common.config_file import load_config
from winnow.common.reporter import Progress, say
from winnow.evaluator.report import load_evaluation
from winnow.explorer.index.build import Recipe
from winnow.explorer.index.subjects import LazySubject
from winnow.explorer.index.table import FeatureTable
from winnow.explorer.site.explained import from_evaluation
from winnow.schemas.base import validate
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError, StoreError
from winnow.schemas.features import FeatureIndex, IndexSpec
from winnow.schemas.fit import check_one_subject, mismatch, other_windows
from winnow.schemas.subject import SubjectSpec
from winnow.schemas.window import WindowRule
from winnow.store import ActivationStore
from winnow.store.objects import open_store

if TYPE_CHECKING:
    from winnow.explorer.site.api import Desk
    from winnow.explorer.site.exhibit import Exhibit

log = logging.getLogger("winnow.explorer")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKEN_VARIABLE = "WINNOW_EXPLORER_TOKEN"
"""Environment variable with the token to ask for; a new one is made where it is not set."""

SaeUri = Annotated[str, typer.Argument(metavar="SAE", help="Folder or URI of a published SAE")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="YAML file with `root` and, if wanted, `subject` and `storage`"
    ),
]
Root = Annotated[
    str | None, typer.Option("--root", metavar="ROOT", help="The dataset, a folder or URI; over the config's")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout")]


class Place(NamedTuple):
    """Where the dataset and the subject are, as the options say."""

    root: str | None
    subject: SubjectSpec | None
    storage: StorageSpec

    @classmethod
    def of(cls, config: Path | None, root: str | None) -> Place:
        """Read the config, if there is one."""
        if config is None:
            return cls(root, None, StorageSpec())
        settings = load_config(config, [f"root={root}"] if root else [])
        return cls(settings.root, settings.subject, settings.storage)


def register(app: typer.Typer) -> None:
    """Add the explorer's commands to `app`."""
    app.command("index")(index_command)
    app.command("explore")(explore_command)
    app.command("export-features")(export_command)


def default_index(sae: str) -> str:
    """Where the index of an SAE lies unless somebody says otherwise."""
    return sae.rstrip("/") + "/features"


def index_command(
    sae: SaeUri,
    config: ConfigFile = None,
    root: Root = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Where the index goes; default SAE/features")
    ] = None,
    scratch: Annotated[
        str | None,
        typer.Option(
            "--scratch", metavar="DIR", help="Local folder for codes while it is made; default OUT/scratch"
        ),
    ] = None,
    units: Annotated[
        int | None, typer.Option(help="Read this many units of the dataset; default all")
    ] = None,
    top: Annotated[int, typer.Option(help="Best windows kept a latent")] = 16,
    logits: Annotated[
        int, typer.Option(help="Promoted and suppressed tokens kept a latent; 0 does without the subject")
    ] = 12,
    neighbours: Annotated[
        int, typer.Option(help="Nearest latents kept, by cosine and by co-activation")
    ] = 12,
    workers: Annotated[
        int, typer.Option(min=1, help="Workers, through Ray where there are several; 1 is this process")
    ] = 1,
    threads: Annotated[
        int, typer.Option(min=0, help="CPU threads of a worker; 0 shares a machine's cores")
    ] = 0,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs of a worker, or a share of one; default one where there are any"),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="A running Ray cluster, auto or host:6379; default its own"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Index an SAE's latents: best windows, random windows, histograms, logits, neighbours.

    Encodes the dataset's stored activations once; the subject model is loaded for its unembedding only.
    Memory stays flat however many latents or rows there are. Interrupt it whenever you like: the same
    command goes on where it stopped, and a finished index is only shown again.

    Example: `winnow index runs/quickstart --config configs/quickstart.yaml`
    """
    with guard():
        spec = validate(
            IndexSpec,
            {"units": units, "top": top, "logits": logits, "neighbours": neighbours},
            origin="the options",
        )
        place = Place.of(config, root)
        where = out or default_index(sae)
        meta = build_index(sae, place, where, scratch, spec, Staff(workers, threads, gpus, ray_address))
        emit(meta.model_dump(mode="json"), as_json, lambda: _show(meta, where))


class Staff(NamedTuple):
    """Who makes an index; see the options of `winnow index`."""

    workers: int = 1
    threads: int = 0
    gpus: float | None = None
    ray_address: str | None = None


ALONE = Staff()


def build_index(
    sae_uri: str, place: Place, out: str, scratch: str | None, spec: IndexSpec, staff: Staff = ALONE
) -> FeatureIndex:
    """What `winnow index` does, with progress on stderr."""
    if place.root is None:
        raise ConfigError("the dataset", expected="--root ROOT or --config FILE", got="neither")
    recipe = Recipe(sae_uri, place.root, out, scratch, spec, place.subject, place.storage)
    indexer = recipe.open()
    if (warning := other_windows(sae_uri, indexer.card, indexer.dataset.plan)) is not None:
        log.warning(warning)
    with ExitStack() as crew, ExitStack() as stack:
        bars: dict[str, Progress] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in bars:
                stack.pop_all().close()
                bars[step] = stack.enter_context(Progress(f"index, {step}", total, step, done))
            bars[step].update(done)

        hands = None
        if staff.workers > 1 and indexer.finished() is None:
            from winnow.explorer.index.crew import (
                crew_of,  # Ray is slow to import, and one worker does without
            )

            hands = crew.enter_context(crew_of(recipe, *staff))
        return indexer.run(progress, hands)


def _show(meta: FeatureIndex, out: str) -> None:
    print_table(
        f"index of {meta.hook} → {out}",
        [
            ("latents", f"{meta.latents:,}"),
            ("windows read", f"{meta.windows:,}"),
            ("rows read", f"{meta.rows:,}"),
            *([("how they begin", meta.window.words)] if meta.window else []),
            ("made", meta.created),
        ],
    )


def explore_command(
    saes: Annotated[
        list[str],
        typer.Argument(metavar="SAE...", help="Published SAEs that are indexed; two can be compared"),
    ],
    config: ConfigFile = None,
    root: Root = None,
    index: Annotated[
        list[str] | None,
        typer.Option(
            "--index", metavar="DIR", help="Where an SAE's index is, in the SAEs' order; default SAE/features"
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free")] = 8517,
    host: Annotated[
        str,
        typer.Option(
            help="Where to listen. Beyond loopback a token is asked for; it is printed at the start"
        ),
    ] = "127.0.0.1",
    seats: Annotated[
        int, typer.Option(min=1, help="Requests at the model at once, waiting ones included")
    ] = 8,
) -> None:
    """Look at SAEs in the browser: what each latent fires on, what it promotes, what it does to the text.

    Serves on this machine only, and needs no network. The subject model is loaded when something first asks
    for it (a text, a steered generation, an ablation).

    Example: `winnow explore runs/quickstart --config configs/quickstart.yaml`
    """
    with guard():
        from winnow.explorer.site.serve import listen, make_app, serve

        place = Place.of(config, root)
        desk = open_desk(saes, index, place, seats)
        token = None if host in LOOPBACK else os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(24)
        listener = listen(host, port)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}/"
        say(f"explorer: {address}{f'?token={token}' if token else ''}  (Ctrl-C ends it)")
        with listener:
            serve(make_app(desk, token), listener)


def open_desk(saes: list[str], index: list[str] | None, place: Place, seats: int) -> Desk:
    """What a server of these SAEs shows.

    Raises:
        ConfigError: An SAE is not indexed.
        SaeMismatch: They belong to different subjects.
    """
    from winnow.explorer.site.api import Desk
    from winnow.explorer.site.exhibit import Exhibit
    from winnow.explorer.site.lane import Lane

    where = [*(index or []), *(default_index(sae) for sae in saes[len(index or []) :])]
    exhibits: list[Exhibit] = []
    for sae, folder in zip(saes, where, strict=True):
        table = FeatureTable.open(folder, place.storage)
        add_explanations(table, sae, place.storage)
        exhibits.append(Exhibit(sae.rstrip("/").rsplit("/", 1)[-1] or sae, sae, table, place.storage))
    check_one_subject(
        [exhibit.uri for exhibit in exhibits], [exhibit.table.meta.subject for exhibit in exhibits]
    )
    meta = exhibits[0].table.meta
    root = place.root or meta.root

    @cache
    def dataset() -> ActivationStore:
        found = ActivationStore.open(root, place.storage)
        if found.plan.fingerprint != meta.plan_fingerprint:
            raise mismatch(
                "plan",
                f"the dataset at {root}",
                expected=meta.plan_fingerprint,
                of="the index",
                got=found.plan.fingerprint,
                fix="Give the dataset that was indexed as --root",
            )
        return found

    at_hand = dataset
    try:
        dataset()
    except (StoreError, ConfigError) as error:
        log.warning("explorer: the dataset is not at hand, so ablations take pasted text only (%s)", error)
        at_hand = None
    for exhibit in exhibits:
        exhibit.window = window_rule(exhibit, at_hand)
    return Desk(exhibits, LazySubject(place.subject, meta.subject), Lane(seats), at_hand)


def window_rule(exhibit: Exhibit, dataset: Callable[[], ActivationStore] | None) -> WindowRule:
    """How an SAE's windows begin: as its index says, else (an index of before) as its dataset's plan does.

    Where neither is there, texts are read without BOS, and that is said.
    """
    meta = exhibit.table.meta
    if meta.window is not None:
        return meta.window
    if dataset is not None and dataset().plan.fingerprint == meta.plan_fingerprint:
        return WindowRule.of(dataset().plan)
    if meta.subject.bos_token_id is not None:
        log.warning(
            "explorer: the index of %s does not say whether windows begin with BOS: texts are read without "
            "it; `--root` with its dataset, or indexing anew, tells",
            exhibit.name,
        )
    return WindowRule()


def add_explanations(table: FeatureTable, sae: str, storage: StorageSpec) -> None:
    """Add those of this SAE's evaluations that lie beside it, first that of the index's dataset."""
    stored = load_evaluation(open_store(sae, storage))
    evaluations = [one for one in stored.each if one.sae_sha256 == table.meta.sae_sha256] if stored else []
    evaluations.sort(key=lambda one: one.plan_fingerprint != table.meta.plan_fingerprint)
    for evaluation in evaluations:
        for each in from_evaluation(evaluation):
            known = table.explanations.setdefault(each.latent, [])
            if each not in known:
                known.append(each)


def export_command(
    sae: SaeUri,
    latents: Annotated[str, typer.Option(metavar="LIST", help="Such as 3,10-12, or all (at most 10,000)")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Local folder for the files")],
    index: Annotated[
        str | None, typer.Option("--index", metavar="DIR", help="Where the index is; default SAE/features")
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Take latents along: a self-contained HTML page, and JSON for OpenAI's sae-viewer and for Neuronpedia.

    Example: `winnow export-features runs/quickstart --latents 3,10-12 --out site`
    """
    with guard():
        from winnow.explorer.site.exhibit import Exhibit
        from winnow.explorer.site.export import export, parse_latents

        place = Place.of(config, None)
        table = FeatureTable.open(index or default_index(sae), place.storage)
        add_explanations(table, sae, place.storage)
        exhibit = Exhibit(sae.rstrip("/").rsplit("/", 1)[-1] or sae, sae, table, place.storage)
        exhibit.window = table.meta.window or WindowRule()
        files = export(exhibit, parse_latents(latents, table.meta.latents), out)
        facts = {"files": len(files), "page": str(files[0])}
        emit(facts, as_json, lambda: say(f"{len(files)} files; open {files[0]}"))
