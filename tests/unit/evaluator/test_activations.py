"""Top windows, random positives and densities equal a plain computation over everything at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from winnow.evaluator.activations import gather
from winnow.evaluator.setting import Codes

N, T, WINDOWS, SLOTS = 12, 10, 40, 3


def coded(seed: int = 0) -> list[Codes]:
    """WINDOWS x T rows in random order; some slots inactive, some rows of weight 0, ties on purpose."""
    draw = np.random.default_rng(seed)
    order = draw.permutation(WINDOWS * T)
    indices = draw.random((len(order), N)).argsort(1)[:, :SLOTS]
    values = np.maximum(draw.integers(-3, 9, indices.shape), 0).astype(np.float32)
    weights = (draw.random(len(order)) > 0.1).astype(np.float32)
    return [
        Codes(
            torch.zeros(len(part), 2),
            torch.from_numpy(weights[part]),
            order[part] // T,
            order[part] % T,
            torch.from_numpy(values[part]),
            torch.from_numpy(indices[part]),
        )
        for part in np.array_split(np.arange(len(order)), 7)
    ]


def everything(stream: list[Codes]) -> list[tuple[int, float, int, int]]:
    return [
        (int(latent), float(value), int(window), int(position))
        for codes in stream
        for weight, window, position, values, latents in zip(
            codes.weights, codes.windows, codes.positions, codes.values, codes.indices, strict=True
        )
        for value, latent in zip(values, latents, strict=True)
        if value > 0 and weight > 0
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_pass_is_exact_and_does_not_depend_on_the_chunks(seed):
    stream = coded(seed)
    found = gather(stream, N, top=5, positives=6, context=T, seed=3)
    flat = everything(stream)
    assert found.rows == sum(int((codes.weights > 0).sum()) for codes in stream)
    for latent in range(N):
        mine = [entry[1:] for entry in flat if entry[0] == latent]
        assert found.firings[latent] == len(mine)
        best: dict[int, tuple[float, int, int]] = {}
        for value, window, position in sorted(mine, key=lambda e: (-e[0], e[1], e[2])):
            best.setdefault(window, (value, window, position))
        expected = sorted(best.values(), key=lambda e: (-e[0], e[1], e[2]))[:5]
        assert found.top.of(latent) == expected
        positives = found.positives.of(latent)
        assert len(positives) == min(6, len(mine))
        assert set(positives) <= set(mine)
    whole = [
        Codes(
            *(
                torch.cat([getattr(c, n) for c in stream])
                if n not in ("windows", "positions")
                else np.concatenate([getattr(c, n) for c in stream])
                for n in Codes._fields
                if n != "targets"
            )
        )
    ]
    again = gather(whole, N, top=5, positives=6, context=T, seed=3)
    for name in ("scores", "values", "windows", "positions"):
        np.testing.assert_array_equal(getattr(found.top, name), getattr(again.top, name))
        np.testing.assert_array_equal(getattr(found.positives, name), getattr(again.positives, name))


def test_positives_are_drawn_evenly():
    stream = coded()
    flat = [entry for entry in everything(stream) if entry[0] == 0]
    times = dict.fromkeys(((w, p) for _, _, w, p in flat), 0)
    for seed in range(200):
        for _, window, position in gather(stream, N, top=0, positives=4, context=T, seed=seed).positives.of(
            0
        ):
            times[window, position] += 1
    expected = 200 * 4 / len(times)
    assert np.std(list(times.values())) < 2 * expected**0.5
    assert min(times.values()) > 0
