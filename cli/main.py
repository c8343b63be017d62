"""The `winnow` command: a table of its commands, each imported when it is called.

The stages' libraries take some 7 s of CPU to import. The list of commands, `--version` and the completion of
names read the table only; a command's own help imports its module, and its work imports the rest: inside the
function, below `guard()`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group


class Entry(NamedTuple):
    """A command before its module is imported."""

    module: str
    """Below `winnow.cli`; its `register(app)` adds the command to an app."""
    line: str
    """The first paragraph of the command's help: what the list of commands says about it."""


# Their order is that of the list. A test compares each line with the command's help.
COMMANDS = {
    "quickstart": Entry(
        "quickstart",
        "Harvest, train and look at the embedded default: a small model over Shakespeare and the Bible.",
    ),
    "init": Entry("init", "Write a commented config for a model and a corpus, after looking at both."),
    "plan": Entry(
        "harvest", "Read the corpus, tokenise and shuffle it into windows, and write the dataset's plan."
    ),
    "harvest": Entry("harvest", "Run the subject model over the planned windows and store its activations."),
    "derive": Entry(
        "derive", "Make a dataset from a dataset: chosen rows, means of rows, differences, another dtype."
    ),
    "train": Entry("train", "Train a TopK sparse autoencoder on a harvested dataset."),
    "sweep": Entry("train", "Train a grid of TopK sparse autoencoders from one read of a dataset."),
    "runs": Entry(
        "runs",
        "List the runs below a folder: state, progress, ETA, FVU, speed, cost; and a trainer service's jobs.",
    ),
    "watch": Entry(
        "runs", "Show a run while it trains, wherever it does: progress, curves, where a step's time goes."
    ),
    "stop": Entry(
        "runs",
        "Ask a run to write a checkpoint and exit, wherever it trains; takes about 5 s and a step.",
    ),
    "resume": Entry(
        "runs",
        "Let a stopped run resume: a service restarts it; without one, run its own command again.",
    ),
    "estimate": Entry(
        "estimate",
        "Estimate a run on some GPUs: memory, step time, tokens/s, hours, cost. Trains nothing.",
    ),
    "serve-trainer": Entry(
        "service",
        "Train what `winnow submit CONFIG --to ROOT` puts into the queue, each job in its own processes.",
    ),
    "import": Entry(
        "formats",
        "Turn another library's sparse autoencoder, or its set of transcoders, into one of Winnow's.",
    ),
    "export": Entry("formats", "Write an SAE or a transcoder set of Winnow's in another library's format."),
    "evaluate": Entry(
        "evaluate", "Measure a trained SAE or transcoder set on the windows its dataset held out."
    ),
    "compare": Entry("evaluate", "Compare evaluated SAEs and draw their L0 / FVU / delta-CE frontiers."),
    "attribute": Entry("attribute", "Show which latents make the subject predict a token after a text."),
    "circuit": Entry(
        "circuit",
        "Trace how a transcoder set's latents make the subject predict what comes after a prompt.",
    ),
    "recovery": Entry(
        "recovery",
        "Train SAEs on synthetic rows whose true directions are known, and count how many they recover.",
    ),
    "info": Entry("store", "Describe a dataset and its progress, an SAE or a set. Digests in full: --json."),
    "verify": Entry("store", "List what is missing, incomplete or corrupted; exit with 1 if anything is."),
    "index": Entry(
        "explore", "Index an SAE's latents: best windows, random windows, histograms, logits, neighbours."
    ),
    "explore": Entry(
        "explore",
        "Look at SAEs in the browser: what each latent fires on, what it promotes, what it does to the text.",
    ),
    "export-features": Entry(
        "explore",
        "Export latents: a self-contained HTML page, and JSON for OpenAI's sae-viewer and for Neuronpedia.",
    ),
    "scaling": Entry(
        "scaling",
        "Fit scaling laws to the SAEs of a sweep, and report how well they predict the largest ones.",
    ),
    "submit": Entry(
        "submit",
        "Put a config into a trainer service's queue, or run a Winnow command as a job on a Ray cluster.",
    ),
}

ELSEWHERE = {
    **dict.fromkeys(("steer", "monitor"), "It is a page of `winnow explore SAE`"),
    **dict.fromkeys(("judge", "n2g"), "It is a metric: `winnow evaluate SAE --metrics {}`"),
    **dict.fromkeys(
        ("list", "status"), "`winnow runs FOLDER` lists runs, `winnow info URI` describes one thing"
    ),
}
"""What is typed as a command and is none: where it is. Of similar names only `sweep` would be offered."""


class ListedCommand(TyperCommand):
    """A command of which only its line is known; parsing arguments imports and builds the real one."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Return the context of the real command, which is `context.command` from there on."""
        # The one door that a run, a help and the completion of options all pass; `invoke` would be too late
        # for the last two.
        assert self.name is not None
        return load_command(self.name).make_context(info_name, args, parent, **extra)


class ListedCommands(TyperGroup):
    """The group of `COMMANDS`."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        for name, entry in COMMANDS.items():
            self.add_command(ListedCommand(name, help=entry.line))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` begin with; a usage error that says where else to look for some others."""
        if args and args[0] in ELSEWHERE:
            ctx.fail(f"No such command {args[0]!r}. {ELSEWHERE[args[0]].format(args[0])}.")
        return super().resolve_command(ctx, args)


@cache
def load_command(name: str) -> Any:
    """Import a command's module and build the command from it.

    Args:
        name: A key of `COMMANDS`.

    Returns:
        A `typer.core.TyperCommand`.
    """
    group = typer.Typer(rich_markup_mode="markdown", pretty_exceptions_enable=False)
    import_module(f"winnow.cli.{COMMANDS[name].module}").register(group)
    # Not typer's `get_command`: if a module registers one command only, it returns that command, no group.
    return get_group(group).commands[name]


app = typer.Typer(
    name="winnow",
    cls=ListedCommands,
    help="From a language model's activations to sparse, readable features.",
    epilog="Start: `winnow quickstart`; with your own model and text: `winnow init`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        # Computed when it is asked for: reading the metadata takes twice as long as importing `winnow`.
        from winnow import __version__

        typer.echo(f"winnow {__version__}")
        raise typer.Exit


@app.callback()
def group_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version of Winnow and exit."
        ),
    ] = False,
) -> None:
    """Options of `winnow` itself; its help is that of `app`."""
    del version  # its callback has done the work


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
