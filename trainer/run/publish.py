"""After the last step: the better of two sets of weights, the SAE's files, the picture, the summary.

`sae.safetensors`, then `sae.json`, then `summary.json`: a run is finished once the last one exists,
and a run killed in between publishes the same bytes again from its last checkpoint.
"""

from __future__ import annotations

import json
from typing import Any

from winnow.sae.model import CARD_KEY
from winnow.sae.sets import SET_KEY
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.sets import SetCard
from winnow.schemas.training import SaeCard, SaeIdentity, TrainSpec
from winnow.schemas.window import WindowRule
from winnow.store import ActivationStore
from winnow.store.objects import ObjectStore
from winnow.trainer.run.checkpoint import require_same_run
from winnow.trainer.run.heldout import calibration_rows, candidate_saes, heldout_figures
from winnow.trainer.run.start import planned_as
from winnow.trainer.run.telemetry import PLOT_KEY, Telemetry, draw_curves
from winnow.trainer.run.threshold import calibrate
from winnow.trainer.step import Counts, Run

SUMMARY_KEY = "summary.json"
_LEFT_OUT = ("delta_ce", "loss_recovered_zero", "loss_recovered_mean")
"""Figures that need the subject model and are therefore added by the evaluator."""

Summary = dict[str, Any]


def publish(
    run: Run, telemetry: Telemetry, dataset: ActivationStore, identity: SaeIdentity, out: ObjectStore
) -> Summary:
    """Evaluate raw and averaged weights on the held-out rows, publish the better, write the summary."""
    spec, counts = run.recipe.spec, run.counts
    saes = candidate_saes(run)
    if run.batches:
        with run.world.together():
            rows = calibration_rows(dataset, spec)
        # before the figures: both are measured with the threshold that would be exported with them
        for shard in saes.values():
            calibrate(shard, rows)
    found = heldout_figures(list(saes.values()), dataset, *spec.input_hooks, target=spec.target_hook)
    figures = dict(zip(saes, found, strict=True))
    # which is better depends on the run's length: on one of 700 steps a beta of 0.999 cost 0.06 of FVU.
    # Of equals `min` takes the first, the raw weights
    best = min(saes, key=lambda name: figures[name]["fvu_normalised"])
    dead_share = run.dead_share_of_last_epoch

    metrics = {f"{key}.{name}": value for name, values in figures.items() for key, value in values.items()}
    metrics |= {"dead_share_last_epoch": dead_share, "tokens": float(counts.tokens)}
    card = saes[best].save(
        out,
        hook=spec.hook,
        target_hook=spec.target_hook,
        with_hooks=spec.with_hooks,
        weights=best,
        identity=identity,
        window=WindowRule.of(dataset.plan),
        spec=spec,
        metrics=metrics,
    )
    summary: Summary = {
        "fvu": figures[best]["fvu_normalised"],
        "fvu_raw": figures[best]["fvu_raw"],
        "l0": figures[best]["l0"],
        "dead_share": dead_share,
        **counted(counts),
        "weights": best,
        "sae_sha256": card.weights_sha256,
        "hook": spec.target_hook or "+".join(spec.input_hooks),
        "left_out": list(_LEFT_OUT),
    }
    if telemetry.records and run.world.leads:
        title = f"{spec.hook}: N = {spec.latents:,}, K = {spec.k}, held-out FVU {summary['fvu']:.3f}"
        out.put(PLOT_KEY, draw_curves(telemetry.records, title))
    # last, because its presence says that the run is finished
    put_summary(out, summary)
    return summary


def counted(counts: Counts) -> Summary:
    """What a summary says of a run's length and speed."""
    return {
        "tokens": counts.tokens,
        "steps": counts.step,
        "train_tokens_per_s": counts.tokens / counts.seconds if counts.seconds else 0.0,
        "seconds_training": counts.seconds,
        "seconds_waiting_for_data": counts.seconds_waiting,
        "auxk_steps": counts.auxk_steps,
        "auxk_nonfinite_steps": counts.auxk_nonfinite,
    }


def put_summary(out: ObjectStore, summary: Summary) -> None:
    """Write `summary.json`, replacing an earlier one."""
    out.put(SUMMARY_KEY, json.dumps(summary, indent=1, sort_keys=True).encode() + b"\n")


def finished_summary(
    out: ObjectStore, spec: TrainSpec, identity: SaeIdentity, *, extend: bool = False
) -> Summary | None:
    """Read the summary of the run in `out`; None if the run is not finished.

    With `extend`, a run of fewer epochs is not finished.

    Raises:
        ConfigError: `out` holds a finished run of another spec or dataset.
        IntegrityError: Its card or summary is damaged.
    """
    key, kind = (CARD_KEY, SaeCard) if spec.set is None else (SET_KEY, SetCard)
    if out.size(key) is None or out.size(SUMMARY_KEY) is None:
        return None
    card = kind.from_json(out.get(key), origin=f"{out.uri}/{key}")
    if card.spec is None or card.identity is None:
        raise ConfigError(
            f"{out.uri} holds an SAE that was not trained there", fix="Train into another `out`"
        )
    require_same_run(planned_as(card.spec, spec, extend), card.identity, spec, identity)
    if spec.epochs > card.spec.epochs:
        return None
    try:
        summary = json.loads(out.get(SUMMARY_KEY))
        # a summary without the list cannot say what is missing: it is made again
        return summary if isinstance(summary["left_out"], list) else None
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{out.uri}/{SUMMARY_KEY} is not a summary", fix="Delete it and run the same command again"
        ) from error
