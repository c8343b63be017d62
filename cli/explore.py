"""`winnow index`, `winnow explore` and `winnow export-features`."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from winnow.cli.console import emit, guard, print_table
from winnow.common.figures import count_of
from winnow.common.reporter import say
from winnow.common.signals import interrupted_by_signals

if TYPE_CHECKING:
    from winnow.schemas.features import FeatureIndex, IndexSpec

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKEN_VARIABLE = "WINNOW_EXPLORER_TOKEN"
"""Environment variable with the token that requests must carry; if it is not set, one is drawn."""

SaeUri = Annotated[
    str, typer.Argument(metavar="SAE", help="Folder or URI of a published SAE or transcoder set.")
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="YAML file with `root` and, if wanted, `subject` and `storage`."
    ),
]
Root = Annotated[
    str | None,
    typer.Option("--root", metavar="ROOT", help="The dataset: folder or URI; overrides the config's."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


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
        str | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder of the index; default SAE/features, of each layer."
        ),
    ] = None,
    scratch: Annotated[
        str | None,
        typer.Option(
            "--scratch", metavar="DIR", help="Local folder for intermediate codes; default OUT/scratch."
        ),
    ] = None,
    units: Annotated[
        int | None, typer.Option(help="Read this many units of the dataset; default all.")
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            "--rows",
            metavar="YAML",
            help="Rows by their labels: '{roles: [assistant]}'; '{}' for all; "
            "default those that the SAE was trained on.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="Best windows kept per latent.")] = 16,
    logits: Annotated[
        int, typer.Option(help="Promoted and suppressed tokens kept per latent; 0 skips the subject.")
    ] = 12,
    neighbours: Annotated[
        int, typer.Option(help="Nearest latents kept per latent, by cosine and by co-activation.")
    ] = 12,
    workers: Annotated[
        int, typer.Option(min=1, help="Workers, Ray actors if more than one; 1 runs in this process.")
    ] = 1,
    threads: Annotated[
        int, typer.Option(min=0, help="CPU threads per worker; 0 divides a machine's cores.")
    ] = 0,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs per worker, or a share of one; default one if there are any."),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS", help="A running Ray cluster, auto or host:6379; default a new one."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Index an SAE's latents: best windows, random windows, histograms, logits, neighbours.

    Encodes the dataset's stored activations once; the subject model is loaded for its unembedding only.
    Memory stays flat however many latents or rows there are. May be interrupted at any time: the same
    command resumes, and a finished index is only shown again. A transcoder set gets an index per layer.

    Example: `winnow index runs/quickstart --config configs/quickstart.yaml`
    """
    with guard(), interrupted_by_signals():
        from winnow.explorer.index.make import Staff, make_index, make_indexes
        from winnow.explorer.place import Place, default_index
        from winnow.sae.model import read_set_card
        from winnow.store.objects import open_store

        spec = _make_spec(units, rows, top, logits, neighbours)
        place, staff = Place.of(config, root), Staff(workers, threads, gpus, ray_address)
        card = read_set_card(open_store(sae, place.storage))
        if card is not None:
            made = make_indexes(sae, card, place, out, scratch, spec, staff)
            value = {str(layer): meta.model_dump(mode="json") for layer, meta in made.items()}
            emit(value, as_json, lambda: _show_layers(made, out or sae))
            return
        where = out or default_index(sae)
        meta = make_index(sae, place, where, scratch, spec, staff)
        emit(meta.model_dump(mode="json"), as_json, lambda: _show(meta, where))


def _make_spec(units: int | None, rows: str | None, top: int, logits: int, neighbours: int) -> IndexSpec:
    from winnow.common.yaml_text import parse_value
    from winnow.schemas.base import validate
    from winnow.schemas.features import IndexSpec

    # Bounds are the schema's, not typer's, so that the library refuses the same values in the same words.
    return validate(
        IndexSpec,
        {
            "units": units,
            "rows": parse_value(rows, "--rows") if rows is not None else None,
            "top": top,
            "logits": logits,
            "neighbours": neighbours,
        },
        origin="the command line",
    )


def _show(meta: FeatureIndex, out: str) -> None:
    hooks = " and ".join(part.hook for part in meta.parts) or meta.hook
    print_table(
        f"index of {hooks} → {out}",
        [
            ("latents", f"{meta.latents:,}"),
            ("windows read", f"{meta.windows:,}"),
            ("rows read", f"{meta.rows:,}"),
            *([("of rows with", meta.spec.rows.words)] if meta.spec.rows else []),
            # Absent in an index made before this was recorded.
            *([("how they begin", meta.window.words)] if meta.window else []),
            ("made", meta.created),
        ],
    )


