"""The figures of a transcoder set: of each layer's MLP, and of all of them together.

Letters: W windows in a batch, T context length, B rows (W*T), D width of the residual stream, l the layer
whose latents read, m the layer whose MLP is predicted.

The id of a layer's figure ends in its number: `fvu_raw.3`. Without a number it is of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from winnow.common.reporter import Progress
from winnow.evaluator.bootstrap import figure, mean_figure
from winnow.evaluator.families.downstream import Reached, costs, figures_of, joined
from winnow.evaluator.families.reconstruction import WindowSums
from winnow.evaluator.kept_losses import KeptLosses, Losses
from winnow.evaluator.set_setting import SetRows, SetSetting
from winnow.evaluator.setting import Measured
from winnow.sae.metrics import L0, Fvu
from winnow.sae.sets import TranscoderSet
from winnow.schemas.evaluation import Figure
from winnow.schemas.layers import WRITES
from winnow.store import ActivationStore
from winnow.store.read.readings import none_held_out
from winnow.subject.load import Subject
from winnow.subject.splice import Replacement

_SPACES = ("fvu_normalised", "fvu_raw")


class _Layer:
    """What is summed of one layer: the fit of its MLP's output, and the activity of its latents."""

    def __init__(self, windows: int, width: int, latents: int, device: torch.device) -> None:
        self.fvu = {name: Fvu(width, device) for name in _SPACES}
        self.sums = {name: WindowSums(windows, width) for name in _SPACES}
        self.l0, self.active, self.rows = L0(), np.zeros(windows), np.zeros(windows)
        self.firings = torch.zeros(latents, dtype=torch.int64, device=device)


def reconstruction(setting: SetSetting) -> Measured:
    """Measure FVU of every layer's MLP output, L0 and dead shares on the stored rows.

    Raises:
        IntegrityError: There is no row of weight above 0, or a stored one is damaged.
        ConfigError: Rows were chosen, and none is held out.
    """
    whole, count, seed = setting.whole, len(setting.windows), setting.spec.seed
    layers = {
        layer: _Layer(count, whole.d_model, whole[layer].latents, setting.device) for layer in whole.layers
    }
    total = count * setting.dataset.plan.rows_per_window
    with torch.no_grad(), Progress("reconstruction", total, "rows") as bar:
        for rows in setting.held_out_rows():
            _add(whole, layers, rows)
            bar.advance(len(rows.windows))
    first = layers[whole.layers.start]
    used = first.rows > 0
    if not used.any():
        raise none_held_out(setting.dataset.reading)
    figures = [
        figure(
            name,
            lambda error, spread: error / spread,
            np.sum([layer.sums[name].error for layer in layers.values()], axis=0)[used],
            np.sum([layer.sums[name].spread for layer in layers.values()], axis=0)[used],
            seed=seed,
        )
        for name in _SPACES
    ]
    active = np.sum([layer.active for layer in layers.values()], axis=0)
    figures.append(figure("l0", lambda a, n: a / n, active[used], first.rows[used], seed=seed))
    firings = {number: layer.firings.cpu().numpy() for number, layer in layers.items()}
    seen = int(first.rows.sum())
    figures.append(_dead("dead_share", np.concatenate(list(firings.values())), seen))
    for number, layer in layers.items():
        figures += [layer.sums[name].figure(f"{name}.{number}", layer.fvu[name], seed) for name in _SPACES]
        made = figure(f"l0.{number}", lambda a, n: a / n, layer.active[used], layer.rows[used], seed=seed)
        figures.append(made.model_copy(update={"value": layer.l0.value}))
        figures.append(_dead(f"dead_share.{number}", firings[number], seen))
    return Measured(figures, {"rows": seen, "rows_left_out": total - seen})


def _add(whole: TranscoderSet, layers: dict[int, _Layer], rows: SetRows) -> None:
    """Add some rows to the sums of every layer."""
    codes = whole.encode(rows.reads)
    given = whole.decode(codes, rows.reads)
    own = slice(0, whole.d_model)
    for number, layer in layers.items():
        sae, (values, indices), true = whole[number], codes[number], rows.targets[number]
        guess = given[number]
        layer.fvu["fvu_raw"].add(true, guess)
        layer.sums["fvu_raw"].add(true, guess, rows.windows)
        # By the constants of the layer's own transcoder: only it holds the mean of its target.
        if sae.parts.target_normalize == "dataset":
            norm = sae.target_norm[own] if sae.target_norm.ndim else sae.target_norm
            true, guess = ((one - sae.target_mean[own]) / norm for one in (true, guess))
        layer.fvu["fvu_normalised"].add(true, guess)
        layer.sums["fvu_normalised"].add(true, guess, rows.windows)
        layer.l0.add(values)
        np.add.at(layer.active, rows.windows, (values > 0).sum(1).cpu().numpy())
        np.add.at(layer.rows, rows.windows, 1.0)
        layer.firings += torch.bincount(indices[values > 0], minlength=sae.latents)


def _dead(id: str, firings: np.ndarray, rows: int) -> Figure:
    """The share of silent latents, as a figure."""
    note = f"silent on all {rows:,} held-out rows: a count, no sample"
    value = float((firings == 0).mean())
    return Figure(id=id, value=value, samples=len(firings), unit="latents", note=note)


# ---- in the subject ------------------------------------------------------------------------------


