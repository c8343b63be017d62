"""The subject that a dataset was harvested from, loaded when it is first needed and checked."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from winnow.evaluator.setting import subject_specs_of
from winnow.schemas.fit import check_subject
from winnow.schemas.harvest import HarvestPlan
from winnow.schemas.joined import JoinedPlan
from winnow.schemas.subject import SubjectIdentity, SubjectSpec
from winnow.subject.load import Subject
from winnow.subject.pretrained import load_tokenizer
from winnow.subject.weights import locate


def lazy_subjects(
    plan: HarvestPlan, stated: SubjectSpec | None, places: Mapping[str, str]
) -> dict[str, LazySubject]:
    """The subjects of a dataset: name -> subject; the name is empty unless several datasets are joined.

    Args:
        plan: The dataset's plan.
        stated: How to load it; of several, its device and trust in code are those of each.
        places: Of several: name -> where a subject's files are, if not where its plan says.

    Raises:
        ConfigError: `places` has a name that is none of the datasets'.
    """
    parts = plan.parts if isinstance(plan, JoinedPlan) else {}
    return joined_subjects({name: part.subject for name, part in parts.items()}, stated, places) or {
        "": LazySubject(stated, plan.subject)
    }


def joined_subjects(
    planned: Mapping[str, SubjectIdentity], stated: SubjectSpec | None, places: Mapping[str, str]
) -> dict[str, LazySubject]:
    """Those of several datasets, by name; arguments as for `lazy_subjects`."""
    if not planned:
        return {}
    specs = subject_specs_of(planned, stated or next(iter(planned.values())).spec(), places)
    return {name: LazySubject(specs[name], identity) for name, identity in planned.items()}


class LazySubject:
    """A subject whose weights are loaded when `whole` is first called.

    Args:
        spec: How to load it; None loads it as the plan says.
        planned: The subject that the dataset was harvested from.
    """

    def __init__(self, spec: SubjectSpec | None, planned: SubjectIdentity) -> None:
        self.spec = planned.spec(spec)
        self.planned = planned

    @property
    def device(self) -> torch.device:
        """The device that it is loaded to."""
        # Known before the weights are loaded, since the SAE goes to the same device.
        if self.spec.device == "auto":
            return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        return torch.device(self.spec.device)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, which needs no weights."""
        return load_tokenizer(locate(self.spec).folder, self.spec)

    @property
    def ready(self) -> bool:
        """Whether its weights are loaded."""
        return "_loaded" in self.__dict__

    def whole(self) -> Subject:
        """The subject with all its layers.

        Raises:
            SaeMismatch: Other weights than the dataset was harvested from.
        """
        return self._loaded

    @cached_property
    def _loaded(self) -> Subject:
        # Checked after loading: the identity holds a digest of the weights themselves.
        subject = Subject.load(self.spec)
        check_subject(subject.identity, self.planned)
        return subject
