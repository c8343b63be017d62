"""`winnow derive`."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from winnow.cli.console import emit, guard, print_table

if TYPE_CHECKING:
    from winnow.schemas.harvest import HarvestManifest, HarvestPlan


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("derive")(derive_command)


class MeanChoice(Enum):
    """What rows are averaged over."""

    TURN = "turn"
    DOCUMENT = "document"


class DtypeChoice(Enum):
    """Types of `plan.dtype`."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    INT8 = "int8"


def derive_command(
    root: Annotated[
        str,
        typer.Argument(metavar="ROOT", help="A sealed dataset: a local path, file:// or s3://bucket/prefix."),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Root of the dataset that is made.")],
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="YAML", help="Rows by their labels: '{roles: [assistant], special: false}'. Default: all."
        ),
    ] = None,
    mean: Annotated[
        MeanChoice | None,
        typer.Option(help="Take the mean of the (chosen) rows of each turn, or document, of a window."),
    ] = None,
    minus: Annotated[
        str | None,
        typer.Option(
            help="Subtract the rows of this dataset, which is aligned with ROOT (plan.tokens_from)."
        ),
    ] = None,
    dtype: Annotated[
        DtypeChoice | None, typer.Option(help="How rows are stored. Default: as in ROOT.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    allow_http: Annotated[
        bool, typer.Option("--allow-http", help="Permit an http:// endpoint beyond this machine's loopback.")
    ] = False,
    single_writer: Annotated[
        bool,
        typer.Option(
            "--single-writer", help="For a store without if-none-match that nothing else writes to."
        ),
    ] = False,
) -> None:
    """Make a dataset from a dataset: chosen rows, means of rows, differences, another dtype.

    It may be trained on and verified like any other. May be interrupted or killed at any time: the same
    command resumes, and units that have a receipt are never made again.

    Example: winnow derive data/chat data/assistant --rows '{roles: [assistant], special: false}'
    """
    with guard():
        from winnow.common.yaml_text import parse_value
        from winnow.harvester.derive.derive import derive
        from winnow.schemas.base import validate
        from winnow.schemas.config import StorageSpec
        from winnow.schemas.derived import DeriveRule
        from winnow.schemas.errors import ConfigError
        from winnow.store import ActivationStore
        from winnow.store.objects import open_store

        asked = {} if rows is None else parse_value(rows, "--rows")
        rule = validate(
            DeriveRule,
            {"rows": asked, "mean": mean.value if mean else None},
            origin="the rule (--rows, --mean)",
        )
        if not rule.regroups and minus is None and dtype is None:
            raise ConfigError("derive", expected="--rows, --mean, --minus or --dtype", got="none of them")
        storage = StorageSpec(allow_http=allow_http, single_writer=single_writer)
        plan, manifest = derive(
            ActivationStore.open(root, storage),
            open_store(out, storage),
            rule,
            minus=ActivationStore.open(minus, storage) if minus is not None else None,
            dtype=dtype.value if dtype is not None else None,
            single_writer=single_writer,
        )
        facts = _facts(out, plan, manifest)
        emit(facts, json, lambda: _show(facts))


def _facts(out: str, plan: HarvestPlan, manifest: HarvestManifest) -> dict[str, Any]:
    derived = plan.derived
    assert derived is not None
    return {
        "root": out,
        "parent": derived.parent,
        "rule": derived.words,
        "units": plan.units,
        "validation_units": plan.spec.validation_units,
        "rows": plan.rows,
        "left_out": derived.left_out,
        "bytes": manifest.bytes,
        "plan_fingerprint": plan.fingerprint,
        "dataset_sha256": manifest.dataset_sha256,
    }


def _show(facts: dict[str, Any]) -> None:
    from winnow.common.figures import human_bytes

    print_table(
        f"dataset {facts['dataset_sha256'][:12]} at {facts['root']}",
        [
            ("derived from", f"dataset {facts['parent'][:12]}"),
            ("rule", facts["rule"]),
            ("units", f"{facts['units']} ({facts['validation_units']} held out)"),
            ("rows", f"{facts['rows']:,} ({facts['left_out']:,} more fill no unit)"),
            ("stored", human_bytes(facts["bytes"])),
        ],
    )
