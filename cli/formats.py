"""`winnow import` and `winnow export`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from winnow.cli.console import emit, guard
from winnow.common.figures import count_of
from winnow.common.reporter import say
from winnow.schemas.base import nearest
from winnow.schemas.errors import ConfigError

log = logging.getLogger("winnow.cli")

READ = "openai, saelens, sparsify, dictionary_learning, gemma-scope, qwen-scope, llama-scope, crosscoder"
WRITTEN = f"{READ}, saebench, neuronpedia"
"""The keys of `READERS` and `WRITERS` in `winnow.sae.formats.convert`, which imports torch."""
GRAPH = "neuronpedia-graph"
SETS_READ, SETS_WRITTEN = "circuit-tracer, gemma-scope-2, clt-forge", "circuit-tracer, clt-forge"
"""The same of `winnow.sae.formats.sets`."""
IMPORT_HELP = """Turn another library's sparse autoencoder, or its set of transcoders, into one of Winnow's.

`winnow.Sae.load` and every command read the result. Its reconstructions are those of the other library. No
code in the files is ever run: a `.pt` that needs it is refused.
"""
EXPORT_HELP = """Write an SAE or a transcoder set of Winnow's in another library's format.

Dataset normalisation is folded into the weights. If the format cannot hold a part of the SAE, the export is
refused and the message says why: per-row normalisation (`normalize: layer`) needs openai, saelens, saebench
or neuronpedia.

