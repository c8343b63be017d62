"""`winnow scaling RUNS`: from a sweep's folder to fits, JSON and a page.

Legend: N latents, K active latents, D d_model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from winnow.evaluator.scaling.laws import (
    COMPUTE,
    JOINT,
    PLAIN,
    Cell,
    Curve,
    Fit,
    HeldOut,
    fit,
    frontier,
    gain_of_twice_the_tokens,
    hold_out_largest,
    log_shape,
    losses,
    mean_error,
    smoothed,
)
from winnow.sae.model import CARD_KEY
from winnow.schemas.errors import ConfigError
from winnow.schemas.training import SaeCard
from winnow.store.objects import ObjectStore
from winnow.trainer.run.telemetry import METRICS_KEY

_SMOOTH_LINES = 5
"""Lines of telemetry that a curve averages over: a line is one batch, and so noisy."""
_LAST_LINES = 5
"""Lines of telemetry whose mean is the final training loss."""


class Sweep(NamedTuple):
    """Contents of a sweep's folder."""

    cells: list[Cell]
    """The SAEs, by N and K."""
    curves: list[Curve]
    """Their training curves, if they have two points or more."""
    facts: dict[str, Any]
    """What all of them have in common."""


class Laws(NamedTuple):
    """All fits of a sweep."""

    joint: Fit
    """L(N, K)."""
    plain: Fit
    """A power law of N and K without interaction and irreducible term, for comparison."""
    held_out: list[HeldOut]
    """Predictions for the SAEs of the largest N."""
    compute: dict[int, tuple[Fit | None, np.ndarray, np.ndarray, np.ndarray]]
    """K -> L(C), None if the frontier is too short, and the frontier: compute, loss, latents."""


def read_sweep(root: ObjectStore) -> Sweep:
    """Read cards and telemetry of every SAE below a folder.

    Raises:
        ConfigError: There is none, or the SAEs have different datasets, hooks or recipes.
    """
    names = sorted(key for key, _ in root.list() if key.split("/")[-1] == CARD_KEY)
    cells: list[Cell] = []
    curves: list[Curve] = []
    shared: dict[str, Any] = {}
    for name in names:
        out = root.child(name.removesuffix(f"/{CARD_KEY}")) if "/" in name else root
        card = SaeCard.from_json(out.get(CARD_KEY), origin=f"{out.uri}/{CARD_KEY}")
        if card.spec is None or card.identity is None:
            raise ConfigError(f"{out.uri} was not trained by Winnow", fix="Leave it out of the folder")
        # What a loss depends on besides N and K: a law through SAEs that differ in these would mean nothing.
        facts = {
            "d_model": card.d_model,
            "hook": card.hook,
            "normalize": card.normalize,
            "subject": card.identity.subject_model,
            "dataset": card.identity.plan_fingerprint,
            "epochs": card.spec.epochs,
            "batch_rows": card.spec.batch_rows,
        }
        differing = [key for key, value in facts.items() if shared.setdefault(key, value) != value]
        if differing:
            raise ConfigError(
                f"{out.uri} does not belong to the same sweep as the others: {', '.join(differing)}",
                expected={key: shared[key] for key in differing},
                got={key: facts[key] for key in differing},
            )
        cell, curve = _cell(card, [json.loads(line) for line in out.get(METRICS_KEY).splitlines()])
        cells.append(cell)
        curves += [curve] if len(curve.compute) > 1 else []
    cells.sort(key=lambda cell: (cell.latents, cell.k))
    if not cells:
        raise ConfigError(f"{root.uri} holds no SAEs", expected="folders with sae.json", got="none")
    return Sweep(cells, curves, shared)


def _cell(card: SaeCard, lines: Sequence[dict[str, Any]]) -> tuple[Cell, Curve]:
    assert card.spec is not None
    flop = 6 * card.latents * card.d_model
    # Only lines at the full learning rate: its decay lowers the loss at once, whatever the tokens.
    steady = [line for line in lines if line["lr"] == max(line["lr"] for line in lines)]
    tokens = np.array([line["tokens"] for line in steady], dtype=float)
    loss = np.array([line["fvu"] for line in steady], dtype=float)
    last = float(np.mean([line["fvu"] for line in lines[-_LAST_LINES:]]))
    held_out = card.metrics[f"fvu_normalised.{card.weights}"]
    cell = Cell(
        latents=card.latents,
        k=card.k,
        loss=held_out,
        compute=flop * card.metrics["tokens"],
        gain=gain_of_twice_the_tokens(tokens, loss),
        overfit=held_out / last,
    )
    # In the first lines the loss falls so fast that the running mean lags behind it.
    skip = min(_SMOOTH_LINES, len(tokens))
    return cell, Curve(card.latents, card.k, flop * tokens[skip:], smoothed(loss, _SMOOTH_LINES)[skip:])


