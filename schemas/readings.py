"""Which rows of a dataset are read: a choice by the labels of their tokens."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import Field

from winnow.schemas.base import Artefact, Contract, Sha256
from winnow.schemas.labels import RoleName


class RowsSpec(Contract):
    """A reading: rows whose tokens fulfil every condition that is given. Without any, all rows."""

    roles: tuple[RoleName, ...] = ()
    """Roles of the message that a token belongs to, such as `assistant`; empty for all. `none` is text
    outside conversations, and what a chat template writes between messages."""
    special: bool | None = None
    """`false` leaves special tokens out, and all that a chat template added; `true` keeps nothing else."""
    sources: tuple[int | str, ...] = ()
    """Sources of the corpus, each by its number in `corpus.sources`, from 0, or by its URI; empty for all."""
    min_offset: int = Field(default=0, ge=0)
    """Least place of a token in its document, from 0: the first tokens of a document have little context."""
    turns: Literal["last"] | tuple[int, ...] = ()
    """Messages of a conversation, by number from 0, or only the `last` one; empty for all."""

    @property
    def everything(self) -> bool:
        """Whether no condition is given."""
        return self == RowsSpec()

    @property
    def words(self) -> str:
        """The conditions in one line, for figures and messages."""
        given: dict[str, Any] = self.model_dump(exclude_defaults=True)
        shown = {
            name: ",".join(str(one) for one in cast("tuple[object, ...]", value))
            if isinstance(value, tuple)
            else str(value).lower()
            for name, value in given.items()
        }
        return " ".join(f"{name}={value}" for name, value in shown.items()) or "all rows"


class ReadingCard(Artefact):
    """What is kept of a reading, so that no run has to read all labels again: `readings/<digest>.json`.

    The chosen rows of each unit are counted in `readings/<digest>.counts`: uint32 [units, 64], by slice, and
    after them uint64 [units], the sum of the squares of each window's number.
    """

    kind: Literal["winnow.reading"] = "winnow.reading"
    rows: RowsSpec
    """The conditions."""
    plan_fingerprint: Sha256
    """Fingerprint of the dataset's plan."""
    labels_sha256: Sha256
    """Digest of the labels that the rows were chosen by."""
    counts_sha256: Sha256
    """SHA-256 of the counts."""
    chosen: int = Field(ge=0)
    """Chosen rows of the whole dataset."""
