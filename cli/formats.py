"""`winnow import` and `winnow export`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from winnow.cli.console import emit, guard
from winnow.common.reporter import say

log = logging.getLogger("winnow.cli")

READ = "openai, saelens, sparsify, dictionary_learning, gemma-scope"
WRITTEN = f"{READ}, saebench, neuronpedia"
"""The keys of `READERS` and `WRITERS` in `winnow.sae.formats.convert`, which imports torch."""
IMPORT_HELP = """Turn another library's sparse autoencoder into one of Winnow's.

`winnow.Sae.load` and every command read the result. Its reconstructions are those of the other library. No
code in the files is ever run: a `.pt` that needs it is refused.
"""
EXPORT_HELP = """Write an SAE of Winnow's in another library's format.

Dataset normalisation is folded into the weights. If the format cannot hold a part of the SAE, the export is
refused and the message says why: per-row normalisation (`normalize: layer`) needs openai, saelens, saebench
or neuronpedia.
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
        format_name: Annotated[str, typer.Option("--from", metavar="FORMAT", help=READ)],
        out: Annotated[str, typer.Option(help="Folder or URI to write the SAE to.")],
        hook: Annotated[
            str | None, typer.Option(help="Hook of its input, such as `resid_post.9`; the files often say.")
        ] = None,
        target_hook: Annotated[str | None, typer.Option(help="Hook of a transcoder's output.")] = None,
        centred: Annotated[
            bool | None,
            typer.Option(
                "--centred/--not-centred",
                help="SAELens: whether TransformerLens centred its rows; the files often say.",
            ),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print the SAE's card on stdout.")] = False,
    ) -> None:
        with guard():
            from winnow.sae.formats.convert import UNKNOWN_HOOK, import_sae

            card = import_sae(source, format_name, out, hook=hook, target_hook=target_hook, centred=centred)
            # A warning only: weights can be used without a hook; what reads a dataset needs it.
            if card.hook == UNKNOWN_HOOK:
                log.warning("the files do not say at which hook this SAE reads: give it as --hook")
            kind = "transcoder" if card.parts.d_out else "SAE"
            sizes = f"{card.parts.activation} {kind}, D = {card.d_model:,}, N = {card.latents:,}"
            emit(card.model_dump(mode="json"), as_json, lambda: say(f"{sizes}, {card.hook} → {out}"))

    @app.command(
        "export",
        help=EXPORT_HELP,
        epilog="Example: `winnow export runs/quickstart --to saelens --out exported`",
    )
    def export(
        sae: Annotated[str, typer.Argument(metavar="SAE", help="Folder or URI of the SAE.")],
        format_name: Annotated[str, typer.Option("--to", metavar="FORMAT", help=WRITTEN)],
        out: Annotated[Path, typer.Option(help="Folder to write into; must be empty or absent.")],
        model: Annotated[
            str | None,
            typer.Option(help="That library's name of the subject; default the one in the SAE's card."),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print the files as JSON on stdout.")] = False,
    ) -> None:
        with guard():
            from winnow.sae.formats.convert import export_sae

            files = [str(file) for file in export_sae(sae, format_name, out, model=model)]
            emit({"files": files}, as_json, lambda: say("\n".join(files)))
