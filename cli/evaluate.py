"""`winnow evaluate` and `winnow compare`."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from winnow.cli.console import emit, guard, print_table
from winnow.common.reporter import say
from winnow.common.signals import interrupted_by_signals
from winnow.schemas.errors import ConfigError

if TYPE_CHECKING:
    from winnow.schemas.config import Config
    from winnow.schemas.evaluation import Evaluation

JUDGE_KEY_VARIABLE = "WINNOW_JUDGE_KEY"
FAMILIES = "reconstruction, downstream, compute, stability, ablation, probes, n2g, judge, diffing"
"""The names of `winnow.schemas.evaluation`, which a help need not import; a test compares the two."""
EVALUATE_HELP = f"""Measure a trained SAE or transcoder set on the windows its dataset held out.

Families: {FAMILIES}; docs/evaluation.md defines each figure. Writes
`evaluation.json` beside the SAE after every family and prints a table. May be interrupted at any time:
finished families are kept, and measured again only with --again or other settings. Figures of other settings
and of other datasets stay in the file. Of a set, reconstruction, downstream and compute are
measured; the other families take one of its layers, SET/layer_3.

The dataset comes from --root or from a config's `root`; sample sizes, tasks and the law of `compute` from
its section `evaluate`. An SAE of several datasets (`train.roots`) is measured on those that its card names,
or that the config's `train.roots` names. `judge` asks a language model at `evaluate.judge.endpoint` (its key:
{JUDGE_KEY_VARIABLE}); nothing is sent anywhere unless the endpoint is set.
"""
EVALUATE_EPILOG = (
    "Example: `winnow evaluate runs/quickstart --config configs/quickstart.yaml --metrics reconstruction,n2g`"
)


def register(app: typer.Typer) -> None:
    """Add the evaluator's commands to an app."""
    app.command("evaluate", help=EVALUATE_HELP, epilog=EVALUATE_EPILOG)(evaluate_command)
    app.command("compare")(compare_command)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def evaluate_command(
    sae: Annotated[str, typer.Argument(metavar="SAE", help="Folder or URI with sae.json or set.json.")],
    config: Annotated[
        Path | None, typer.Option(help="YAML file with `root`; optionally `subject` and `evaluate`.")
    ] = None,
    root: Annotated[str | None, typer.Option(help="The dataset; overrides the config's.")] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Families, comma-separated; default all whose inputs are there.")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Maximum number of held-out windows.")] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="YAML",
            help="Held-out rows by their labels: '{roles: [assistant], special: false}'; '{}' for all. "
            "Default: those that the SAE was trained on.",
        ),
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="An SAE of another seed, for `stability`; repeatable.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Folder of Parquet tasks (text, label[, split]) for `probes`.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder for evaluation.json; default beside the SAE.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure finished families again.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a field: `evaluate.seed=1`; repeatable, the last of a field wins.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a trained SAE; the help text is `EVALUATE_HELP`."""
    with guard(), interrupted_by_signals():
        from winnow.common.yaml_text import parse_value
        from winnow.evaluator.report import evaluate
        from winnow.schemas.base import validate
        from winnow.schemas.evaluation import EvaluateSpec

        settings = _config(config, root, set_ or [], sae)
        options: dict[str, Any] = {
            "metrics": metrics.split(",") if metrics is not None else None,
            "windows": windows,
            "rows": parse_value(rows, "--rows") if rows is not None else None,
            "against": against,
            "tasks": tasks,
        }
        # Options that were not given leave the config's values.
        given = {name: value for name, value in options.items() if value is not None}
        raw = settings.evaluate.model_dump() | given
        # Validated on its own: `model_copy` checks nothing.
        spec = validate(EvaluateSpec, raw, origin="the command line")
        settings = settings.model_copy(update={"evaluate": spec})
        # From the environment only: other users see a process's options, and a shell keeps them.
        key = os.environ.get(JUDGE_KEY_VARIABLE)
        found = evaluate(sae, settings, out=out, again=again, judge_key=key)
        emit(found.model_dump(mode="json"), as_json, lambda: _show(found))


