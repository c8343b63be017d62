"""Rows whose directions are known, and how many of them an SAE has found. NumPy and SciPy only.

The default task (EVALUATION's `recovery`): D = 64, 256 unit directions at random, each row a sum of
max(1, Poisson(8)) of them, drawn without repeats with Zipf weights (exponent 1.0), coefficients uniform in
[0.5, 1.5], a constant bias of norm 1, Gaussian noise of standard deviation 0.01 per dimension.

Legend: B rows, D width, F true directions, N latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

BLOCK_ROWS = 8192
"""Rows drawn from one key, so that any row is found without those before it."""
FOUND = 0.9
"""A direction counts as found where its matched cosine is above this."""
Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Task:
    """A sparse mixture; equal tasks give equal rows everywhere."""

    d_model: int = 64
    directions: int = 256
    active: float = 8.0
    """Mean of the Poisson number of directions a row, which is at least one."""
    zipf: float = 1.0
    low: float = 0.5
    high: float = 1.5
    """Coefficients are uniform between the two."""
    bias_norm: float = 1.0
    noise: float = 0.01
    """Standard deviation for each dimension."""
    rows: int = 1_000_000
    seed: int = 0

    @cached_property
    def truth(self) -> Rows:
        """The unit directions [F, D], the most frequent first."""
        rows = np.random.default_rng([self.seed, 0]).standard_normal((self.directions, self.d_model))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    @cached_property
    def bias(self) -> Rows:
        """[D]."""
        row = np.random.default_rng([self.seed, 1]).standard_normal(self.d_model)
        return (self.bias_norm * row / np.linalg.norm(row)).astype(np.float32)

    def block(self, number: int) -> tuple[Rows, Rows]:
        """Rows [B, D] of one block of BLOCK_ROWS (the last is shorter), and their coefficients [B, F]."""
        draw = np.random.default_rng([self.seed, 2, number])
        count = min(BLOCK_ROWS, self.rows - number * BLOCK_ROWS)
        # the n smallest of exponentials over their weights: n draws without repeats, in proportion
        rank = np.arange(1, self.directions + 1, dtype=np.float32)
        keys = draw.standard_exponential((count, self.directions), dtype=np.float32) * rank**self.zipf
        wanted = np.minimum(np.maximum(draw.poisson(self.active, count), 1), self.directions)
        edge = np.sort(keys, axis=1)[np.arange(count), wanted - 1]
        coefficients = draw.uniform(self.low, self.high, keys.shape).astype(np.float32)
        coefficients *= keys <= edge[:, None]
        rows = coefficients @ self.truth + self.bias
        rows += self.noise * draw.standard_normal(rows.shape, dtype=np.float32)
        return rows, coefficients

    def batches(self, batch_rows: int) -> Iterator[Rows]:
        """Rows [batch_rows, D] in order, each once; a short rest is left out."""
        held = np.empty((0, self.d_model), np.float32)
        for number in range(-(-self.rows // BLOCK_ROWS)):
            held = np.concatenate([held, self.block(number)[0]])
            for _ in range(len(held) // batch_rows):
                yield held[:batch_rows].copy()
                held = held[batch_rows:]


def recovery(W_dec: NDArray[np.floating], truth: Rows) -> dict[str, float]:
    """How well decoder rows [N, D] match the true directions [F, D].

    Returns:
        `matched_cosine`: the mean over the true directions of the cosine with the latent matched to it,
        one to one, the assignment that makes the sum largest (Hungarian); with N < F the directions
        without a latent count 0. `found`: the share of the directions matched above FOUND.
        `max_cosine`: the mean of each direction's largest cosine with any latent.
    """
    norms = np.linalg.norm(W_dec, axis=1, keepdims=True)
    cosines = truth @ (W_dec / np.maximum(norms, 1e-12)).T
    matched = np.zeros(len(truth))
    direction, latent = linear_sum_assignment(cosines, maximize=True)
    matched[direction] = cosines[direction, latent]
    return {
        "matched_cosine": float(matched.mean()),
        "found": float((matched > FOUND).mean()),
        "max_cosine": float(cosines.max(1).mean()),
    }