def fit_laws(sweep: Sweep, *, seed: int = 0, bootstraps: int = 400) -> Laws:
    """Fit both laws, and predict the largest SAEs from the others."""
    cells = sweep.cells
    x, loss = log_shape(cells), losses(cells)
    compute = {}
    for k in sorted({curve.k for curve in sweep.curves}):
        edge = frontier([curve for curve in sweep.curves if curve.k == k])
        enough = len(edge[0]) > len(COMPUTE.names)
        law = (
            fit(COMPUTE, np.log(edge[0])[:, None], edge[1], seed=seed, bootstraps=bootstraps)
            if enough
            else None
        )
        compute[k] = (law, *edge)
    return Laws(
        joint=fit(JOINT, x, loss, seed=seed, bootstraps=bootstraps),
        plain=fit(PLAIN, x, loss, seed=seed, bootstraps=bootstraps),
        held_out=hold_out_largest(cells, seed=seed),
        compute=compute,
    )


def as_json(sweep: Sweep, laws: Laws) -> dict[str, Any]:
    """Return everything for a program to read."""
    held = laws.held_out
    return {
        "sweep": sweep.facts,
        "cells": [
            cell._asdict()
            | {"converged": bool(cell.converged), "law": float(value), "gain": _number(cell.gain)}
            for cell, value in zip(sweep.cells, laws.joint.predict(log_shape(sweep.cells)), strict=True)
        ],
        "law_n_k": {"parameters": laws.joint.named(), "rms_log": laws.joint.rms},
        "power_law_n_k": {"parameters": laws.plain.named(), "rms_log": laws.plain.rms},
        "held_out": {
            "latents": held[0].cell.latents,
            "mean_error": _held_out_errors(laws),
            "each": [
                {"k": h.cell.k, "loss": h.cell.loss, "joint": h.joint, "plain": h.plain, "nearest": h.nearest}
                for h in held
            ],
        },
        "law_c": {
            str(k): {
                "parameters": law.named() if law else None,
                "rms_log": law.rms if law else None,
                "frontier": [
                    {"compute": float(c), "loss": float(value), "latents": int(n)}
                    for c, value, n in zip(compute, loss, latents, strict=True)
                ],
            }
            for k, (law, compute, loss, latents) in laws.compute.items()
        },
    }


def _held_out_errors(laws: Laws) -> dict[str, float]:
    """Mean absolute error of each prediction for the SAEs that were held out."""
    return {
        name: mean_error([getattr(each, name) for each in laws.held_out])
        for name in ("joint", "plain", "nearest")
    }


def _compute_row(law: Fit | None) -> list[str]:
    if law is None:
        return ["too short", "", ""]
    b, z = law.named()["b"], law.named()["z"]
    interval = f"{b['low']:.3f} to {b['high']:.3f}"
    return [f"{b['value']:.3f} ({interval})", f"{math.exp(z['value']):.4f}", f"{law.rms:.2%}"]


def _number(value: float) -> float | None:
    # NaN is no JSON.
    return value if math.isfinite(value) else None


def page(sweep: Sweep, laws: Laws, command: str, picture: str) -> str:
    """Write the result as Markdown.

    Args:
        sweep: The SAEs.
        laws: The fits.
        command: The command that made it, to be run again.
        picture: Name of the plots beside the page, without its suffix.
    """
    facts = sweep.facts
    ns, ks = _sizes(sweep)
    return f"""# Scaling laws on {facts["subject"].rsplit("/", 1)[-1]}, {facts["hook"]}

Written by `{command}`; the numbers are in `{picture}.json` beside this page.

{len(sweep.cells)} SAEs, N from {ns[0]:,} to {ns[-1]:,}, K from {ks[0]} to {ks[-1]}, D = {facts["d_model"]},
{facts["epochs"]:g} epochs of one dataset each, batches of {
        facts["batch_rows"]:,} rows. L is the held-out FVU in the
normalised space.

{_losses_section(sweep)}
{_law_section(laws, picture)}
{_prediction_section(laws)}
{_compute_section(laws)}
{_cells_section(sweep, laws)}"""


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def _sizes(sweep: Sweep) -> tuple[list[int], list[int]]:
    """Every N and every K of the sweep, ascending."""
    ns, ks = (sorted({getattr(cell, name) for cell in sweep.cells}) for name in ("latents", "k"))
    return ns, ks


