"""A set's own figures on text: FVU and L0 of every layer, and what the subject loses with MLPs replaced.

Letters: W windows, T positions, D width of the residual stream, L layers of the set.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from winnow.common.reporter import Progress
from winnow.evaluator.bootstrap import figure, mean_figure
from winnow.evaluator.circuits.fitting import check_set
from winnow.evaluator.circuits.held import read_paths, reading
from winnow.sae.sets import TranscoderSet
from winnow.schemas.errors import ConfigError
from winnow.schemas.evaluation import Figure
from winnow.subject.load import Subject
from winnow.subject.splice import Replacement


def set_quality(subject: Subject, set_: TranscoderSet, windows: Tensor, *, skip: int = 1) -> list[Figure]:
    """Measure a set on windows of text that it was not trained on.

    Args:
        subject: The whole subject.
        set_: A set of it.
        windows: int64 [W, T].
        skip: Leading positions that FVU and L0 leave out, whose activations are huge in many subjects. The
            subject's loss is over all positions, all of them replaced.

    Returns:
        Per layer m `set.fvu.m`, `set.l0.m` and `set.delta_ce.m` (only its MLP replaced by the set's
        prediction), then `set.delta_ce.all` (all of the range replaced) and `set.ce` (the subject's own), in
        nats per token, with intervals over windows.

    Raises:
        ConfigError: Windows of fewer than `skip + 2` positions.
        SaeMismatch: The set is of another subject.
    """
    check_set(subject, set_)
    if windows.ndim != 2 or windows.shape[1] < skip + 2:
        raise ConfigError("windows", expected=f"[W, T] with T of {skip + 2} or more", got=list(windows.shape))
    tables: dict[str, list[tuple[float, ...]]] = {}
    with Progress("set", total=len(windows), unit="windows") as progress:
        for window in windows:
            for name, values in _measure(subject, set_, window[None], skip).items():
                tables.setdefault(name, []).append(values)
            progress.advance(1)
    columns = {name: [np.array(each) for each in zip(*rows, strict=True)] for name, rows in tables.items()}
    return [
        mean_figure(f"set.{name}", *given)
        if len(given) == 1
        else figure(f"set.{name}", lambda lost, spread: lost / spread, *given)
        for name, given in columns.items()
    ]


@torch.no_grad()
def _measure(subject: Subject, set_: TranscoderSet, ids: Tensor, skip: int) -> dict[str, tuple[float, ...]]:
    """Figures of one window: numerator and denominator of FVU, one number of the others."""
    rows: dict[int, Tensor] = {}
    made: dict[int, Tensor] = {}

    def keep(layer: int) -> Replacement:
        def replace(own: Tensor) -> Tensor:
            made[layer] = own
            return own

        return replace

    def hold(layer: int, value: Tensor) -> None:
        if layer in set_.layers:
            rows[layer] = value[0].clone()

    with reading(subject, read_paths(subject, set_.of.reads), hold):
        clean = float(subject.loss(ids, {f"mlp_out.{layer}": keep(layer) for layer in set_.layers}).mean())
    codes = set_.encode(rows)
    told = set_.decode(codes, rows)
    found: dict[str, tuple[float, ...]] = {}
    for layer in set_.layers:
        y = made[layer][skip:].float()
        lost = (told[layer][skip:].float() - y).square().sum()
        found[f"fvu.{layer}"] = (float(lost), float((y - y.mean(0)).square().sum()))
        found[f"l0.{layer}"] = (float((codes[layer][0][skip:] != 0).sum(1).float().mean()),)
        one = subject.loss(ids, {f"mlp_out.{layer}": _given(told[layer])})
        found[f"delta_ce.{layer}"] = (float(one.mean()) - clean,)
    found["delta_ce.all"] = (float(_all_replaced(subject, set_, ids).mean()) - clean,)
    found["ce"] = (clean,)
    return found


def _given(rows: Tensor) -> Replacement:
    return lambda _: rows


def _all_replaced(subject: Subject, set_: TranscoderSet, ids: Tensor) -> Tensor:
    """The loss [1, T-1] with every MLP of the range replaced: each layer reads what the others have made."""
    rows: dict[int, Tensor] = {}

    def hold(layer: int, value: Tensor) -> None:
        if layer in set_.layers:
            rows[layer] = value[0].clone()

    def told(layer: int) -> Replacement:
        return lambda _: set_.decode(set_.encode(rows), rows, targets=[layer])[layer]

    replace: Mapping[str, Replacement] = {f"mlp_out.{layer}": told(layer) for layer in set_.layers}
    with reading(subject, read_paths(subject, set_.of.reads), hold):
        return subject.loss(ids, replace)
