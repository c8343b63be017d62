"""`winnow index`, `winnow explore` and `winnow export-features`."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from winnow.cli.console import emit, guard, print_table
from winnow.common.reporter import say

if TYPE_CHECKING:
    from winnow.schemas.features import FeatureIndex

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


def register(app: typer.Typer) -> None:
    """Add the explorer's commands to `app`."""
    app.command("index")(index_command)
    app.command("explore")(explore_command)
    app.command("export-features")(export_command)


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
        from winnow.explorer.index.make import Staff, make_index
        from winnow.explorer.place import Place, default_index
        from winnow.schemas.base import validate
        from winnow.schemas.features import IndexSpec

        spec = validate(
            IndexSpec,
            {"units": units, "top": top, "logits": logits, "neighbours": neighbours},
            origin="the options",
        )
        place = Place.of(config, root)
        where = out or default_index(sae)
        meta = make_index(sae, place, where, scratch, spec, Staff(workers, threads, gpus, ray_address))
        emit(meta.model_dump(mode="json"), as_json, lambda: _show(meta, where))


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
        from winnow.explorer.place import Place
        from winnow.explorer.site.desk import open_desk
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
        from winnow.explorer.index.table import FeatureTable
        from winnow.explorer.place import Place, default_index
        from winnow.explorer.site.desk import add_explanations
        from winnow.explorer.site.exhibit import Exhibit
        from winnow.explorer.site.export import export, parse_latents
        from winnow.schemas.window import WindowRule

        place = Place.of(config, None)
        table = FeatureTable.open(index or default_index(sae), place.storage)
        add_explanations(table, sae, place.storage)
        exhibit = Exhibit(sae.rstrip("/").rsplit("/", 1)[-1] or sae, sae, table, place.storage)
        exhibit.window = table.meta.window or WindowRule()
        files = export(exhibit, parse_latents(latents, table.meta.latents), out)
        facts = {"files": len(files), "page": str(files[0])}
        emit(facts, as_json, lambda: say(f"{len(files)} files; open {files[0]}"))