def _show_layers(made: dict[int, FeatureIndex], out: str) -> None:
    print_table(
        f"indexes of a set → {out}",
        [[str(layer), meta.hook, f"{meta.latents:,}", f"{meta.rows:,}"] for layer, meta in made.items()],
        header=("layer", "reads", "latents", "rows read"),
    )


def explore_command(
    saes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SAE",
            help="Published SAEs with an index, two can be compared; or one transcoder set.",
        ),
    ] = None,
    config: ConfigFile = None,
    root: Root = None,
    index: Annotated[
        list[str] | None,
        typer.Option(
            "--index",
            metavar="DIR",
            help="Folder of an SAE's index, in the SAEs' order; default SAE/features.",
        ),
    ] = None,
    graph: Annotated[
        list[Path] | None,
        typer.Option(
            "--graph",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="An attribution graph to show beside those in SET/graphs; may be repeated.",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")
    ] = 8517,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. Beyond loopback requests need a token, printed at the start."
        ),
    ] = "127.0.0.1",
    seats: Annotated[
        int, typer.Option(min=1, help="Requests to the model at a time, waiting ones included.")
    ] = 8,
) -> None:
    """Look at SAEs in the browser: what each latent fires on, what it promotes, what it does to the text.

    Listens on this machine only by default, and needs no network. The subject model is loaded when it is
    first needed (for a text, a steered generation, an ablation). Of a transcoder set it shows the layers that
    are indexed, and the attribution graphs in SET/graphs.

    A strength on the page Steer is a code in the SAE's own units for "clamp to" and "add", and a factor for
    "scale by", where 1.0 changes nothing. The largest code in the dataset is shown beside it: begin there.

    Example: `winnow explore runs/quickstart --config configs/quickstart.yaml`
    """
    with guard():
        from winnow.explorer.place import Place
        from winnow.explorer.site.desk import open_desk
        from winnow.explorer.site.serve import listen, make_app, serve
        from winnow.schemas.errors import ConfigError

        place = Place.of(config, root)
        if not saes and not graph:
            raise ConfigError("nothing to show", expected="an SAE, a set or --graph FILE", got="none")
        desk = open_desk(saes or [], index, place, seats, graph or [])
        # Beyond loopback anybody on the network could read the dataset's texts and occupy the model.
        token = None if host in LOOPBACK else os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(24)
        # Bound before the address is printed: port 0 gets its number here, and nobody is sent to an address
        # that is in use.
        listener = listen(host, port)
        # A URL takes an IPv6 address in brackets only.
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}/"
        say(f"explorer: {address}{f'?token={token}' if token else ''}  (Ctrl-C ends it)")
        with listener:
            serve(make_app(desk, token), listener)


def export_command(
    sae: SaeUri,
    latents: Annotated[
        str, typer.Option(metavar="LIST", help="3,10-12 for instance, or all (at most 10,000).")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Local folder for the files.")],
    index: Annotated[
        str | None, typer.Option("--index", metavar="DIR", help="Folder of the index; default SAE/features.")
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Export latents: a self-contained HTML page, and JSON for OpenAI's sae-viewer and for Neuronpedia.

    Of a transcoder set, latents of these numbers are exported of every layer, to DIR/layer_3 and so on; name
    SET/layer_3 for those of one layer.

    Example: `winnow export-features runs/quickstart --latents 3,10-12 --out site`
    """
    with guard():
        from winnow.explorer.place import Place, default_index, layer_places
        from winnow.explorer.site.bundle import export_all
        from winnow.sae.model import read_set_card
        from winnow.schemas.layers import layer_folder
        from winnow.store.objects import open_store

        storage = Place.of(config, None).storage
        card = read_set_card(open_store(sae, storage))
        if card is None:
            files = export_all({out: (sae, index or default_index(sae))}, latents, storage)
        else:
            places = layer_places(sae, card, index)
            folders = {out / layer_folder(layer): place for layer, place in places.items()}
            files = export_all(folders, latents, storage)
        facts = {"files": len(files), "page": str(files[0])}
        emit(facts, as_json, lambda: say(f"{count_of(len(files), 'file')}; open {files[0]}"))
