"""What every family works with: an SAE, the dataset it is measured on, the subject, the sample sizes.

Letters: B rows, K slots of the codes, D d_model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.common.device import resolve_device
from winnow.common.reporter import say
from winnow.sae.model import Sae, read_card, read_set_card
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError
from winnow.schemas.evaluation import EvaluateSpec, Family, Figure
from winnow.schemas.fit import check_dataset, check_subject, other_windows
from winnow.schemas.harvest import HarvestPlan
from winnow.schemas.layers import layer_folder
from winnow.schemas.readings import RowsSpec
from winnow.schemas.subject import SubjectIdentity, SubjectSpec, read_only
from winnow.schemas.training import SaeCard, SaeIdentity
from winnow.schemas.window import WindowRule
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.store.read.joined import JoinedStore, open_roots
from winnow.subject.load import Subject
from winnow.subject.tail import Tail

log = logging.getLogger("winnow.evaluator")

WITH_SUBJECT: tuple[Family, ...] = ("downstream", "compute", "ablation", "probes", "n2g", "judge")
"""Families that run the subject on the dataset's windows, or compare with what it gives."""
REPLACING: tuple[Family, ...] = ("downstream", "compute", "ablation")
"""Families that replace rows by reconstructions or by rows without a latent."""
CHUNK_ROWS = 4096
"""Stored rows that are read and encoded at a time."""


class Measured(NamedTuple):
    """Result of a family."""

    figures: list[Figure]
    details: dict[str, Any] = {}
    notes: tuple[str, ...] = ()


class Codes(NamedTuple):
    """Some stored rows and their codes."""

    rows: Tensor
    """float32 [B, D], in the raw scale."""
    weights: Tensor
    """[B]; 0 for sinks of the input or of a target, and for rows of void units."""
    windows: NDArray[np.int64]
    """[B]: number of the row's window in the dataset."""
    positions: NDArray[np.int64]
    """[B]: position in that window."""
    values: Tensor
    """[B, S]; 0 in an inactive slot."""
    indices: Tensor
    """int64 [B, S]."""
    targets: Tensor | None = None
    """float32 [B, O]: what a transcoder should predict, in the raw scale; None unless it was asked for."""


