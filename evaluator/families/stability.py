"""Family `stability`: whether other seeds find the same directions, by matched decoder cosine.

Letters: N and M latents of two dictionaries, D d_model.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from winnow.common.figures import human_bytes
from winnow.common.reporter import Progress
from winnow.evaluator.bootstrap import mean_figure
from winnow.evaluator.setting import Measured, Setting
from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError, Unmeasurable
from winnow.schemas.fit import check_same_place

_MAX_BYTES = 4 << 30
"""Largest N x M matrix of cosines that is made, in bytes, including scipy's copy."""
_CLOSE = 0.9
"""A pair above this counts as the same direction."""


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Compute the cosines [N, M] between the rows of [N, D] and [M, D]; a row of zeros has cosine 0."""
    a, b = (torch.nn.functional.normalize(rows.detach().float().cpu(), dim=1) for rows in (first, second))
    return a @ b.T


def matched_cosines(first: Tensor, second: Tensor) -> NDArray[np.float64]:
    """Match directions one to one, with the largest sum of cosines (Hungarian algorithm).

    Args:
        first: [N, D] directions.
        second: [M, D] directions.

    Returns:
        float64 [min(N, M)]: the cosine of each pair.

    Raises:
        ConfigError: The matrix of cosines would be larger than `_MAX_BYTES`.
    """
    # 12: four bytes of float32, and eight of the float64 copy that scipy makes.
    needed = len(first) * len(second) * 12
    if needed > _MAX_BYTES:
        raise Unmeasurable(
            "one-to-one matching",
            expected=f"at most {human_bytes(_MAX_BYTES)} of cosines",
            got=f"{human_bytes(needed)} for {len(first):,} x {len(second):,} latents",
            fix="Compare smaller dictionaries, or leave `stability` out",
        )
    table = cosines(first, second).numpy()
    rows, columns = linear_sum_assignment(table, maximize=True)
    return table[rows, columns].astype(np.float64)


def measure(setting: Setting) -> Measured:
    """Match this decoder with each of `spec.against`, one to one and by best cosine.

    Raises:
        ConfigError: There is no other SAE, or the dictionaries are too large to match.
        SaeMismatch: An SAE has another hook, width or subject.
    """
    others = setting.spec.against
    if not others:
        raise ConfigError(
            "evaluate.against", expected="SAEs of other seeds", got="none", fix="Give --against URI"
        )
    mine, pairs, best = setting.sae.W_dec, list[NDArray[np.float64]](), list[NDArray[np.float64]]()
    details = {}
    with Progress("stability", len(others), "SAEs") as bar:
        for uri in others:
            other = Sae.load(uri, storage=setting.storage)
            assert other.card is not None
            check_same_place(uri, other.card, setting.uri, setting.card)
            pairs.append(matched_cosines(mine, other.W_dec))
            # Beside the matching, since several latents of one SAE may split what is one latent of the other.
            best.append(cosines(mine, other.W_dec).max(1).values.double().numpy())
            details[uri] = {"matched": float(pairs[-1].mean()), "best": float(best[-1].mean())}
            bar.advance(1)
    matched, nearest = np.concatenate(pairs), np.concatenate(best)
    options = {"unit": "latents", "seed": setting.spec.seed}
    figures = [
        mean_figure("stability_matched_cosine", matched, **options),
        mean_figure("stability_matched_over_0_9", (matched > _CLOSE).astype(float), **options),
        mean_figure("stability_best_cosine", nearest, **options),
    ]
    return Measured(figures, {"against": details})