def downstream(setting: SetSetting, kept: KeptLosses | None = None) -> Measured:
    """Run the subject with each MLP replaced alone, and with all of them replaced at once.

    `kept` has the losses of the windows that an earlier call measured, and gets those of this one.
    """
    losses = set_losses(
        setting.subject,
        setting.whole,
        setting.dataset,
        setting.windows,
        batch_windows=setting.spec.batch_windows,
        kept=kept,
    )
    reached = Reached.of(setting.dataset, setting.hooks, setting.windows)
    figures = figures_of(losses, reached, setting.spec.seed)
    clean = losses["clean"]
    for layer in setting.whole.layers:
        for name, values in (("delta_ce", losses[f"{layer}"] - clean), ("kl", losses[f"kl.{layer}"])):
            made = mean_figure(
                f"{name}.{layer}", values[reached.windows], seed=setting.spec.seed, note=reached.note
            )
            figures.append(made)
    return Measured(figures, {"mean_nats": {name: float(each.mean()) for name, each in losses.items()}})


def set_losses(
    subject: Subject,
    whole: TranscoderSet,
    store: ActivationStore,
    windows: Sequence[int],
    *,
    batch_windows: int = 4,
    alone: bool = True,
    kept: KeptLosses | None = None,
) -> Losses:
    """Compute the mean cross-entropy of each window, clean and with MLPs replaced, and the KL from clean.

    One MLP is replaced by what the set predicts from the clean pass. All of them are replaced in one pass, in
    the order of the layers: a layer then reads the stream as the earlier replacements left it.

    Args:
        subject: The whole subject.
        whole: The set, whose card or hooks name what it reads.
        store: The dataset, for tokens, sinks and means.
        windows: Numbers of windows of the dataset.
        batch_windows: Windows per pass.
        alone: Also replace each MLP by itself, one pass per layer.
        kept: Has the losses of the first windows, if an earlier call was stopped, and gets those of this one.

    Returns:
        `clean`, `sae` (all replaced), `zero` and `mean` (all replaced by zeros, by the training rows' means)
        and, if `alone`, each layer's number; and `kl.` + each name but `clean` -> [len(windows)] nats.
    """
    begun = kept.begun(len(windows), "downstream") if kept is not None else {}
    out = {name: [torch.from_numpy(values)] for name, values in begun.items()}
    done = len(begun["clean"]) if begun else 0
    outputs = {layer: f"{WRITES}.{layer}" for layer in whole.layers}
    means = {m: torch.from_numpy(store.mean(hook)).to(subject.device) for m, hook in outputs.items()}
    with torch.no_grad(), Progress("downstream", len(windows), "windows", done) as bar:
        for first in range(done, len(windows), batch_windows):
            batch = windows[first : first + batch_windows]
            tokens = np.stack([store.tokens(window) for window in batch])
            ids = torch.from_numpy(tokens.astype(np.int64)).to(subject.device)
            # One mask for all variants, as in `downstream`: all leave the same positions clean.
            weights = torch.from_numpy(store.window_weights(list(whole.of.hooks), batch) > 0)
            chosen = weights.reshape(-1, 1).to(subject.device)
            told = store.positions(batch)
            clean = subject.logits(tokens, positions=told)
            out.setdefault("clean", []).append(costs(clean, ids)[0])
            variants = {
                "sae": _all_replaced(whole, chosen),
                "zero": {hook: _put(chosen, torch.zeros(1)) for hook in outputs.values()},
                "mean": {hook: _put(chosen, means[m]) for m, hook in outputs.items()},
            }
            if alone:
                given = _predicted(subject, whole, tokens, told)
                variants |= {f"{m}": {hook: _put(chosen, given[m])} for m, hook in outputs.items()}
            for name, replace in variants.items():
                loss, kl = costs(subject.logits(tokens, replace, positions=told), ids, clean)
                assert kl is not None
                out.setdefault(name, []).append(loss)
                out.setdefault(f"kl.{name}", []).append(kl)
            bar.advance(len(batch))
            if kept is not None:
                kept.write(lambda: joined(out))
    return joined(out)


def _predicted(
    subject: Subject, whole: TranscoderSet, tokens: np.ndarray, positions: np.ndarray | None
) -> dict[int, Tensor]:
    """What the set predicts of every layer's MLP [B, D], from a clean pass."""
    hooks = [whole.of.read_hook(layer) for layer in whole.layers]
    found = subject.activations(tokens, hooks, positions=positions)
    return whole({layer: _read(whole, layer, found[whole.of.read_hook(layer)]) for layer in whole.layers})


def _read(whole: TranscoderSet, layer: int, rows: Tensor) -> Tensor:
    """Rows on the device of a layer's transcoder, float32 [B, D]."""
    return rows.flatten(0, -2).to(whole[layer].W_dec.device, torch.float32)


def _put(chosen: Tensor, rows: Tensor) -> Replacement:
    """The replacement by `rows` (broadcast to [B, D]) where `chosen` [B, 1] is true."""
    return lambda x: torch.where(chosen.to(x.device), rows.to(x.device, x.dtype), x)


def _all_replaced(whole: TranscoderSet, chosen: Tensor) -> dict[str, Replacement]:
    """The replacements of one pass in which every layer reads the stream and every MLP is predicted."""
    # Layer m -> what the layers read so far predict of its MLP: a later one never writes to an earlier one.
    waiting: dict[int, Tensor] = {}

    def read(layer: int) -> Replacement:
        def keep(x: Tensor) -> Tensor:
            rows = {layer: _read(whole, layer, x)}
            for target, part in whole.decode(whole.encode(rows), rows).items():
                waiting[target] = waiting[target] + part if target in waiting else part
            return x

        return keep

    def write(layer: int) -> Replacement:
        return lambda x: _put(chosen, waiting.pop(layer))(x)

    reads = {whole.of.read_hook(layer): read(layer) for layer in whole.layers}
    return reads | {f"{WRITES}.{layer}": write(layer) for layer in whole.layers}
