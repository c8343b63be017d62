"""Parts of a crosscoder: found by name, by hook, and by the subject that is loaded."""

from __future__ import annotations

import pytest

from winnow.schemas.errors import ConfigError, SaeMismatch
from winnow.schemas.parts import part_at, part_names, part_number
from winnow.schemas.training import SaeCard, SaeIdentity, SaeParts

DIGESTS = {"base": "a" * 64, "chat": "b" * 64}


def identity(digest: str, **roots: SaeIdentity) -> SaeIdentity:
    return SaeIdentity(
        plan_fingerprint="0" * 64,
        dataset_sha256=None,
        subject_model="m",
        subject_weights_sha256=digest,
        roots=roots,
    )


def card(*hooks: str, digests: dict[str, str] | None = None) -> SaeCard:
    roots = {name: identity(digest) for name, digest in (digests or {}).items()}
    several = len(hooks) > 1
    return SaeCard(
        d_model=4 * len(hooks),
        latents=8,
        k=2,
        hook=hooks[0],
        with_hooks=hooks[1:],
        normalize="none",
        parts=SaeParts(widths=(4,) * len(hooks) if several else ()),
        weights="raw",
        weights_sha256="0" * 64,
        identity=identity("c" * 64, **roots) if digests is not None else None,
    )


TWO = ("base/resid_post.1", "chat/resid_post.1")
FOUR = (*TWO, "base/resid_post.2", "chat/resid_post.2")


def test_parts_are_named_by_dataset_or_by_hook():
    assert part_names(card(*TWO)) == ["base", "chat"]
    assert part_names(card("resid_post.1", "mlp_out.0")) == ["resid_post_1", "mlp_out_0"]
    assert part_names(card("resid_post.1")) == []
    assert part_number(card(*TWO), "chat") == part_number(card(*TWO), TWO[1]) == 1
    with pytest.raises(ConfigError, match="base or chat, got other"):
        part_number(card(*TWO), "other")
    with pytest.raises(ConfigError, match="no crosscoder"):
        part_number(card("resid_post.1"), "resid_post.1")


def test_hook_and_subject_say_which_part_is_meant():
    of_four = card(*FOUR, digests=DIGESTS)
    found = {
        (hook, name): part_at(of_four, "", hook, DIGESTS[name])
        for hook in ("resid_post.1", "resid_post.2")
        for name in DIGESTS
    }
    assert found == {
        ("resid_post.1", "base"): 0,
        ("resid_post.1", "chat"): 1,
        ("resid_post.2", "base"): 2,
        ("resid_post.2", "chat"): 3,
    }
    assert part_at(of_four, "chat/resid_post.2", "resid_post.2", DIGESTS["chat"]) == 3
    # One subject with several hooks, and an import whose card names no subject.
    assert part_at(card("resid_post.1", "mlp_out.0", digests={}), "", "mlp_out.0", "c" * 64) == 1
    assert part_at(card(*TWO), "base", "resid_post.1", "d" * 64) == 0


@pytest.mark.parametrize(
    ("part", "hook", "digest", "message"),
    [
        ("", "resid_post.1", None, "base or chat, got none"),
        ("", "resid_post.3", DIGESTS["base"], r"one of base \(base/resid_post.1\)"),
        ("other", "resid_post.1", None, "base or chat, got other"),
    ],
)
def test_what_is_not_one_part_is_refused(part, hook, digest, message):
    with pytest.raises(ConfigError, match=message):
        part_at(card(*TWO, digests=DIGESTS), part, hook, digest)


def test_another_subject_is_refused():
    for part in ("", "chat"):
        with pytest.raises(SaeMismatch, match="Load the subject of the part"):
            part_at(card(*TWO, digests=DIGESTS), part, "resid_post.1", "d" * 64)
    with pytest.raises(SaeMismatch):
        part_at(card(*TWO, digests=DIGESTS), "chat", "resid_post.1", DIGESTS["base"])
    # Two runs of one model: the weights do not tell the parts apart.
    same = card(*TWO, digests=dict.fromkeys(DIGESTS, "a" * 64))
    with pytest.raises(ConfigError, match="base or chat, got none"):
        part_at(same, "", "resid_post.1", "a" * 64)
    assert part_at(same, "chat", "resid_post.1", "a" * 64) == 1