def _losses_section(sweep: Sweep) -> str:
    ns, ks = _sizes(sweep)
    by = {(cell.latents, cell.k): cell for cell in sweep.cells}
    converged = sum(cell.converged for cell in sweep.cells)

    def shown(cell: Cell | None) -> str:
        return "" if cell is None else f"{cell.loss:.4f}" + ("" if cell.converged else "*")

    return f"""## Held-out loss

{_table(["N", *(f"K = {k}" for k in ks)], [[f"{n:,}", *(shown(by.get((n, k))) for k in ks)] for n in ns])}

\\* not converged: by the slope of its training loss over the later half of the steps at constant learning
rate, twice the tokens would lower it by 2 % or more. {converged} of {len(sweep.cells)} have converged. In the
others L reflects the number of tokens as well as N and K, and the law below describes this budget, not the
limit of long training.
"""


def _law_section(laws: Laws, picture: str) -> str:
    parameters = [
        [name, f"{v['value']:.4g}", f"{v['low']:.4g} to {v['high']:.4g}"]
        for name, v in laws.joint.named().items()
    ]
    # Near its lower bound of -14 the fit has found no irreducible term, and its value means nothing.
    irreducible = laws.joint.named()["z"]["value"]
    return f"""## L(N, K)

`L = exp(a + bk log K + bn log N + g log K log N) + exp(z + h log K)`, fitted to log L; root mean square error
{laws.joint.rms:.2%} (a plain power law: {laws.plain.rms:.2%}). Intervals are 95 %, by residual bootstrap.

{_table(["", "value", "interval"], parameters)}

{"The irreducible term is not resolved: the fit needs none." if irreducible < -12 else ""}
![L(N, K)]({picture}.png)
"""


def _prediction_section(laws: Laws) -> str:
    held = laws.held_out
    errors = _held_out_errors(laws)
    better = min(errors, key=lambda name: errors[name])
    names = {"joint": "the law", "plain": "a plain power law", "nearest": "the nearest SAE"}
    rows = [
        [h.cell.k, f"{h.cell.loss:.4f}", f"{h.joint:+.1%}", f"{h.plain:+.1%}", f"{h.nearest:+.1%}"]
        for h in held
    ]
    mean = ["mean of |error|", "", *(f"{errors[name]:.1%}" for name in names)]
    return f"""## Is it predictable?

The SAEs with N = {
        held[0].cell.latents:,}, predicted from all smaller ones, as predicted over true loss, minus 1:

{_table(["K", "L", *names.values()], [*rows, mean])}

The smallest error is that of {names[better]}.
"""


def _compute_section(laws: Laws) -> str:
    compute = [[k, *_compute_row(law)] for k, (law, *_) in laws.compute.items()]
    return f"""## L(C)

For each K the smallest training loss that any N has reached at a compute C = 6 N D tokens, while the
learning rate was constant, fitted by `exp(a + b log C) + exp(z)`. Neighbouring points of a curve are not
independent, so these intervals are too narrow.

{_table(["K", "b", "irreducible loss exp(z)", "rms error"], compute)}
"""


def _cells_section(sweep: Sweep, laws: Laws) -> str:
    rows = [
        [
            f"{c.latents:,}",
            c.k,
            f"{c.loss:.4f}",
            f"{value / c.loss - 1:+.1%}",
            f"{-c.gain:+.1%}" if math.isfinite(c.gain) else "?",
            f"{c.overfit:.3f}",
        ]
        for c, value in zip(sweep.cells, laws.joint.predict(log_shape(sweep.cells)), strict=True)
    ]
    return f"""## Each SAE

{_table(["N", "K", "L", "law over L, minus 1", "twice the tokens", "held out / training"], rows)}
"""
