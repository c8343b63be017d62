"""The `winnow` command: the packages' commands under one name."""

from __future__ import annotations

import typer

from winnow.cli.attribute import register as register_attribution
from winnow.cli.evaluate import register as register_evaluator
from winnow.cli.explore import register as register_explorer
from winnow.cli.formats import register as register_formats
from winnow.cli.harvest import register as register_harvester
from winnow.cli.recovery import register as register_recovery
from winnow.cli.scaling import register as register_scaling
from winnow.cli.store import register as register_store
from winnow.cli.submit import register as register_jobs
from winnow.cli.train import register_all as register_trainer
from winnow.evaluator.heldout import measure_in_subject

app = typer.Typer(
    name="winnow",
    help="From a language model's activations to sparse, readable features.",
    epilog="Start: `winnow plan`, `harvest`, `train` with configs/quickstart.yaml.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
register_harvester(app)
register_trainer(app, after_train=measure_in_subject)
register_formats(app)
register_evaluator(app)
register_attribution(app)
register_recovery(app)
register_store(app)
register_explorer(app)
register_scaling(app)
register_jobs(app)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
