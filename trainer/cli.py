"""`winnow train`, and `python -m trainer`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from store.console import emit, guard, load_config, print_table, say, stderr
from trainer.loop import AfterTrain, train
from trainer.parallel import Launch
from trainer.publish import Summary

HELP = """Train a TopK sparse autoencoder on a harvested dataset.

Reads the config's `root` (the dataset) and its section `train`; writes into `train.out`:
`sae.safetensors` and `sae.json` (what `trainer.Sae.load` reads), `summary.json`, `metrics.jsonl`,
`loss.png` and `checkpoints/`.

Stop it whenever you like: the same command goes on from the newest checkpoint and ends with the very
same weights. A finished run is only shown again.

On several GPUs or machines: `torchrun --nproc-per-node 8 -m trainer CONFIG --set train.mesh.latent=4` splits
the latents over 4 ranks and the batch over 2. Another mesh may go on where this one stopped.
"""
EPILOG = "Example: `winnow train configs/quickstart.yaml --set train.k=64 --set train.out=runs/k64`"


def register(app: typer.Typer, after_train: AfterTrain | None = None) -> None:
    """Add the command `train` to an app.

    Args:
        app: The app.
        after_train: Adds the figures that need the subject model; see `trainer.loop.train`.
    """

    @app.command("train", help=HELP, epilog=EPILOG)
    def command(
        config: Annotated[Path, typer.Argument(help="YAML file with `root` and a section `train`.")],
        set_: Annotated[
            list[str] | None,
            typer.Option(
                "--set", metavar="KEY=VALUE", help="Override a field, such as `train.k=64`; repeatable."
            ),
        ] = None,
        as_json: Annotated[
            bool, typer.Option("--json", help="Print the summary as one JSON object on stdout.")
        ] = False,
    ) -> None:
        # cuBLAS needs this before its first product to give the same bits every run
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        with guard():
            settings = load_config(config, set_ or [])
            launch = launched()
            with only_the_first_tells(launch):
                summary = train(settings, after_train=after_train, launch=launch)
            if launch.rank == 0:
                emit(summary, as_json, lambda: show(summary, settings.train.out if settings.train else ""))


_TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def launched() -> Launch:
    """Which of torchrun's processes this is; alone where it was started otherwise."""
    return Launch(*(int(os.environ.get(name, alone)) for name, alone in _TORCHRUN.items()))


@contextmanager
def only_the_first_tells(launch: Launch) -> Iterator[None]:
    """Progress and notices come from one rank; errors from each."""
    before, stderr.quiet = stderr.quiet, stderr.quiet or launch.rank > 0
    try:
        yield
    finally:
        stderr.quiet = before


def make_app(after_train: AfterTrain | None = None) -> typer.Typer:
    """An app with the one command `train`."""
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    register(app, after_train)
    return app


def show(summary: Summary, out: str) -> None:
    """The table at the end of a run."""

    def figure(key: str, form: str) -> list[str]:
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
    if summary["left_out"]:
        say(
            f"left out: {', '.join(summary['left_out'])} (they need the subject model: "
            "`winnow train` with the same config adds them)"
        )
