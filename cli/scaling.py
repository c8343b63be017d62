"""`winnow scaling`."""

from __future__ import annotations

import json as json_text
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from winnow.cli.console import emit, guard, print_table
from winnow.common.reporter import say

if TYPE_CHECKING:
    from winnow.evaluator.scaling.report import Laws, Sweep


def register(app: typer.Typer) -> None:
    """Add `scaling` to `app`."""
    app.command("scaling")(scaling_command)


def scaling_command(
    runs: Annotated[str, typer.Argument(metavar="RUNS", help="Folder or URI of a sweep (its sweep.out).")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for scaling.md, .json, .png, .svg; default beside the runs.")
    ] = None,
    bootstraps: Annotated[int, typer.Option(help="Bootstrap draws for the intervals.", min=20)] = 400,
    seed: Annotated[int, typer.Option(help="Seed of the fits' starts and of the draws.", min=0)] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Fit scaling laws to the SAEs of a sweep, and report how well they predict the largest ones.

    L(N, K) = exp(a + bk log K + bn log N + g log K log N) + exp(z + h log K), and L(C) with an irreducible
    term; robust fits in log space with bootstrap intervals. The SAEs of the largest N are held out and
    predicted from the others, and compared with the predictions of a plain power law and of the nearest SAE.
    Reports which cells have converged.

    Example: `winnow scaling runs/sweep --out docs/results`
    """
    with guard():
        from winnow.evaluator.scaling.report import as_json, fit_laws, read_sweep
        from winnow.store.objects import open_store

        store = open_store(runs)
        sweep = read_sweep(store)
        laws = fit_laws(sweep, seed=seed, bootstraps=bootstraps)
        # Before the tables: a broken pipe must not lose the fits.
        write_report(sweep, laws, runs, out)
        emit(as_json(sweep, laws), json, lambda: show(sweep, laws))


def write_report(sweep: Sweep, laws: Laws, runs: str, out: Path | None) -> None:
    """Write page, numbers and pictures to `out`, or beside the runs."""
    from winnow.evaluator.scaling.plots import draw_laws
    from winnow.evaluator.scaling.report import as_json, page
    from winnow.store.objects import open_store

    target = open_store(str(out) if out is not None else runs)
    # The page names the command that made it, without a path of this machine: it is meant to be published.
    name = runs if not Path(runs).is_absolute() else "RUNS"
    command = "winnow scaling " + shlex.quote(name) + (" --out docs/results" if out is not None else "")
    pictures = draw_laws(sweep, laws)
    files = {f"scaling.{kind}": data for kind, data in pictures.items()}
    files["scaling.json"] = json_text.dumps(as_json(sweep, laws), indent=1, sort_keys=True).encode() + b"\n"
    files["scaling.md"] = page(sweep, laws, command, "scaling").encode()
    for key, data in files.items():
        target.put(key, data)
    say(f"{', '.join(sorted(files))} in {target.uri}")


def show(sweep: Sweep, laws: Laws) -> None:
    """Print the tables."""
    from winnow.evaluator.scaling.laws import mean_error

    rows = [
        [name, f"{v['value']:.4g}", f"{v['low']:.4g} … {v['high']:.4g}"]
        for name, v in laws.joint.named().items()
    ]
    print_table(
        f"L(N, K) of {len(sweep.cells)} SAEs, rms error {laws.joint.rms:.2%}", rows, ("", "value", "95 %")
    )
    # Beside two simpler predictors: the nearest SAE needs no fit, so a law is of use only if it beats that.
    held = laws.held_out
    errors = [
        [label, f"{mean_error([getattr(each, name) for each in held]):.2%}"]
        for name, label in (
            ("joint", "the law"),
            ("plain", "a plain power law"),
            ("nearest", "the nearest SAE"),
        )
    ]
    print_table(f"error of predicting N = {held[0].cell.latents:,} from the smaller ones", errors)
    converged = sum(cell.converged for cell in sweep.cells)
    say(f"{converged} of {len(sweep.cells)} SAEs have converged (twice the tokens would help by under 2 %)")
