"""N-grams with wildcards: which one speaks, and where tries fire."""

from __future__ import annotations

import numpy as np
import pytest

from winnow.evaluator.n2g.tries import WILDCARD, Trie, fire

ANY = WILDCARD


def test_the_longest_then_the_most_concrete_ngram_speaks():
    trie = Trie()
    trie.add((5,), 1.0)
    trie.add((4, 5), 2.0)
    trie.add((3, ANY, 5), 3.0)
    trie.add((3, 4, 5), 4.0)
    trie.add((9, ANY, 7), 8.0)
    ids = [3, 4, 5, 8, 5, 3, 8, 5, 9, 9, 7, 7]
    found = {at: trie.predict(ids, at) for at in range(len(ids))}
    assert found == {
        **dict.fromkeys(range(len(ids))),
        2: 4.0,  # concrete and wildcard are equally long
        4: 1.0,
        7: 3.0,
        10: 8.0,
        11: 8.0,
    }
    assert trie.predict([5], 0) == 1.0  # nothing lies before a window


def test_values_are_means_and_leading_wildcards_say_nothing():
    trie = Trie()
    trie.add((ANY, ANY, 6), 1.0)
    trie.add((6,), 3.0)
    assert trie.patterns() == [((6,), 2.0, 2)]
    with pytest.raises(ValueError, match="end with a token"):
        trie.add((6, ANY), 1.0)


def test_firings_equal_asking_everywhere():
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 6, (20, 15))
    allowed = draw.random(tokens.shape) > 0.2
    tries = [Trie() for _ in range(4)]
    for trie in tries[:3]:
        for _ in range(4):
            pattern = draw.integers(-1, 6, draw.integers(1, 4))
            pattern[-1] = abs(pattern[-1])
            trie.add(tuple(pattern.tolist()), float(draw.random()))
    fired = fire(tries, tokens, allowed)
    expected = [
        (w, p, slot, value)
        for w in range(20)
        for p in range(15)
        for slot, trie in enumerate(tries)
        if allowed[w, p] and (value := trie.predict(tokens[w].tolist(), p)) is not None
    ]
    found = list(zip(*(part.tolist() for part in fired), strict=True))
    assert sorted(found) == sorted(expected)
    assert found == sorted(found, key=lambda entry: entry[:2])
    assert not len(fire([Trie()], tokens, allowed).slots)