def _config(path: Path | None, root: str | None, sets: list[str], sae: str) -> Config:
    from winnow.common.config_file import load_config
    from winnow.evaluator.set_setting import named_root
    from winnow.schemas.config import Config

    if path is not None:
        # Last, so that it wins, and quoted: the value of a --set is YAML, where `runs/a #1` holds a comment.
        return load_config(path, [*sets, *([f"root={json.dumps(root)}"] if root else [])])
    root = root or named_root(sae)
    if root is None:
        raise ConfigError(
            "the dataset", expected="--root URI or --config FILE", got="neither", fix="Name its root"
        )
    # Without a config they would be dropped silently.
    if sets:
        raise ConfigError("--set", expected="it together with --config", got="no config")
    return Config(root=root)


def _show(found: Evaluation) -> None:
    from winnow.evaluator.report import list_notes, name_of, tabulate, tabulate_layers

    # What was asked for comes last, right above the shell's prompt.
    for one in reversed(found.each):
        weights = "" if one.sae_sha256 == found.sae_sha256 else f", weights {one.sae_sha256[:12]}"
        reads = f"{one.reads[0]} to {one.reads[-1]}" if one.reads else one.hook
        title = f"{one.sae}: {reads}, N = {one.latents:,}, K = {one.k}{weights}; on {name_of(one)}"
        print_table(title, tabulate(one), header=("definition", "value", "95 % interval", "sample"))
        header, layers = tabulate_layers(one)
        if layers:
            print_table("by layer", layers, header=header)
        for line in list_notes(one):
            say(line)
    seconds = ", ".join(f"{name} {family.seconds:.0f} s" for name, family in found.families.items())
    say(f"measured in: {seconds}")


def compare_command(
    saes: Annotated[list[str], typer.Argument(metavar="SAE", help="Evaluated SAEs, two or more.")],
    out: Annotated[
        str, typer.Option(help="Folder or URI for frontier.png, frontier.svg and compare.json.")
    ] = "runs/compare",
    as_json: Json = False,
) -> None:
    """Compare evaluated SAEs and draw their L0 / FVU / delta-CE frontiers.

    `winnow evaluate` must have measured all of them on the same dataset: figures of different held-out
    windows cannot be compared and are refused.

    Example: `winnow compare runs/k16 runs/k32 runs/k64 --out runs/frontier`
    """
    with guard():
        from winnow.evaluator.frontier import draw_frontiers
        from winnow.evaluator.report import (
            find_common_dataset,
            require_evaluation,
            tabulate_several,
        )
        from winnow.store.objects import open_store

        if len(saes) < 2:
            raise ConfigError("SAEs to compare", expected="two or more", got=len(saes))
        # All are read and found comparable before the first file is written.
        stored = [require_evaluation(uri) for uri in saes]
        found = find_common_dataset(stored, saes)
        labels = short_labels(saes)
        store = open_store(out)
        for kind, data in draw_frontiers(found, labels).items():
            store.put(f"frontier.{kind}", data)
        table = tabulate_several(found)
        value = {
            "saes": saes,
            "figures": {
                row[0]: [
                    figure and figure.model_dump(mode="json") for figure in (e.figure(row[0]) for e in found)
                ]
                for row in table
            },
        }
        store.put("compare.json", json.dumps(value, indent=1).encode() + b"\n")
        emit(value, as_json, lambda: print_table("side by side", table, header=("definition", *labels)))
        say(f"drawn: {out}/frontier.png, {out}/frontier.svg")


def short_labels(uris: list[str]) -> list[str]:
    """Return each URI without the folders that all of them begin with."""
    parts = [PurePosixPath(uri.rstrip("/")).parts for uri in uris]
    common = 0
    # At least the last folder stays: it is the label.
    while all(len(part) > common + 1 for part in parts) and len({part[common] for part in parts}) == 1:
        common += 1
    return ["/".join(part[common:]) for part in parts]
