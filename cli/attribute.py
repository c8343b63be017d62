"""`winnow attribute`: which latents make the subject predict a token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from winnow.cli.console import emit, guard, print_table
from winnow.common.reporter import say
from winnow.schemas.errors import ConfigError

HELP = """Show which latents make the subject predict a token after a text.

For every latent active anywhere in the text: its first-order effect, code x gradient, on the
log-probability of --answer (or on its logit over that of --against), from one backward pass with the SAE
spliced in and its error kept; and, for the largest, the actual loss when that latent alone is set to 0. A
positive effect favours the answer. The line below the table gives the part in the SAE's error, which no
latent explains. Of a transcoder set, all layers are spliced in at once; of a crosscoder of several subjects
there is a table for each.

The text is a prompt, which begins as the dataset's windows do (with BOS if its plan says so), or a window of
the dataset. Tokens of a window have labels, so that --rows chooses the positions whose latents are counted;
the default are the rows that the SAE was trained on. The answer is then the window's own token unless
--answer names another.
"""
EPILOG = (
    "Example: `winnow attribute runs/quickstart --root data/quickstart --prompt "
    "'Wherefore art' --answer ' thou' --against ' you'`"
)


def register(app: typer.Typer) -> None:
    """Add the command `attribute` to an app."""
    app.command("attribute", help=HELP, epilog=EPILOG)(command)


def command(
    sae: Annotated[str, typer.Argument(metavar="SAE", help="Folder or URI with sae.json or set.json.")],
    prompt: Annotated[str | None, typer.Option(help="Text before the answer.")] = None,
    answer: Annotated[
        str | None,
        typer.Option(help="One token, including a leading space; default in a window, its own."),
    ] = None,
    against: Annotated[str | None, typer.Option(help="One token to compare with.")] = None,
    window: Annotated[
        int | None, typer.Option(min=0, help="Number of a window of the dataset, in place of a prompt.")
    ] = None,
    at: Annotated[
        int | None, typer.Option(min=1, help="Position of the predicted token of --window; default the last.")
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="YAML",
            help="Positions of --window that count, by labels: '{roles: [assistant], special: false}'; '{}' "
            "for all. Default: the rows that the SAE was trained on.",
        ),
    ] = None,
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
        from winnow.evaluator.prompt import attribute_prompt, attribute_window

        _check_text(prompt, answer, window, at, rows)
        setting = _open(sae, config, root, rows, labelled=window is not None)
        if window is not None:
            found = attribute_window(setting, window, at, answer, against, top, skip)
        else:
            found = attribute_prompt(setting, prompt or "", answer or "", against, top, skip)
        emit(found, as_json, lambda: show(found))


def _check_text(
    prompt: str | None, answer: str | None, window: int | None, at: int | None, rows: str | None
) -> None:
    if (prompt is None) == (window is None):
        raise ConfigError("the text", expected="--prompt TEXT or --window N, one of them")
    if prompt is not None and answer is None:
        raise ConfigError("--answer", expected="a token", got="none", fix="Only a window has one of its own")
    if prompt is not None and (at is not None or rows is not None):
        name = "--at" if at is not None else "--rows"
        why = "a prompt, whose tokens have no labels" if rows is not None else "a prompt"
        raise ConfigError(name, expected="it together with --window", got=why)


def _open(sae: str, config: Path | None, root: str | None, rows: str | None, *, labelled: bool) -> Any:
    """The SAE on its dataset, which is restricted to rows if the text has labels."""
    from winnow.common.config_file import load_config
    from winnow.common.yaml_text import parse_value
    from winnow.evaluator.set_setting import named_root, open_setting
    from winnow.schemas.base import validate
    from winnow.schemas.config import Config
    from winnow.schemas.evaluation import EvaluateSpec

    # Not both: an SAE fits one dataset, and which one was meant would be a guess. One of several datasets
    # names them itself.
    root = root or (named_root(sae) if config is None else None)
    if (config is None) == (root is None):
        raise ConfigError("the dataset", expected="--root URI or --config FILE, one of them")
    settings = load_config(config, []) if config else Config(root=root or "")
    # Null takes the rows that the SAE was trained on; a prompt has none to choose from.
    chosen = (parse_value(rows, "--rows") if rows is not None else None) if labelled else {}
    given = settings.evaluate.model_dump() | {"rows": chosen}
    spec = validate(EvaluateSpec, given, origin="the command line")
    roots = settings.train.roots if settings.train is not None else None
    return open_setting(
        sae, settings.root, spec, subject=settings.subject, storage=settings.storage, roots=roots
    )


def show(found: dict[str, Any]) -> None:
    """Print the effects as a table, and their sums; of several subjects, those of each."""
    for name, each in found.get("subjects", {"": found}).items():
        _show_subject(found | each, name)
    if found["bos"]:
        say("BOS goes before the prompt, as before each window of the dataset")
    # Figures are of these positions only, and name them.
    say(f"counted: {found['rows']}")


def _show_subject(found: dict[str, Any], name: str) -> None:
    what = f"log P({found['answer']!r})"
    if found["against"] is not None:
        what = f"logit({found['answer']!r}) - logit({found['against']!r})"
    # Tokens as literals: a leading space or a newline is part of them.
    several = len(found["hooks"]) > 1 and not found["joint"]
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
    shown = " to ".join(dict.fromkeys((found["hooks"][0], found["hooks"][-1])))
    title = f"{f'{name}: ' if name else ''}{what} = {found['metric']:.4f}, by latents of {shown}"
    header = ("token", "latent", "code", "first order", "lost without it")
    print_table(title, lines, header=("hook", *header) if several else header)
    if not lines:
        say("no latent that is active on the text has an effect: there is nothing to attribute")
    # Shown even if the error's part is large: the effects above explain no more than the rest.
    say(f"first order: all latents {found['latents']:+.4f}, the SAE's error {found['error']:+.4f}")
