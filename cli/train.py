"""`winnow train`, and `python -m winnow.trainer`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from winnow.cli.console import (
    LOOPBACK,
    MetricsHost,
    MetricsPort,
    emit,
    guard,
    print_table,
    serving_metrics_if,
)
from winnow.common.figures import count_of, human_bytes
from winnow.common.reporter import say
from winnow.common.signals import interrupted_by_signals

if TYPE_CHECKING:
    from winnow.schemas.training import TrainSpec
    from winnow.trainer.run.loop import AfterTrain
    from winnow.trainer.run.publish import Summary

HELP = """Train a TopK sparse autoencoder on a harvested dataset.

Reads the config's `root` (the dataset) and its section `train`; writes to `train.out`: `sae.safetensors` and
`sae.json` (read by `winnow.Sae.load`), `summary.json`, `metrics.jsonl`, `loss.png` and `checkpoints/`.

Relative paths in a config are relative to the working directory, not to the config's folder.

May be interrupted at any time: the same command resumes from the newest checkpoint and ends with exactly the
same weights. A finished run is only shown again.

On several GPUs or machines: `torchrun --nproc-per-node 8 -m winnow.trainer CONFIG --set train.mesh.latent=4`
splits the latents over 4 ranks and the batch over 2. The run may resume on another mesh.
"""
EPILOG = "Example: `winnow train configs/quickstart.yaml --set train.k=64 --set train.out=runs/k64`"

SWEEP_HELP = """Train a grid of TopK sparse autoencoders from one read of a dataset.

