"""The `winnow` command: the packages' commands under one name."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

# `-m` puts the working directory first, where a `store.py` of the user's would be taken for ours.
_HOME = Path(__file__).resolve().parent
if __name__ == "__main__" and not sys.flags.safe_path and Path(sys.path[0]).resolve() != _HOME:
    del sys.path[0]

_found = find_spec("schemas")
if _found is not None and Path(_found.origin or "").resolve().parent != _HOME / "schemas":
    sys.exit(
        f"error: {_found.origin} would be imported as Winnow's own package 'schemas'. Rename it, or "
        "take that folder off PYTHONPATH."
    )
try:
    import winnow.schemas  # noqa: F401 - looks whether the other names are ours
except ValueError as error:
    sys.exit(f"error: {error}")

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
