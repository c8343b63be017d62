"""After the last step of a transcoder set: held-out figures of every layer, the set's files, the summary.

The layers' files, then `set.json`, then `summary.json`: a run is finished once the last one exists.

Legend: B rows at a time, D width of the residual stream, L layers, l source layer, m target layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from winnow.sae.metrics import L0, Fvu
from winnow.sae.sets import hooks_of_layer, put_set_card
from winnow.schemas.layers import SetSpec, layer_folder
from winnow.schemas.training import SaeCard, SaeIdentity
from winnow.schemas.window import WindowRule
from winnow.store import ActivationStore
from winnow.store.objects import ObjectStore
from winnow.store.read.readings import none_held_out
from winnow.trainer.mesh.shard import Shard
from winnow.trainer.run.heldout import (
    CHUNK_ROWS,
    calibration_rows,
    candidate_saes,
    chunks,
    of_all_shards,
    shown,
)
from winnow.trainer.run.publish import Summary, counted, put_summary
from winnow.trainer.run.telemetry import PLOT_KEY, Telemetry, draw_curves
from winnow.trainer.run.threshold import calibrate
from winnow.trainer.run.threshold_cross import calibrate_cross
from winnow.trainer.step import SetRun

Figures = dict[str, float]


def publish_set(
    run: SetRun, telemetry: Telemetry, dataset: ActivationStore, identity: SaeIdentity, out: ObjectStore
) -> Summary:
    """Evaluate raw and averaged weights on the held-out rows, publish the better, write the summary."""
    spec, of = run.recipe.spec, run.of
    candidates = _candidates(run)
    if run.batches:
        _calibrate(run, candidates, dataset)
    found = heldout_of_set(list(candidates.values()), of, dataset)
    figures = dict(zip(candidates, found, strict=True))
    # one choice for all layers: of a cross-layer set they were trained to add up
    best = min(candidates, key=lambda name: _mean(figures[name], "fvu_normalised"))
    dead = {layer: part.dead_share_of_last_epoch for layer, part in run.layers.items()}
    facts = {"weights": best, "identity": identity, "window": WindowRule.of(dataset.plan)}
    cards: dict[int, SaeCard] = {}
    for layer, shard in candidates[best].items():
        own = {f"{key}.{n}": value for n, of_set in figures.items() for key, value in of_set[layer].items()}
        own |= {"dead_share_last_epoch": dead[layer], "tokens": float(run.counts.tokens)}
        cards[layer] = shard.save(
            out.child(layer_folder(layer)),
            **hooks_of_layer(of, layer),
            **facts,
            spec=spec.layer_spec(layer),
            metrics=own,
        )
    keys = figures[best][of.range[0]]
    metrics = {f"{key}.{n}": _mean(of_set, key) for n, of_set in figures.items() for key in keys}
    metrics |= {"dead_share_last_epoch": sum(dead.values()) / len(dead), "tokens": float(run.counts.tokens)}
    card = put_set_card(out, of, cards, **facts, spec=spec, metrics=metrics)
    summary: Summary = {
        "fvu": _mean(figures[best], "fvu_normalised"),
        "fvu_raw": _mean(figures[best], "fvu_raw"),
        "l0": _mean(figures[best], "l0"),
        "dead_share": metrics["dead_share_last_epoch"],
        **counted(run.counts),
        "auxk_steps": max(part.counts.auxk_steps for part in run.layers.values()),
        "auxk_nonfinite_steps": sum(part.counts.auxk_nonfinite for part in run.layers.values()),
        "weights": best,
        "set_sha256": card.digest(),
        "hook": spec.place,
        "layers": {str(n): figures[best][n] | {"dead_share": dead[n]} for n in of.range},
        "left_out": [],
    }
    if telemetry.records and run.world.leads:
        kind = "cross-layer set" if of.cross else "per-layer set"
        title = f"{spec.place}, {kind}: N = {spec.latents:,}, K = {spec.k}, mean FVU {summary['fvu']:.3f}"
        out.put(PLOT_KEY, draw_curves(telemetry.records, title))
    # last, because its presence says that the run is finished
    put_summary(out, summary)
    return summary


def _mean(figures: Mapping[int, Figures], key: str) -> float:
    return sum(found[key] for found in figures.values()) / len(figures)


def _candidates(run: SetRun) -> dict[str, dict[int, Shard]]:
    """Name of the weights -> layer -> the layer's latents: `raw`, and `ema` if an average is kept."""
    found: dict[str, dict[int, Shard]] = {}
    for layer, part in run.layers.items():
        for name, shard in candidate_saes(part).items():
            found.setdefault(name, {})[layer] = shard
    return found


