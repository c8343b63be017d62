"""What a plan says of its tokens' labels."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from winnow.schemas.base import Contract, Sha256

ROLES = ("none", "system", "user", "assistant", "tool")
"""The roles that every labelled plan names first; others follow in the order in which the corpus has them."""
# Role and flags of a token share a byte of the planner's spill file: five bits and three.
MAX_ROLES = 32
"""Most roles of a corpus, `none` included."""
MAX_SOURCES = 1 << 16
MAX_TURNS = 1 << 16

SPECIAL, FIRST, LAST_TURN = 1, 2, 4
"""Bits of a token's flags: a special token, or one that a template added; the first token of its document;
a token of the last message of its conversation."""
COUNTED_TURNS = 32
"""Turns that are counted one by one."""

RoleName = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Count = Annotated[int, Field(ge=0)]


class PlannedLabels(Contract):
    """The labels of a plan's tokens: names of the roles, the digest, and the number of tokens of each kind.

    The counts are of all planned windows, leading positions and BOS included.
    """

    roles: tuple[RoleName, ...] = Field(min_length=len(ROLES), max_length=MAX_ROLES)
    """Name of each number in the label `role`."""
    sha256: Sha256
    """SHA-256 of the `label_digests` array's bytes: uint8 [units, labels, 32], the digest of each unit's
    labels, in the order of `winnow.store.format.labels.LABELS`."""
    tokens_by_role: tuple[Count, ...] = Field(min_length=len(ROLES), max_length=MAX_ROLES)
    """Tokens of each role."""
    tokens_by_source: tuple[Count, ...] = Field(min_length=1, max_length=MAX_SOURCES)
    """Tokens of each source of the corpus."""
    tokens_by_turn: tuple[Count, ...] = Field(min_length=1, max_length=COUNTED_TURNS)
    """Tokens of each turn; the 32nd number is of that turn and all later ones. Text is turn 0."""
    special: Count = 0
    """Tokens with the flag `SPECIAL`."""
    own_bos: Count | None = Field(default=None, exclude_if=lambda count: count is None)
    """Windows that begin with a document which has the BOS itself, so that none was put before it. Null if
    no document does where a window begins; in a plan made before, such windows begin with two BOS."""