class OnDataset:
    """What settings have in common: the windows of a dataset, and the subject that it was harvested from."""

    dataset: ActivationStore
    spec: EvaluateSpec
    subject_spec: SubjectSpec

    @property
    def window(self) -> WindowRule:
        """How the dataset's windows begin; any other text is run in the same way."""
        return WindowRule.of(self.dataset.plan)

    @property
    def without_subject(self) -> dict[Family, str]:
        """Families that run the subject on the dataset's windows, if its rows are not what that gives."""
        plan = self.dataset.plan
        plans = (
            [part.plan for part in self.dataset.datasets] if isinstance(self.dataset, JoinedStore) else [plan]
        )
        why = next((each.no_subject for each in plans if each.no_subject is not None), None)
        return {} if why is None else dict.fromkeys(WITH_SUBJECT, f"they run the subject, and {why}")

    @cached_property
    def subject(self) -> Subject:
        """The whole subject, loaded at first use: families that only read stored rows never need it.

        Raises:
            SaeMismatch: Its weights are not those that the dataset was harvested from.
        """
        say("loading the subject")
        subject = Subject.load(self.subject_spec)
        check_subject(subject.identity, self.dataset.plan.subject)
        return subject

    @property
    def windows(self) -> range:
        """Numbers of the held-out windows in the sample."""
        # The first ones are a random sample: the plan shuffles windows over the whole corpus. Validation
        # units come first, so their windows are numbered from 0.
        plan = self.dataset.plan
        held_out = len(plan.split_units("validation")) * plan.spec.windows_per_unit
        return range(min(held_out, self.spec.windows))

    def tokens(self, windows: range | list[int]) -> NDArray[np.int64]:
        """Read the token ids of windows, int64 [len(windows), T]; each unit is read once."""
        size = self.dataset.plan.spec.windows_per_unit
        asked = np.asarray(windows, np.int64)
        out = np.zeros((len(asked), self.dataset.plan.spec.context_length), np.int64)
        for unit in np.unique(asked // size):
            chosen = asked // size == unit
            out[chosen] = self.dataset.unit_tokens(int(unit))[asked[chosen] % size]
        return out


def restricted(
    spec: EvaluateSpec, trained_on: RowsSpec, dataset: ActivationStore
) -> tuple[EvaluateSpec, ActivationStore]:
    """The spec with its rows resolved, and the dataset restricted to them.

    Raises:
        ConfigError: The dataset has no labels by which these rows could be chosen.
    """
    rows = trained_on if spec.rows is None else spec.rows
    # Of all rows null stays null: settings, and their digests, are those of files that are older.
    return spec.model_copy(update={"rows": None if rows.everything else rows}), dataset.only(rows)


@dataclass(frozen=True)
class Setting(OnDataset):
    """An SAE, and the dataset, subject and sample that it is measured on. `Setting.open` makes one."""

    uri: str
    sae: Sae
    card: SaeCard
    dataset: ActivationStore
    spec: EvaluateSpec
    subject_spec: SubjectSpec
    device: torch.device
    storage: StorageSpec = field(default_factory=StorageSpec)
    losses: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Losses of the held-out windows, by name, that a family has measured and that later ones need not
    repeat."""
    # Not in the spec, which is stored, and not in the repr, which may be logged.
    judge_key: str | None = field(default=None, repr=False)
    """Key of the endpoint that `judge` asks."""

    @classmethod
    def open(
        cls,
        uri: str,
        root: str,
        spec: EvaluateSpec | None = None,
        *,
        subject: SubjectSpec | None = None,
        storage: StorageSpec | None = None,
        judge_key: str | None = None,
        roots: dict[str, str] | None = None,
    ) -> Setting:
        """Load an SAE and open the dataset that it is measured on.

        Args:
            uri: Folder or URI of the SAE.
            root: Folder or URI of the dataset.
            spec: Sample sizes.
            subject: The language model; None takes the one that the dataset's plan names.
            storage: How object storage is reached.
            judge_key: Key of the endpoint of `judge`.
            roots: Of an SAE of several datasets: where they are; None takes those that its card names.

        Raises:
            SaeMismatch: The subject, a hook or a width is not the dataset's.
            ConfigError: There is no dataset at `root`.
            MissingObject, IntegrityError: There is no SAE at `uri`, or it is damaged.
        """
        storage = storage or StorageSpec()
        card = read_card(open_store(uri, storage), uri)
        dataset = open_roots(root, (roots or card.roots) if "/" in card.hook else None, storage)
        chosen = subject_spec_of(dataset.plan, subject)
        device = resolve_device(chosen.device)
        sae = Sae.load(uri, device=device, storage=storage)
        assert sae.card is not None
        # Everything that can be refused without the subject, before a family spends time.
        check_dataset(uri, sae.card, dataset.plan, targets=True)
        if (warning := other_windows(uri, sae.card, dataset.plan)) is not None:
            log.warning(warning)
        spec, dataset = restricted(spec or EvaluateSpec(), sae.card.rows, dataset)
        return cls(uri, sae, sae.card, dataset, spec, chosen, device, storage, judge_key=judge_key)

    @property
    def hook(self) -> str:
        """The hook that the SAE reads."""
        return self.card.hook

    @property
    def sha256(self) -> str:
        """Digest of the weights."""
        return self.card.weights_sha256

    @property
    def latents(self) -> int:
        """Number of latents N."""
        return self.card.latents

    @property
    def k(self) -> int:
        """Active latents K per row that it was trained for."""
        return self.card.k

    @property
    def identity(self) -> SaeIdentity | None:
        """What it was trained on."""
        return self.card.identity

    @property
    def reads(self) -> tuple[str, ...]:
        """The hook that the SAE reads; of a crosscoder, all of them."""
        return self.card.input_hooks

    @property
    def saes(self) -> dict[str, Sae]:
        """The hook that is read -> the SAE."""
        return {self.hook: self.sae}

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks that the SAE reads, and those that a transcoder predicts."""
        return (*self.card.input_hooks, *self.card.target_hooks)

    @property
    def joined(self) -> bool:
        """Whether it reads or writes several datasets, each of a subject of its own."""
        return isinstance(self.dataset, JoinedStore)

    @cached_property
    def subjects(self) -> dict[str, Subject]:
        """Of several datasets: the whole subject of each, loaded at first use.

        Raises:
            SaeMismatch: The weights of one are not those that its dataset was harvested from.
        """
        assert isinstance(self.dataset, JoinedStore)
        return subjects_of(self.dataset, self.subject_spec, self.spec.subjects)

    @cached_property
    def partial(self) -> bool:
        """Whether it is a layer of a cross-layer set, whose layers predict their targets only together."""
        card, (folder, _, last) = self.card, self.uri.rstrip("/").rpartition("/")
        if card.target_hook is None or card.with_targets:
            return bool(card.with_targets)
        if card.spec is not None:
            return card.spec.set is not None and card.spec.set.cross
        # The last layer has one target, like any transcoder. If it was imported, only its set tells.
        if not last.startswith(layer_folder(0)[:-1]):
            return False
        found = read_set_card(open_store(folder or ".", self.storage))
        return found is not None and found.cross

    @property
    def why_partial(self) -> str:
        """Why a layer of a cross-layer set has no figure that compares its prediction with its targets."""
        return f"{self.card.target_hook} is predicted by several layers together: evaluate their set"

    @property
    def why_fixed(self) -> str | None:
        """Why what the SAE gives cannot take the place of its rows in the subject; None if it can."""
        fixed = next((hook for hook in self.card.output_hooks if read_only(hook)), None)
        return None if fixed is None else f"the rows at {fixed} cannot be replaced"

    @property
    def left_out(self) -> dict[Family, str]:
        """Families that make no sense for this SAE, and why."""
        found: dict[Family, str] = {} if self.why_fixed is None else dict.fromkeys(REPLACING, self.why_fixed)
        if self.card.with_hooks or self.joined:
            why = "they are about an SAE that reads one hook of one subject"
            found |= dict.fromkeys(("compute", "stability", "ablation", "probes", "n2g", "judge"), why)
            return found | self.without_subject
        if found or self.without_subject:
            return found | self.without_subject
        return {"downstream": self.why_partial, "compute": self.why_partial} if self.partial else {}

    @cached_property
    def tail(self) -> Tail:
        """The subject from what the SAE writes to upwards: a transcoder's own target, else `hook`."""
        return Tail(self.subject, self.card.output_hooks[0])

    def held_out_codes(
        self, places: NDArray[np.int64] | None = None, *, targets: bool = False
    ) -> Iterator[Codes]:
        """Yield the codes of the stored rows of the sampled held-out windows; arguments as in `codes`."""
        plan = self.dataset.plan
        units = range(-(-len(self.windows) // plan.spec.windows_per_unit))
        # Rows are shuffled inside a unit, so a part of its windows is spread over all of it: whole units are
        # read, and the rows of other windows dropped.
        for codes in self.codes(units, places, targets=targets):
            inside = codes.windows < len(self.windows)
            if inside.all():
                yield codes
            elif inside.any():
                chosen = torch.from_numpy(inside).to(self.device)
                tensors = (codes.rows[chosen], codes.weights[chosen])
                yield Codes(
                    *tensors,
                    codes.windows[inside],
                    codes.positions[inside],
                    codes.values[chosen],
                    codes.indices[chosen],
                    None if codes.targets is None else codes.targets[chosen],
                )

    def codes(
        self, units: range, places: NDArray[np.int64] | None = None, *, targets: bool = False
    ) -> Iterator[Codes]:
        """Yield the codes of the stored rows of some units, at most `CHUNK_ROWS` at a time, unit by unit.

        Args:
            units: Numbers of the units.
            places: Take only the rows of these tokens, numbered `window * T + position`; None takes all.
            targets: Read a transcoder's targets as well.
        """
        context = self.dataset.plan.spec.context_length
        size = self.dataset.plan.rows_per_unit
        for unit in units:
            windows, positions = self.dataset.locate(np.arange(unit * size, (unit + 1) * size))
            for low in range(0, size, CHUNK_ROWS):
                part = slice(low, min(low + CHUNK_ROWS, size))
                at = np.arange(part.start, part.stop)
                # Before the chunk is read: where a row's token is follows from the plan, without any data.
                if places is not None:
                    at = at[np.isin(windows[part] * context + positions[part], places)]
                    if not len(at):
                        continue
                edges = (unit * size + part.start, unit * size + part.stop)
                rows = self._read(self.reads, edges)
                weights = torch.from_numpy(self.dataset.weights(self.hooks, *edges)).to(self.device)
                hooks = self.card.target_hooks if targets else ()
                wanted = self._read(hooks, edges) if hooks else None
                # Only what was asked for is encoded: the encoder's product is the expensive part.
                if len(at) < len(rows):
                    kept = torch.from_numpy(at - part.start).to(self.device)
                    rows, weights = rows[kept], weights[kept]
                    wanted = None if wanted is None else wanted[kept]
                with torch.no_grad():
                    values, indices = self.sae.encode(rows)
                yield Codes(rows, weights, windows[at], positions[at], values, indices, wanted)

    def _read(self, hooks: Sequence[str], edges: tuple[int, int]) -> Tensor:
        """Stored rows of some hooks, joined, on the SAE's device."""
        read = [self.dataset.read_rows(hook, *edges) for hook in hooks]
        return torch.from_numpy(read[0] if len(read) == 1 else np.concatenate(read, 1)).to(self.device)


def subjects_of(dataset: JoinedStore, stated: SubjectSpec, places: Mapping[str, str]) -> dict[str, Subject]:
    """Load the subject of each of several datasets, on the device of `stated`, and check its weights.

    Args:
        dataset: The datasets.
        stated: Its device and trust in code are those of every subject.
        places: Name -> where a subject's files are, if not where its plan says.

    Raises:
        ConfigError: A name that is none of the datasets', or nothing loadable is there.
        SaeMismatch: Weights are not those that were harvested.
    """
    planned = {name: part.plan.subject for name, part in dataset.parts.items()}
    found: dict[str, Subject] = {}
    for name, spec in subject_specs_of(planned, stated, places).items():
        say(f"loading the subject of {name}")
        found[name] = Subject.load(spec)
        check_subject(found[name].identity, planned[name])
    return found


def subject_specs_of(
    planned: Mapping[str, SubjectIdentity], stated: SubjectSpec, places: Mapping[str, str]
) -> dict[str, SubjectSpec]:
    """Return the spec that loads the subject of each of several datasets; arguments as for `subjects_of`.

    Raises:
        ConfigError: A name that is none of the datasets'.
    """
    if unknown := set(places) - set(planned):
        known = ", ".join(planned)
        raise ConfigError("evaluate.subjects", expected=f"names of {known}", got=sorted(unknown))
    found: dict[str, SubjectSpec] = {}
    for name, subject in planned.items():
        where: dict[str, Any] = {"device": stated.device, "device_map": stated.device_map}
        where["trust_remote_code"] = stated.trust_remote_code
        if name in places:
            where |= {"model": places[name], "revision": None}
        found[name] = subject.spec().model_copy(update=where)
    return found


def subject_spec_of(plan: HarvestPlan, stated: SubjectSpec | None = None) -> SubjectSpec:
    """Return the spec of the subject that a plan names, or `stated`, with the plan's attention for `auto`."""
    return plan.subject.spec(stated)