def _calibrate(run: SetRun, candidates: Mapping[str, Mapping[int, Shard]], dataset: ActivationStore) -> None:
    """Set the threshold of every layer of every candidate, from training rows."""
    if run.of.cross:
        with run.world.together():
            joint = list(_calibration_rows(dataset, run))
        for shards in candidates.values():
            calibrate_cross(list(shards.values()), joint)
        return
    for layer, part in run.layers.items():
        with run.world.together():
            rows = calibration_rows(dataset, part.recipe.spec)
        for shards in candidates.values():
            calibrate(shards[layer], rows)


def _calibration_rows(dataset: ActivationStore, run: SetRun) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield training rows [B, D] that every layer reads, and their weights [B]."""
    read = [
        calibration_rows(dataset, part.recipe.spec, share=len(run.layers)) for part in run.layers.values()
    ]
    for parts in zip(*read, strict=True):
        # of all layers together, as in training: a row that one of them leaves out has weight 0
        weights = torch.stack([weights for _, weights in parts]).amin(0)
        yield [rows for rows, _ in parts], weights


class _Totals:
    """FVU and L0 of every layer of one set, or of this rank's part of it."""

    def __init__(self, shards: Mapping[int, Shard], of: SetSpec) -> None:
        some = next(iter(shards.values()))
        self.shards, self.of, self.world, self.width = shards, of, some.world, some.sae.d_model
        self.fvus = {layer: Fvu(self.width, some.sae.W_enc.device) for layer in of.range}
        self.l0s = {layer: L0() for layer in of.range}

    def add(self, rows: Mapping[str, Tensor], weights: Tensor) -> None:
        """Count the raw rows [B, D] of every hook, and their weights [B]."""
        predicted: dict[int, Tensor] = {}
        for layer, shard in self.shards.items():
            x = shard.sae.normalise(rows[self.of.read_hook(layer)])[0]
            values, indices = shard.select(x)
            self.l0s[layer].add(values, weights)
            given = shard.reconstruct(values, indices, x).split(self.width, dim=1)
            for target, part in zip(self.of.targets(layer), given, strict=True):
                predicted[target] = predicted[target] + part if target in predicted else part
        for layer, y_hat in predicted.items():
            target = _target(self.shards[layer], rows[self.of.target_hooks(layer)[0]], self.width)
            self.fvus[layer].add(target, y_hat, weights)

    def figures(self) -> dict[int, Figures]:
        """See `heldout_of_set`."""
        found: dict[int, Figures] = {}
        for layer in self.of.range:
            fvu, active = self.fvus[layer].value, of_all_shards(self.l0s[layer], self.world)
            found[layer] = {"fvu_normalised": fvu, "fvu_raw": fvu, "l0": active}
        return found


@torch.no_grad()
def heldout_of_set(
    candidates: Sequence[Mapping[int, Shard]], of: SetSpec, dataset: ActivationStore
) -> list[dict[int, Figures]]:
    """Measure `fvu_normalised`, `fvu_raw` and `l0` of every layer on the held-out rows of weight above 0.

    Both FVUs of layer m are of the prediction of `mlp_out.m` by all layers that write to it. They are equal:
    a target has one scale, by which error and variance are divided alike.

    Returns:
        For each set of weights, layer -> figures.

    Raises:
        IntegrityError: There is no such row, or a stored one is damaged.
        ConfigError: Rows were chosen, and none is held out.
    """
    some = next(iter(candidates[0].values()))
    device, totals = some.sae.W_enc.device, [_Totals(shards, of) for shards in candidates]
    batches = shown(_rows(dataset, of), dataset, lambda batch: len(batch[1]))
    for rows, weights in some.world.each(batches):
        moved = {hook: t.to(device) for hook, t in rows.items()}, weights.to(device)
        for total in totals:
            total.add(*moved)
    if not totals[0].fvus[of.range[0]].rows:
        raise none_held_out(dataset.reading)
    return [total.figures() for total in totals]


def _target(shard: Shard, y: Tensor, width: int) -> Tensor:
    """Raw rows [B, D] of a layer's own target, as the set is trained to predict them."""
    sae = shard.sae
    # its further targets are other layers' own: only the first columns are wanted
    whole = torch.zeros(len(y), sae.d_out, dtype=sae.W_enc.dtype, device=y.device)
    whole[:, :width] = y
    return sae.normalise_target(whole)[:, :width]


def _rows(dataset: ActivationStore, of: SetSpec) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield the rows of the validation units by hook, and their weights, in stored order."""
    units, size = dataset.plan.split_units("validation"), dataset.plan.rows_per_unit
    # rows of all 2 L hooks are in memory together
    step = max(1, CHUNK_ROWS // len(of.range))
    for first, stop in chunks(units, size, step):
        rows = {hook: torch.from_numpy(dataset.read_rows(hook, first, stop)) for hook in of.hooks}
        yield rows, torch.from_numpy(dataset.weights(list(of.hooks), first, stop))
