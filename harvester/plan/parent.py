"""`plan.tokens_from`: another dataset's windows in the place of a corpus.

Letters: T context length, W windows per unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from winnow.harvester.plan.digests import PlannedUnit
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError, MissingObject, PlanMismatch
from winnow.schemas.harvest import HarvestPlan, PlanSpec
from winnow.schemas.subject import SubjectIdentity
from winnow.store.format.labels import label_keys
from winnow.store.format.layout import LABELS_GROUP, TOKENS_ARRAY, tokens_key
from winnow.store.objects import ObjectStore, open_store
from winnow.store.read.labels import load_label_digests, read_labels
from winnow.store.read.reader import load_plan, load_token_digests, read_tokens
from winnow.store.write.writer import differing_fields


class WindowDigests(NamedTuple):
    """Digests of a dataset's windows."""

    tokens: NDArray[np.uint8]
    """[units, 32] SHA-256 of each unit's tokens."""
    labels: NDArray[np.uint8] | None
    """[units, labels, 32] SHA-256 of each unit's labels; None if there are none."""


class Parent:
    """The dataset that `plan.tokens_from` names. It need not be harvested, only planned."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.plan: HarvestPlan = load_plan(store)
        """Its plan."""
        if (why := self.plan.no_text) is not None:
            raise ConfigError(
                f"plan.tokens_from: {store.uri}", expected="windows of text", got=why,
                fix="Name the dataset that it was derived from",
            )  # fmt: skip

    @classmethod
    def of(cls, config: Config) -> Parent | None:
        """Open the one that a config names; None if it names none.

        Raises:
            ConfigError: There is no dataset.
        """
        if config.plan is None or config.plan.tokens_from is None:
            return None
        return cls(open_store(config.plan.tokens_from, config.storage))

    # What `CorpusWindows` has too, for a repair

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def read(self) -> None:
        """Do nothing: there is no corpus to read."""

    def digests(self) -> WindowDigests:
        """The digests of all units, checked."""
        return self._digests

    def units(self) -> Iterator[PlannedUnit]:
        """Yield every unit's windows, checked."""
        return (self.unit(number) for number in range(self.plan.units))

    def unit(self, number: int) -> PlannedUnit:
        """Read one unit's windows, checked.

        Raises:
            MissingObject, IntegrityError: They are not what was planned.
        """
        tokens, labels = self._digests
        return PlannedUnit(
            read_tokens(self.store, self.plan, number, tokens),
            {} if labels is None else read_labels(self.store, self.plan, number, digests=labels),
        )

    @cached_property
    def _digests(self) -> WindowDigests:
        labels = None if self.plan.labels is None else load_label_digests(self.store, self.plan)
        return WindowDigests(load_token_digests(self.store, self.plan), labels)

    # Planning

    def spec_of(self, config: Config) -> PlanSpec:
        """The config's plan with this dataset's windows.

        Raises:
            PlanMismatch: The config gives a corpus, or a field that decides windows, of another value.
        """
        assert config.plan is not None
        spec = config.plan.on_windows_of(self.plan.spec)
        own = {"hooks", "attend", "dtype", "compress", "sink_multiple", "adopt_tolerance"}
        stored, wanted = (each.model_dump(mode="json", exclude=own) for each in (self.plan.spec, spec))
        lines = differing_fields(stored, wanted, "plan")
        if config.corpus is not None:
            before, after = self.plan.corpus, config.corpus
            lines += differing_fields(before.model_dump(mode="json"), after.model_dump(mode="json"), "corpus")
        if lines:
            raise PlanMismatch(
                f"the windows of {self.store.uri}, which plan.tokens_from names",
                got="; ".join(lines[:12]),
                fix="Leave these fields out: they are then that dataset's",
            )
        if spec.attend == "document" and self.plan.labels is None:
            raise ConfigError(
                "plan.attend: document",
                expected="windows whose labels tell where documents begin",
                got=f"those of {self.store.uri}, planned before labels existed",
                fix="Plan on the corpus itself, or set plan.attend: window",
            )
        return spec

    @classmethod
    def written_out(cls, config: Config) -> Config:
        """The config with the windows of `plan.tokens_from` written out, for a forecast without a plan.

        Raises:
            PlanMismatch: See `spec_of`.
        """
        parent = cls.of(config)
        if parent is None:
            return config
        units = parent.plan.units - parent.plan.spec.validation_units
        spec = parent.spec_of(config).model_copy(update={"train_units": units})
        return config.model_copy(update={"plan": spec})

    def require_whole(self) -> None:
        """Raise MissingObject if a token chunk is missing, before anything is written."""
        have = {key for array in (TOKENS_ARRAY, LABELS_GROUP) for key, _ in self.store.list(array)}
        for unit in range(self.plan.units):
            for key in (tokens_key(unit), *label_keys(self.plan, unit).values()):
                if key not in have:
                    raise MissingObject(
                        f"{self.store.uri}, which plan.tokens_from names, is not planned completely",
                        expected=key,
                        fix="Run `winnow plan` there first",
                    )

    def require_same(self, plan: HarvestPlan, store: ObjectStore) -> None:
        """Raise PlanMismatch if a stored plan has other tokens than this dataset."""
        if plan.tokens_sha256 != self.plan.tokens_sha256:
            raise PlanMismatch(
                f"{store.uri} already holds a plan of other tokens than plan.tokens_from",
                expected=f"tokens with sha256 {self.plan.tokens_sha256}, those of {self.store.uri}",
                got=plan.tokens_sha256,
                fix="Name another root, or the dataset whose windows were taken",
            )

    def require_vocabulary(self, identity: SubjectIdentity, tokenizer: Any) -> None:
        """Check that this dataset's token ids mean the same to another subject.

        Raises:
            ConfigError: Its tokenizer has another vocabulary; the first difference is named.
        """
        planned = self.plan.subject
        if planned.tokenizer_sha256 != identity.tokenizer_sha256:
            # Chat models differ from their base in templates and post-processing, which decide no id.
            self._compare(identity, tokenizer)
        # The embedding may have fewer rows than the tokenizer has tokens, whatever their spellings.
        if planned.vocabulary > identity.vocabulary:
            largest = max(int(unit.tokens.max()) for unit in self.units())
            if largest >= identity.vocabulary:
                raise ConfigError(
                    f"the windows of {self.store.uri} do not fit {identity.model}",
                    expected=f"token ids below {identity.vocabulary}, the embedding's rows",
                    got=largest,
                    fix="Plan this subject on windows of its own",
                )

    def _compare(self, identity: SubjectIdentity, tokenizer: Any) -> None:
        # Here, not above: it imports transformers, which equal tokenizers do without.
        from winnow.subject.pretrained import load_tokenizer, tokenizer_digest
        from winnow.subject.tokenizer import vocabulary
        from winnow.subject.weights import locate

        planned = self.plan.subject
        spec = planned.spec()
        theirs = load_tokenizer(locate(spec).folder, spec)
        if (found := tokenizer_digest(theirs)) != planned.tokenizer_sha256:
            raise ConfigError(
                f"the tokenizer of {planned.model}, by which the windows of {self.store.uri} were made",
                expected=f"the planned one, sha256 {planned.tokenizer_sha256}",
                got=found,
                fix="Restore its files: whether the two vocabularies agree cannot be told without them",
            )
        before, after = vocabulary(theirs), vocabulary(tokenizer)
        other = [number for number in before.keys() | after.keys() if before.get(number) != after.get(number)]
        if other:
            first = min(other)
            raise ConfigError(
                f"the tokenizers of {planned.model} and {identity.model} have different vocabularies: "
                f"{len(other)} ids differ, the first is {first}",
                expected=f"{before.get(first)!r}, as in {self.store.uri}",
                got=repr(after.get(first)),
                fix="Plan this subject on windows of its own: its rows cannot be aligned with the others'",
            )
