"""Rows whose directions are known, and how many of them an SAE has found.

The default task: D = 64, 256 random unit directions; each row is a sum of max(1, Poisson(8)) of them, drawn
without repeats with Zipf weights (exponent 1.0) and with coefficients uniform in [0.5, 1.5], plus a constant
bias of norm 1 and Gaussian noise of standard deviation 0.01 per dimension.

Legend: B rows, D width, F true directions, N latents.
"""

# NumPy and SciPy only: other libraries' trainers get the same rows, whatever torch they bring along.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

BLOCK_ROWS = 8192
"""Rows that are drawn from one key, so that any block can be made without those before it."""
FOUND = 0.9
"""A direction counts as found if its matched cosine is above this."""
Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Task:
    """A sparse mixture of known directions. Equal tasks give equal rows on every machine."""

    d_model: int = 64
    directions: int = 256
    active: float = 8.0
    """Mean of the Poisson distribution of the number of directions per row, which is at least one."""
    zipf: float = 1.0
    """Exponent of the weights by which directions are drawn: the n-th has weight n^-zipf."""
    low: float = 0.5
    """Smallest coefficient."""
    high: float = 1.5
    """Largest coefficient; they are uniform in between."""
    bias_norm: float = 1.0
    """Norm of the bias that is added to every row."""
    noise: float = 0.01
    """Standard deviation of the noise, per dimension."""
    rows: int = 1_000_000
    """Rows of the task."""
    seed: int = 0
    """Seed of everything above."""

    @cached_property
    def truth(self) -> Rows:
        """The unit directions [F, D], the most frequent first."""
        rows = np.random.default_rng([self.seed, 0]).standard_normal((self.directions, self.d_model))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    @cached_property
    def bias(self) -> Rows:
        """The bias [D]."""
        row = np.random.default_rng([self.seed, 1]).standard_normal(self.d_model)
        return (self.bias_norm * row / np.linalg.norm(row)).astype(np.float32)

    def block(self, number: int) -> tuple[Rows, Rows]:
        """Draw the rows [B, D] of one block (BLOCK_ROWS, or fewer in the last) and coefficients [B, F]."""
        draw = np.random.default_rng([self.seed, 2, number])
        count = min(BLOCK_ROWS, self.rows - number * BLOCK_ROWS)
        # The n smallest of exponentials divided by weights are n draws without repeats, in proportion to
        # them: no loop over rows, each of which draws another number.
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
        """Yield batches [batch_rows, D] of the rows in order, each row once; a short last one is dropped."""
        held = np.empty((0, self.d_model), np.float32)
        for number in range(-(-self.rows // BLOCK_ROWS)):
            held = np.concatenate([held, self.block(number)[0]])
            for _ in range(len(held) // batch_rows):
                # A copy: a view could be changed by whoever trains on it, and would keep a whole block alive.
                yield held[:batch_rows].copy()
                held = held[batch_rows:]


def measure_recovery(W_dec: NDArray[np.floating], truth: Rows) -> dict[str, float]:
    """Measure how well decoder rows [N, D] match the true directions [F, D].

    Returns:
        `matched_cosine`: the mean over the true directions of the cosine with their latent, matched one to
        one with the largest sum (Hungarian algorithm); with N < F the directions without a latent count 0.
        `found`: the share of the directions matched above FOUND. `max_cosine`: the mean of each direction's
        largest cosine with any latent.
    """
    # Other trainers do not all keep unit rows, and a dead latent may have a row of zeros.
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
