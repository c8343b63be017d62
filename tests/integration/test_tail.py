"""The subject run from a hook upward equals the whole forward pass with that hook replaced."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.tiny import ARCHITECTURES, make_subject
from winnow.schemas.errors import ConfigError
from winnow.subject import Subject
from winnow.subject.tail import Tail

TOKENS = np.random.default_rng(0).integers(0, 384, (3, 12))


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory):
    made: dict[str, Subject] = {}

    def load(architecture: str) -> Subject:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            make_subject(folder, architecture, layers=3, width=16)
            made[architecture] = Subject.load({"model": str(folder), "device": "cpu", "attention": "eager"})
        return made[architecture]

    return load


def noisy(x: torch.Tensor) -> torch.Tensor:
    return x * 0.7 + 0.1


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_patched_and_continued_equal_the_whole_pass_on_every_architecture(subject_of, architecture):
    subject = subject_of(architecture)
    tail = Tail(subject, "resid_post.1")
    start = tail.start(TOKENS, keep_cache=True)
    assert_same(start.logits, subject.logits(TOKENS))
    assert_same(tail.patched(start, noisy), subject.logits(TOKENS, replace={"resid_post.1": noisy}))
    assert_same(start.logits, subject.logits(TOKENS))  # the subject is as it was
    check_continued(subject, "resid_post.1", tail, start)


HOOKS = [
    "resid_pre.0",
    "resid_pre.1",
    "resid_post.0",
    "resid_post.2",
    "attn_out.1",
    "mlp_out.1",
    "mlp_out.0",
    "resid_mid.1",
    "mlp_in.1",
]


@pytest.mark.parametrize("hook", [*HOOKS, "model.layers.1.input_layernorm", "model.norm"])
def test_every_kind_of_hook(subject_of, hook):
    subject = subject_of("llama")
    tail = Tail(subject, hook)
    start = tail.start(TOKENS, keep_cache=True)
    assert_same(start.rows, subject.activations(TOKENS, [hook])[hook])
    assert_same(tail.patched(start, noisy), subject.logits(TOKENS, replace={hook: noisy}))
    check_continued(subject, hook, tail, start)


def check_continued(subject: Subject, hook: str, tail: Tail, start) -> None:
    window, first, stop = 1, 5, 10
    row = start.rows[window, first]
    variants = torch.stack([noisy(row), row, row.flip(0)])
    found = tail.continued(start, window, first, stop, variants)
    for variant, logits in zip(variants, found, strict=True):

        def one(x: torch.Tensor, variant: torch.Tensor = variant) -> torch.Tensor:
            x = x.clone()
            x[first] = variant
            return x

        whole = subject.logits(TOKENS[window : window + 1], replace={hook: one})
        assert_same(logits, whole[0, first:stop])


def test_blocks_below_are_spared_and_left_as_they_were(subject_of):
    subject = subject_of("llama")
    tail = Tail(subject, "resid_post.1")
    assert tail.spared == pytest.approx(2 / 3)
    start = tail.start(TOKENS)
    ran: list[int] = []
    handles = [
        subject.model.get_submodule(f"model.layers.{layer}.mlp").register_forward_hook(
            lambda *_, layer=layer: ran.append(layer)
        )
        for layer in range(3)
    ]
    tail.patched(start, noisy)
    for handle in handles:
        handle.remove()
    assert ran == [2]

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        tail.patched(start, fail)
    assert_same(subject.logits(TOKENS), start.logits)
    with pytest.raises(ValueError, match="keep_cache"):
        tail.continued(start, 0, 3, 5, start.rows[0, 3:4])


def test_a_truncated_subject_is_refused(tmp_path):
    make_subject(tmp_path / "s", "llama", layers=3, width=16)
    subject = Subject.load({"model": str(tmp_path / "s"), "device": "cpu"}, until=["resid_post.1"])
    with pytest.raises(ConfigError, match="truncated"):
        Tail(subject, "resid_post.1")
