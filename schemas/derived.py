"""What a plan says of a dataset that was made from another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from winnow.schemas.base import Contract, Sha256
from winnow.schemas.readings import RowsSpec


class DeriveRule(Contract):
    """How rows of a dataset become rows of another: subtracted, then chosen, then averaged."""

    rows: RowsSpec = RowsSpec()
    """Which rows are taken; all of them by default."""
    mean: Literal["turn", "document"] | None = None
    """Takes the mean of the rows of each turn, or document, of a window. One that the end of a window cuts
    gives a mean in each of its windows. Null takes the rows themselves."""
    minus: Sha256 | None = None
    """`dataset_sha256` of an aligned dataset, whose rows are subtracted; null subtracts nothing."""
    minus_subject: Sha256 | None = Field(default=None, exclude_if=lambda digest: digest is None)
    """Digest of the weights of that dataset's subject; null if nothing is subtracted."""

    @property
    def regroups(self) -> bool:
        """Whether rows are no longer the tokens of windows of text, one after another."""
        return self.mean is not None or not self.rows.everything

    @property
    def remakes(self) -> bool:
        """Whether its rows are others than were read, and not only some of them."""
        return self.mean is not None or self.minus is not None

    @property
    def words(self) -> str:
        """The rule in one line."""
        parts = [] if self.minus is None else [f"minus {self.minus[:12]}"]
        parts += [] if self.rows.everything else [self.rows.words]
        parts += [] if self.mean is None else [f"mean of each {self.mean}"]
        return ", ".join(parts) or "all rows"


class Derivation(Contract):
    """Where the rows of a derived dataset come from."""

    parent: Sha256
    """`dataset_sha256` of the dataset that they were made from."""
    rule: DeriveRule
    """How they were made."""
    earlier: tuple[DeriveRule, ...] = ()
    """Rules by which that dataset was derived in turn, the first one first."""
    left_out: int = Field(ge=0)
    """Rows, or means, that fill no unit: the tail of each split."""

    @property
    def rules(self) -> tuple[DeriveRule, ...]:
        """All rules since the subject gave rows, in their order."""
        return (*self.earlier, self.rule)

    @property
    def words(self) -> str:
        """The rules in one line."""
        return words_of(self.rules)


def words_of(rules: Sequence[DeriveRule]) -> str:
    """Rules, applied one after another, in one line."""
    return "; then ".join(rule.words for rule in rules)


def same_kind(mine: Sequence[DeriveRule], theirs: Sequence[DeriveRule]) -> bool:
    """Whether rows made by these rules are the same kind of thing: an activation, a mean, a difference.

    Which rows are chosen does not matter, nor of which corpus those are that are subtracted.
    """
    one, other = (
        [(rule.mean, rule.minus_subject or rule.minus) for rule in rules if rule.remakes]
        for rules in (mine, theirs)
    )
    return one == other