circuit-tracer and clt-forge hold transcoder sets. They want thresholds in place of TopK (circuit-tracer knows
TopK too, of a per-layer set): `--dataset` sets them, and says what they cost in FVU and L0.
"""


def register(app: typer.Typer) -> None:
    """Add the commands `import` and `export` to an app."""

    @app.command(
        "import",
        help=IMPORT_HELP,
        epilog="Example: `winnow import saes/layers.9 --from sparsify --out runs/theirs`",
    )
    def import_(
        source: Annotated[
            Path, typer.Argument(metavar="SRC", help="The file or folder of the other library.")
        ],
        format_name: Annotated[
            str, typer.Option("--from", metavar="FORMAT", help=f"{READ}; sets: {SETS_READ}; {GRAPH}.")
        ],
        out: Annotated[str, typer.Option(help="Folder or URI to write the SAE or set to.")],
        hook: Annotated[
            str | None,
            typer.Option(help="Hook of its input, such as `resid_post.9`; of a crosscoder all, with commas."),
        ] = None,
        target_hook: Annotated[str | None, typer.Option(help="Hook of a transcoder's output.")] = None,
        centred: Annotated[
            bool | None,
            typer.Option(
                "--centred/--not-centred",
                help="SAELens: whether TransformerLens centred its rows; the files often say.",
            ),
        ] = None,
        reads: Annotated[
            str | None,
            typer.Option(help="A set's input, `resid_mid` or `mlp_in`; the files of some formats say."),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print the card on stdout.")] = False,
    ) -> None:
        with guard():
            from winnow.sae.formats.convert import UNKNOWN_HOOK, import_sae

            if _is_graph(format_name):
                options = {
                    "--hook": hook,
                    "--target-hook": target_hook,
                    "--centred": centred,
                    "--reads": reads,
                }
                _refuse_options(options, f"no option with --from {GRAPH}")
                _import_graph(source, out, as_json)
                return
            if _is_of_sets(format_name):
                given = {"--hook": hook, "--target-hook": target_hook, "--centred": centred}
                _refuse_options(given, f"one of a single SAE, not of --from {format_name}")
                _import_set(source, format_name, out, reads, as_json)
                return
            _require_known("--from", format_name, READ, SETS_READ)
            _refuse_options({"--reads": reads}, f"of a transcoder set, --from {SETS_READ}")

            card = import_sae(source, format_name, out, hook=hook, target_hook=target_hook, centred=centred)
            # A warning only: weights can be used without a hook; what reads a dataset needs it.
            if card.hook == UNKNOWN_HOOK:
                log.warning("the files do not say at which hook this SAE reads: give it as --hook")
            kind = "transcoder" if card.parts.d_out else "crosscoder" if card.parts.widths else "SAE"
            sizes = f"{card.parts.activation} {kind}, D = {card.d_model:,}, N = {card.latents:,}"
            emit(
                card.model_dump(mode="json"),
                as_json,
                lambda: say(f"{sizes}, {', '.join(card.input_hooks)} → {out}"),
            )

    @app.command(
        "export",
        help=EXPORT_HELP,
        epilog="Example: `winnow export runs/quickstart --to saelens --out exported`",
    )
    def export(
        sae: Annotated[
            str, typer.Argument(metavar="SAE", help="Folder or URI of the SAE or set; a graph's file.")
        ],
        format_name: Annotated[
            str, typer.Option("--to", metavar="FORMAT", help=f"{WRITTEN}; sets: {SETS_WRITTEN}; {GRAPH}.")
        ],
        out: Annotated[Path, typer.Option(help="Folder to write into; must be empty or absent.")],
        model: Annotated[
            str | None,
            typer.Option(help="That library's name of the subject; default the one in the card."),
        ] = None,
        dataset: Annotated[
            str | None,
            typer.Option(help="Of a set with TopK: a dataset to set thresholds on, in place of TopK."),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print the files as JSON on stdout.")] = False,
    ) -> None:
        with guard():
            from winnow.sae.formats.convert import export_sae

            if _is_graph(format_name):
                _refuse_options({"--model": model, "--dataset": dataset}, f"no option with --to {GRAPH}")
                _export_graph(Path(sae), out, as_json)
                return
            if _is_of_sets(format_name):
                _export_set(sae, format_name, out, model, dataset, as_json)
                return
            _require_known("--to", format_name, WRITTEN, SETS_WRITTEN)
            _refuse_options({"--dataset": dataset}, f"of a transcoder set, --to {SETS_WRITTEN}")
            files = [str(file) for file in export_sae(sae, format_name, out, model=model)]
            emit({"files": files}, as_json, lambda: say("\n".join(files)))


def _require_known(option: str, format_name: str, saes: str, sets: str) -> None:
    """Refuse a format that neither an SAE, a set nor a graph has, with all that there are."""
    from winnow.sae.formats.convert import bare

    names = [*saes.split(", "), *sets.split(", "), GRAPH]
    if bare(format_name) not in map(bare, names):
        raise ConfigError(
            f"{option} {format_name!r}{nearest(format_name, names)}",
            expected=f"{saes}; sets: {sets}; {GRAPH}",
        )


def _is_of_sets(format_name: str) -> bool:
    from winnow.sae.formats.convert import bare
    from winnow.sae.formats.sets import SET_READERS

    return bare(format_name) in map(bare, SET_READERS)


def _is_graph(format_name: str) -> bool:
    from winnow.sae.formats.convert import bare

    return bare(format_name) == bare(GRAPH)


def _import_graph(source: Path, out: str, as_json: bool) -> None:
    from winnow.sae.formats.graph import import_graph

    graph = import_graph(source, out)
    found = {"nodes": len(graph.nodes), "links": len(graph.links), "slug": graph.metadata.slug}
    said = f"{graph.metadata.slug}: {count_of(len(graph.nodes), 'node')}, "
    said += f"{count_of(len(graph.links), 'link')} → {out}/graph.json"
    emit(found, as_json, lambda: say(said))


def _export_graph(source: Path, out: Path, as_json: bool) -> None:
    from winnow.sae.formats.graph import export_graph

    files = [str(file) for file in export_graph(source, out)]
    emit({"files": files}, as_json, lambda: say("\n".join(files)))


def _refuse_options(options: dict[str, object], expected: str) -> None:
    from winnow.schemas.errors import ConfigError

    for name, value in options.items():
        if value is not None:
            raise ConfigError(name, expected=expected, got=value)


def _import_set(source: Path, format_name: str, out: str, reads: str | None, as_json: bool) -> None:
    from winnow.sae.formats.sets import import_set
    from winnow.schemas.errors import ConfigError

    if reads not in (None, "resid_mid", "mlp_in"):
        raise ConfigError("--reads", expected="resid_mid or mlp_in", got=reads)
    card = import_set(source, format_name, out, reads=reads)
    kind = "cross-layer" if card.cross else "per-layer"
    said = f"{kind} set of {count_of(len(card.layers), 'layer')}, input {card.reads} → {out}"
    emit(card.model_dump(mode="json"), as_json, lambda: say(said))


def _export_set(
    uri: str, format_name: str, out: Path, model: str | None, dataset: str | None, as_json: bool
) -> None:
    from dataclasses import asdict

    from winnow.sae.formats.sets import export_set

    found = export_set(uri, format_name, out, model=model, dataset=dataset)
    files = [str(file) for file in found.files]

    def show() -> None:
        if found.cost:
            say("thresholds in place of TopK, on the held-out rows:")
        for layer, cost in found.cost.items():
            say(
                f"layer {layer}: above {cost.threshold:.4g}, L0 {cost.l0_topk:.1f} → {cost.l0:.1f}, "
                f"FVU {cost.fvu_topk:.4f} → {cost.fvu:.4f}"
            )
        say("\n".join(files))

    emit({"files": files, "cost": {str(n): asdict(c) for n, c in found.cost.items()}}, as_json, show)
