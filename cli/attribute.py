"""`winnow attribute`: which latents make the subject predict a token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from winnow.cli.console import emit, guard, print_table
from winnow.common.reporter import say
from winnow.schemas.errors import ConfigError

HELP = """Show which latents make the subject predict a token after a prompt.

For every latent active anywhere in the prompt: its first-order effect, code x gradient, on the
log-probability of --answer (or on its logit over that of --against), from one backward pass with the SAE
spliced in and its error kept; and, for the largest, the actual loss when that latent alone is set to 0. A
positive effect favours the answer. The line below the table gives the part in the SAE's error, which no
latent explains. Of a transcoder set, all layers are spliced in at once. The prompt begins as the
dataset's windows do: with BOS if its plan says so.
"""
EPILOG = (
    "Example: `winnow attribute runs/quickstart --root data/quickstart --prompt "
    "'Wherefore art' --answer ' thou' --against ' you'`"
)


def register(app: typer.Typer) -> None:
    """Add the command `attribute` to an app."""
    app.command("attribute", help=HELP, epilog=EPILOG)(command)


def command(
    sae: Annotated[str, typer.Argument(metavar="SAE_URI", help="Folder or URI with sae.json or set.json.")],
    prompt: Annotated[str, typer.Option(help="Text before the answer.")],
    answer: Annotated[str, typer.Option(help="One token, including a leading space.")],
    against: Annotated[str | None, typer.Option(help="One token to compare with.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with `root`, in place of --root.")] = None,
    root: Annotated[str | None, typer.Option(help="The dataset the SAE was trained on.")] = None,
    top: Annotated[int, typer.Option(min=1, max=512, help="Number of effects shown, largest first.")] = 15,
    skip: Annotated[
        int | None,
        typer.Option(min=0, help="Leading positions left out; default the plan's `drop_leading`."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Attribute; the help text is `HELP`."""
    # In every command the imports stand here: a help needs none of them.
    with guard():
        from winnow.common.config_file import load_config
        from winnow.evaluator.prompt import attribute_prompt
        from winnow.evaluator.set_setting import open_setting
        from winnow.schemas.config import Config

        # Not both: an SAE fits one dataset, and which one was meant would be a guess.
        if (config is None) == (root is None):
            raise ConfigError("the dataset", expected="--root URI or --config FILE, one of them")
        settings = load_config(config, []) if config else Config(root=root or "")
        setting = open_setting(sae, settings.root, subject=settings.subject, storage=settings.storage)
        found = attribute_prompt(setting, prompt, answer, against, top, skip)
        emit(found, as_json, lambda: show(found))


def show(found: dict[str, Any]) -> None:
    """Print the effects as a table, and their sums."""
    what = f"log P({found['answer']!r})"
    if found["against"] is not None:
        what = f"logit({found['answer']!r}) - logit({found['against']!r})"
    # Tokens as literals: a leading space or a newline is part of them.
    several = len(found["hooks"]) > 1
    lines = [
        [
            *([effect["hook"]] if several else []),
            f"{effect['position']} {effect['token']!r}",
            str(effect["latent"]),
            f"{effect['code']:.3f}",
            f"{effect['first_order']:+.4f}",
            f"{effect['ablated']:+.4f}",
        ]
        for effect in found["effects"]
    ]
    shown = f"{found['hooks'][0]} to {found['hooks'][-1]}" if several else found["hook"]
    title = f"{what} = {found['metric']:.4f}, by latents of {shown}"
    header = ("token", "latent", "code", "first order", "lost without it")
    print_table(title, lines, header=("hook", *header) if several else header)
    if not lines:
        say("no latent that is active on the prompt has an effect: there is nothing to attribute")
    if found["bos"]:
        say("BOS goes before the prompt, as before each window of the dataset")
    # Shown even if the error's part is large: the effects above explain no more than the rest.
    say(f"first order: all latents {found['latents']:+.4f}, the SAE's error {found['error']:+.4f}")