Reads the config's `root`, its section `train` (the base) and its section `sweep` (`out`, and a `grid` of
fields of `train`). Each SAE has its own folder below `sweep.out`, with the same results as `winnow train`.
May be interrupted like `winnow train`: the same command resumes, and skips finished SAEs.
"""
SWEEP_EPILOG = "Example: `winnow sweep configs/sweep.yaml --set sweep.grid.k=[8,16]`"


def register(app: typer.Typer) -> None:
    """Add the commands `train` and `sweep` to an app."""
    register_train(app)
    register_sweep(app)


def register_train(app: typer.Typer, *, subject_figures: bool = True) -> None:
    """Add the command `train` to an app.

    Args:
        app: The app.
        subject_figures: Add the figures that need the subject model, and the evaluator with it.
    """

    @app.command("train", help=HELP, epilog=EPILOG)
    def command(
        config: Annotated[
            Path, typer.Argument(metavar="CONFIG", help="YAML file with `root` and a section `train`.")
        ],
        set_: Annotated[
            list[str] | None,
            typer.Option(
                "--set",
                metavar="KEY=VALUE",
                help="Override a field, such as `train.k=64`; repeatable, the last of a field wins.",
            ),
        ] = None,
        as_json: Annotated[
            bool, typer.Option("--json", help="Print the summary as one JSON object on stdout.")
        ] = False,
        extend: Annotated[
            bool,
            typer.Option(
                "--extend",
                help="Continue the run in `out` up to a larger `epochs`. The learning rate becomes that of "
                "the new schedule: after a decay it rises again.",
            ),
        ] = False,
        figures: Annotated[
            bool,
            typer.Option(
                "--subject-figures/--no-subject-figures",
                help="Also run the subject model after training, for delta CE. Run again without the option, "
                "the same command adds these figures. `python -m winnow.trainer` never measures them.",
            ),
        ] = True,
        metrics_port: MetricsPort = None,
        metrics_host: MetricsHost = LOOPBACK,
    ) -> None:
        # Before torch is imported: cuBLAS reads it at its first product and needs it to give the same bits in
        # every run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        with guard(), interrupted_by_signals():
            from winnow.common.config_file import load_config

            settings = load_config(config, set_ or [])
            # After the config is read: a mistake in it is told at once.
            from winnow.trainer.mesh.world import launch_of, only_the_first_tells
            from winnow.trainer.run.loop import train

            launch = launch_of(os.environ)
            after_train = _measure_in_subject() if subject_figures and figures else None
            # The ranks of one machine share its ports, and the first one's figures are the run's.
            port = metrics_port if launch.rank == 0 else None
            # torchrun merges the ranks' output: each line would come once per rank, and --json print several
            # objects.
            with only_the_first_tells(launch), serving_metrics_if(port, metrics_host):
                summary = train(settings, after_train=after_train, extend=extend, launch=launch)
            if launch.rank == 0:
                emit(summary, as_json, lambda: show(summary, settings.train.out if settings.train else ""))


def register_sweep(app: typer.Typer) -> None:
    """Add the command `sweep` to an app."""

    @app.command("sweep", help=SWEEP_HELP, epilog=SWEEP_EPILOG)
    def command(
        config: Annotated[
            Path, typer.Argument(metavar="CONFIG", help="YAML file with `root`, `train` and `sweep`.")
        ],
        set_: Annotated[
            list[str] | None,
            typer.Option(
                "--set", metavar="KEY=VALUE", help="Override a field; repeatable, the last of a field wins."
            ),
        ] = None,
        as_json: Annotated[
            bool, typer.Option("--json", help="Print the summaries as one JSON object on stdout.")
        ] = False,
        subject_figures: Annotated[
            # Off, unlike in `train`: they cost a pass of the subject over held-out windows per SAE.
            bool, typer.Option("--subject-figures", help="Also run the subject model for each SAE.")
        ] = False,
        metrics_port: MetricsPort = None,
        metrics_host: MetricsHost = LOOPBACK,
    ) -> None:
        # As in `train`: each SAE must get the bits that `train` alone would give it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        with guard(), interrupted_by_signals():
            from winnow.common.config_file import load_config
            from winnow.trainer.plan.grid import grid_specs

            settings = load_config(config, set_ or [])
            specs = grid_specs(settings)
            # As in `train`, after the config is read.
            from winnow.store.read.joined import open_roots
            from winnow.trainer.plan.sweep import require_room
            from winnow.trainer.run.loop import train_fleet

            # One read serves the whole grid, so the first spec says how to follow a harvest.
            dataset = open_roots(
                settings.root,
                specs[0].roots,
                settings.storage,
                follow=specs[0].follow,
                timeout_seconds=specs[0].follow_seconds,
            )
            # Before the first step: all SAEs train at once, and a lack of memory would end every one.
            need = require_room(specs, dataset)
            say(f"{count_of(len(specs), 'SAE')}: {human_bytes(need)} of memory")
            after_train = _measure_in_subject() if subject_figures else None
            with serving_metrics_if(metrics_port, metrics_host):
                summaries = train_fleet(settings, specs, after_train=after_train)
            found = {spec.out: summary for spec, summary in zip(specs, summaries, strict=True)}
            emit(found, as_json, lambda: show_sweep(found, specs))


def show_sweep(found: dict[str, Summary], specs: Sequence[TrainSpec]) -> None:
    """Print one row per SAE of a sweep."""
    rows = [
        [
            spec.out,
            f"{spec.latents:,}",
            spec.k,
            f"{found[spec.out]['fvu']:.4f}",
            f"{found[spec.out]['l0']:.1f}",
            f"{found[spec.out]['dead_share']:.1%}",
        ]
        for spec in specs
    ]
    print_table("sweep", rows, ("SAE", "latents", "k", "FVU", "L0", "dead"))


def make_app() -> typer.Typer:
    """Return an app whose only command is `train`, without the figures that need the subject model."""
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    register_train(app, subject_figures=False)
    return app


def _measure_in_subject() -> AfterTrain:
    from winnow.evaluator.heldout import measure_in_subject

    return measure_in_subject


def show(summary: Summary, out: str) -> None:
    """Print the table at the end of a run."""

    def figure(key: str, form: str) -> list[str]:
        # Which figures there are depends on held-out units and on the subject: what was not measured gets no
        # row.
        return [format(summary[key], form)] if key in summary else []

    def row(label: str, key: str, form: str, note: str = "") -> list[list[Any]]:
        return [[label, value + note] for value in figure(key, form)]

    interval = "".join(
        f"  [{low} … {high}]"
        for low in figure("delta_ce_low", ".4f")
        for high in figure("delta_ce_high", ".4f")
    )
    rows = [
        *row("FVU, held out (normalised space)", "fvu", ".4f"),
        *row("FVU, held out (raw space)", "fvu_raw", ".4f"),
        *row("L0, held out", "l0", ".2f"),
        *row("dead latents over the last epoch", "dead_share", ".2%"),
        *row("delta CE, nats", "delta_ce", ".4f", interval),
        *row("loss recovered, against zero-ablation", "loss_recovered_zero", ".4f"),
        *row("loss recovered, against mean-ablation", "loss_recovered_mean", ".4f"),
        *row("weights exported", "weights", ""),
        *row("tokens trained on", "tokens", ",d"),
        *row("training, tokens/s", "train_tokens_per_s", ",.0f"),
        *row("waiting for data, s", "seconds_waiting_for_data", ".1f"),
        *row("harvest, tokens/s", "harvest_tokens_per_s", ",.0f"),
    ]
    print_table(f"{summary['hook']} → {out}", rows)
    # Said, since the same config gives a longer table under `winnow train`.
    if summary["left_out"]:
        say(
            f"left out: {', '.join(summary['left_out'])} (they need the subject model: "
            "`winnow train` with the same config adds them)"
        )
