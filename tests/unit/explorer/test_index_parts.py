"""The pure parts of the index: blocks and their merge, figures, choices, nearest directions, token texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.tiny import make_tokenizer
from winnow.explorer.index.blocks import Block, firing_counts, merge, transposed
from winnow.explorer.index.directions import nearest, token_texts, unit_rows
from winnow.explorer.index.latents import TOP_BAND, choose, figures
from winnow.schemas.features import IndexSpec

ROWS, LATENTS = 12, 7


def block_of(dense: np.ndarray) -> Block:
    """A block of codes [R, N], its entries given in a random order."""
    row, latent = np.nonzero(dense)
    order = np.random.default_rng(0).permutation(len(row))
    row, latent = row[order].astype(np.uint32), latent[order].astype(np.uint32)
    arrays = transposed(row, latent, dense[row, latent], rows=ROWS, latents=LATENTS)
    none = np.zeros((0, 0), np.uint32)
    return Block(**arrays, tokens=none, read=none.astype(bool))


@pytest.fixture
def dense() -> np.ndarray:
    draw = np.random.default_rng(1)
    return (draw.random((3, ROWS, LATENTS)) * (draw.random((3, ROWS, LATENTS)) < 0.3)).astype(np.float32)


def test_merged_pieces_are_every_entry_of_each_latent_by_row(dense):
    blocks = [block_of(each) for each in dense]
    whole = dense.reshape(-1, LATENTS)
    for first, stop in ((0, LATENTS), (2, 5), (6, 7)):
        start, row, value = merge(blocks, first, stop)
        for i, latent in enumerate(range(first, stop)):
            mine = slice(start[i], start[i + 1])
            np.testing.assert_array_equal(row[mine], np.flatnonzero(whole[:, latent]))
            np.testing.assert_array_equal(value[mine], whole[row[mine], latent])
    np.testing.assert_array_equal(firing_counts(blocks), (whole > 0).sum(0))
    block = blocks[1]
    for number in range(ROWS):
        mine = block.latent[block.row_start[number] : block.row_start[number + 1]]
        np.testing.assert_array_equal(mine, np.flatnonzero(dense[1, number]))


def test_figures_of_a_silent_latent_are_zeros():
    found = figures(np.zeros(0, np.float32), np.zeros(0, np.uint32), bands=4)
    assert (found.fires, found.largest, found.histogram.sum(), len(found.token_ids)) == (0, 0.0, 0, 0)
    assert len(found.quantiles) == 5


def test_token_shares_are_shares_of_summed_activation():
    found = figures(np.array([1, 2, 3, 2], np.float32), np.array([5, 9, 5, 9], np.uint32), bands=2)
    assert found.token_ids.tolist() == [5, 9]
    assert found.token_shares.tolist() == [0.5, 0.5]


def test_best_windows_come_once_each_and_equal_ones_by_their_order():
    row = np.array([0, 1, 4, 5, 9, 13])  # windows of 4 rows: 0 0 1 1 2 3
    value = np.array([1, 5, 5, 2, 3, 5], np.float32)
    found = choose(row, value, IndexSpec(top=3, bands=10), window_rows=4, latent=0)
    assert found.entry.tolist() == [1, 2, 5]
    assert set(found.band.tolist()) == {TOP_BAND}  # fewer entries than bands: none are drawn


def test_draws_do_not_depend_on_how_often_they_are_made():
    row, value = np.arange(400), np.random.default_rng(0).random(400).astype(np.float32)
    spec = IndexSpec(top=2, bands=4, per_band=3)
    one, again = (choose(row, value, spec, 10, latent=3) for _ in range(2))
    np.testing.assert_array_equal(one.entry, again.entry)
    other = choose(row, value, spec, 10, latent=4)
    assert not np.array_equal(one.entry, other.entry)
    for entry, band in zip(one.entry, one.band, strict=True):
        rank = int((value < value[entry]).sum())
        assert band == TOP_BAND or rank // 100 == band


def test_nearest_directions_over_several_blocks(monkeypatch):
    monkeypatch.setattr("winnow.explorer.index.directions.COSINE_COLUMNS", 8)
    rows = unit_rows(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)))
    found = nearest(rows, 6, 14, 4)
    exact = (rows @ rows.T).fill_diagonal_(-2)[6:14].topk(4)
    np.testing.assert_array_equal(found.ids, exact.indices.numpy())
    np.testing.assert_allclose(found.scores, exact.values.numpy(), rtol=1e-6)
    assert nearest(rows[:3], 0, 3, 9).ids.shape == (3, 2)  # there are no more


def test_texts_of_tokens_join_to_the_text_and_parts_of_characters_show_their_bytes():
    tokenizer = make_tokenizer()
    texts = token_texts(tokenizer, 390)
    ids = tokenizer.encode(" the quick brown fox\n", add_special_tokens=False)
    assert "".join(texts[number] for number in ids) == " the quick brown fox\n"
    assert texts[tokenizer.encode("東")[0]].startswith("<E")
    assert texts[389].startswith("<unused")
