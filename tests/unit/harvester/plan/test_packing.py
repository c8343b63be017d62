"""Packing is pure: streams to windows, what is held out, and the keyed order."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.common.hashing import keyed_hash
from winnow.harvester.plan.marks import document_tokens, labels_of
from winnow.harvester.plan.packing import Holdout, Packer, holdout_key, in_keyed_order, order_key, regroup
from winnow.schemas.labels import FIRST, SPECIAL

UINT32 = np.dtype(np.uint32)

GOLDEN = ["ad1723968713a367", "38e06f752cb72c06", "2ec1ec9637f69944", "c7c11dee8e4754af"]
GOLDEN_SHA256 = "7f041ef1b72c5d85ee09747a537c4487b3de62fb2dc8cad460813399316ca431"
GOLDEN_ORDER = [1, 11, 2, 9, 8, 5, 6, 4, 3, 7, 10, 0]
"""Changing any of these changes every dataset: give the algorithm another name instead."""

document_lengths = st.lists(st.integers(1, 40), max_size=40)


def batched(items: list, size: int) -> list[list]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def numbered_documents(lengths: list[int]) -> list[np.ndarray]:
    """Documents whose tokens are all different, so that a token tells where it came from."""
    edges = np.cumsum([0, *lengths])
    return [np.arange(start, stop, dtype=np.uint32) for start, stop in itertools.pairwise(edges)]


def numbered(documents: list[np.ndarray], first: int = 0) -> list[tuple[int, np.ndarray]]:
    """(number, tokens with their marks) of each."""
    return [(first + at, document_tokens(ids, UINT32)) for at, ids in enumerate(documents)]


def joined(arrays: list[np.ndarray]) -> list[int]:
    return [int(token) for array in arrays for token in array.ravel()]


def test_keyed_hash_is_pinned():
    got = keyed_hash(np.arange(4), order_key(0))
    assert [f"{value:016x}" for value in got.tolist()] == GOLDEN
    whole = keyed_hash(np.arange(10_000), order_key(2**63 - 1)).astype("<u8").tobytes()
    assert hashlib.sha256(whole).hexdigest() == GOLDEN_SHA256


def test_keyed_order_is_pinned():
    order = in_keyed_order(np.arange(12).reshape(12, 1), order_key(7))
    assert order.ravel().tolist() == GOLDEN_ORDER


def test_a_hash_follows_the_definition():
    def finalise(word: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            word = ((word ^ (word >> shift)) * factor) % 2**64
        return word ^ (word >> 31)

    key, golden = order_key(3), 0x9E3779B97F4A7C15
    for ordinal in (0, 1, 12345, 2**63, 2**64 - 1):
        word = finalise((ordinal * golden + key % 2**64) % 2**64)
        word = finalise((word * golden + (key >> 64)) % 2**64)
        assert int(keyed_hash(np.array([ordinal], np.uint64), key)[0]) == word


def test_no_two_ordinals_share_a_hash():
    assert len(np.unique(keyed_hash(np.arange(200_000), order_key(1)))) == 200_000


def test_hashes_are_spread_evenly():
    top = (keyed_hash(np.arange(64_000), order_key(5)) >> np.uint64(58)).astype(int)
    counts = np.bincount(top, minlength=64)
    assert np.abs(counts - 1000).max() < 6 * 1000**0.5


def test_uses_and_seeds_have_keys_of_their_own():
    keys = {order_key(0), order_key(1), holdout_key(0), holdout_key(1)}
    assert len(keys) == 4
    ranks = [np.argsort(np.argsort(keyed_hash(np.arange(2000), key))) for key in sorted(keys)]
    for first in range(4):
        for second in range(first):
            assert abs(np.corrcoef(ranks[first], ranks[second])[0, 1]) < 0.1


@given(document_lengths, st.integers(2, 9), st.booleans(), st.integers(1, 7))
def test_windows_and_tail_give_the_stream_back(lengths, context, bos, batch):
    documents = numbered_documents(lengths)
    packer = Packer(context, 999_999 if bos else None, UINT32)
    windows = [packer.push(part)["token"] for part in batched(numbered(documents), batch)]
    assert all(block.shape[1] == context for block in windows)
    if bos:
        assert all((block[:, 0] == 999_999).all() for block in windows)
        windows = [block[:, 1:] for block in windows]
    assert joined([*windows, packer.tail["token"]]) == joined(documents)
    assert len(packer.tail) < packer.payload


@given(document_lengths, st.integers(2, 9), st.integers(1, 7), st.data())
def test_a_documents_own_bos_is_the_windows(lengths, context, batch, data):
    bos = 999_999
    documents = numbered_documents([length + 1 for length in lengths])
    for ids in documents:
        if data.draw(st.booleans()):
            ids[0] = bos
    # Reckoned token by token.
    stream = [(n, at, int(t)) for n, ids in enumerate(documents) for at, t in enumerate(ids)]
    wanted, at, owned = [], 0, []
    while at < len(stream):
        own = stream[at][1:] == (0, bos)
        part = stream[at : at + context - (not own)]
        first = [] if own else [(*part[0][:2], bos, SPECIAL)]
        wanted.append([*first, *((*token, FIRST if token[1] == 0 else 0) for token in part)])
        owned.append(own)
        at += len(part)
    packer = Packer(context, bos, UINT32)
    blocks = [packer.push(part) for part in batched(numbered(documents), batch)]
    starts, numbers = np.zeros(1, np.uint64), np.array(packer.documents, np.uint64)
    found = []
    for block in blocks:
        labels = labels_of(block, 1, numbers, starts)
        columns = (labels["document"], labels["offset"], block["token"], labels["flags"])
        found += [list(zip(*(c[row].tolist() for c in columns), strict=True)) for row in range(len(block))]
    whole = [window for window in wanted if len(window) == context]
    assert found == whole
    assert packer.tail["token"].tolist() == [t for _, _, t in stream[len(stream) - len(packer.tail) :]]
    assert packer.own == sum(owned[: len(whole)])


@given(document_lengths, st.integers(2, 9), st.integers(1, 7), st.integers(1, 7))
def test_windows_do_not_depend_on_batches(lengths, context, one, other):
    documents = numbered_documents(lengths)

    def windows(batch: int) -> bytes:
        packer = Packer(context, None, UINT32)
        return b"".join(packer.push(part).tobytes() for part in batched(numbered(documents), batch))

    assert windows(one) == windows(other)


@given(document_lengths, st.integers(2, 9), st.booleans(), st.integers(1, 7), st.integers(1, 5))
def test_labels_say_where_every_token_comes_from(lengths, context, bos, batch, per_source):
    documents = numbered_documents(lengths)
    # Every third number is of a document that another split has.
    numbers = [3 * at // 2 for at in range(len(documents))]
    packer = Packer(context, 999_999 if bos else None, UINT32)
    marked = [(number, tokens) for number, (_, tokens) in zip(numbers, numbered(documents), strict=True)]
    blocks = [packer.push(part) for part in batched(marked, batch)]
    starts = np.arange(0, 3 * len(documents) + 1, per_source, dtype=np.uint64)
    wanted = [
        (number // per_source, number, offset, FIRST if offset == 0 else 0)
        for number, ids in zip(numbers, documents, strict=True)
        for offset in range(len(ids))
    ]
    at = 0
    for block in blocks:
        columns = ("source", "document", "offset", "flags")
        found = labels_of(block, int(bos), np.array(packer.documents, np.uint64), starts)
        for row in range(len(block)):
            values = zip(*(found[name][row].tolist() for name in columns), strict=True)
            its, at = wanted[at : at + packer.payload], at + packer.payload
            expected = [(*its[0][:3], SPECIAL), *its] if bos else its
            assert list(values) == expected
        assert not found["role"].any()
        assert not found["turn"].any()


@given(document_lengths, st.integers(1, 300), st.integers(0, 2**63 - 1))
def test_held_out_documents(lengths, needed, seed):
    documents = numbered_documents(lengths)
    hashes = keyed_hash(np.arange(len(documents)), holdout_key(seed)).tolist()
    holdout, train, largest = Holdout(needed), [], 0
    for ordinal, (key_hash, tokens) in enumerate(zip(hashes, documents, strict=True)):
        train += [tokens for _, tokens in holdout.push(ordinal, key_hash, tokens)]
        largest = max(largest, len(tokens))
        assert holdout.tokens < needed + largest  # memory: what is needed and a document
    held = [tokens for _, tokens in holdout.documents()]

    assert sorted(joined(held) + joined(train)) == joined(documents)  # each in exactly one split
    ascending = [documents[index] for index in np.argsort(hashes)]
    total, expected = 0, []
    for tokens in ascending:
        if total < needed:
            expected.append(int(tokens[0]))
            total += len(tokens)
    assert [int(tokens[0]) for tokens in held] == sorted(expected)  # just as many as are needed


def test_a_batch_is_not_kept_alive_by_a_held_out_document():
    batch = np.arange(1000, dtype=np.uint32)
    holdout = Holdout(10)
    holdout.push(0, 1, batch[:20])
    assert not np.shares_memory(holdout.documents()[0][1], batch)


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 5), st.integers(0, 12))
def test_regroup(lengths, size, limit):
    blocks = [array.reshape(-1, 1) for array in numbered_documents(lengths)]
    groups = list(regroup(blocks, size, limit))
    total = sum(lengths)
    assert len(groups) == min(limit, total // size)
    assert all(group.shape == (size, 1) for group in groups)
    assert joined(groups) == list(range(len(groups) * size))


@settings(max_examples=30)
@given(st.integers(0, 300), st.integers(0, 2**63 - 1))
def test_keyed_order_is_a_permutation(count, seed):
    windows = np.arange(count * 2).reshape(count, 2)
    ordered = in_keyed_order(windows, order_key(seed))
    assert sorted(ordered[:, 0].tolist()) == windows[:, 0].tolist()
    assert np.array_equal(ordered, in_keyed_order(windows, order_key(seed)))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_mixes_the_corpus(seed):
    ordered = in_keyed_order(np.arange(4096).reshape(-1, 1), order_key(seed)).ravel()
    neighbours = np.abs(np.diff(ordered)) == 1
    assert neighbours.mean() < 0.005
