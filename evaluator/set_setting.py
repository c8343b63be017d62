"""What the families measure of a transcoder set: all of its layers on one dataset.

Letters: B rows, L layers, D width of the residual stream.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.common.device import resolve_device
from winnow.evaluator.setting import OnDataset, Setting, restricted, subject_spec_of
from winnow.sae.model import Sae, read_card, read_set_card
from winnow.sae.sets import TranscoderSet
from winnow.schemas.base import sha256_hex
from winnow.schemas.config import StorageSpec
from winnow.schemas.evaluation import FAMILIES, EvaluateSpec, Family
from winnow.schemas.fit import check_set, other_windows
from winnow.schemas.layers import WRITES
from winnow.schemas.sets import SetCard
from winnow.schemas.subject import SubjectSpec
from winnow.schemas.training import SaeIdentity
from winnow.store import ActivationStore
from winnow.store.objects import open_store

log = logging.getLogger("winnow.evaluator")

SET_FAMILIES: tuple[Family, ...] = ("reconstruction", "downstream", "compute")
"""Families of a whole set; the others are about single latents, and take one layer."""
_CHUNK_NUMBERS = 1 << 25
"""Numbers of stored rows that are read at a time, over all 2 L hooks: 134 MB of float32."""


class SetRows(NamedTuple):
    """Some stored rows of every layer."""

    reads: dict[int, Tensor]
    """Layer -> what it reads, float32 [B, D] in the raw scale."""
    targets: dict[int, Tensor]
    """Layer -> its MLP's output, float32 [B, D] in the raw scale."""
    windows: NDArray[np.int64]
    """[B]: number of the row's window in the dataset."""


@dataclass(frozen=True)
class SetSetting(OnDataset):
    """A transcoder set, and the dataset, subject and sample that it is measured on."""

    uri: str
    whole: TranscoderSet
    card: SetCard
    dataset: ActivationStore
    spec: EvaluateSpec
    subject_spec: SubjectSpec
    device: torch.device
    storage: StorageSpec = field(default_factory=StorageSpec)

    @classmethod
    def open(
        cls,
        uri: str,
        root: str,
        spec: EvaluateSpec | None = None,
        *,
        subject: SubjectSpec | None = None,
        storage: StorageSpec | None = None,
    ) -> SetSetting:
        """Load a set and open the dataset that it is measured on; arguments as for `Setting.open`.

        Raises:
            SaeMismatch: The dataset is of another subject, or lacks a hook that a layer reads or predicts.
            ConfigError: There is no dataset at `root`, or the set's layers differ in width.
            MissingObject, IntegrityError: There is no set at `uri`, or it is damaged.
        """
        storage = storage or StorageSpec()
        dataset = ActivationStore.open(root, storage)
        chosen = subject_spec_of(dataset.plan, subject)
        device = resolve_device(chosen.device)
        whole = TranscoderSet.load(uri, device=device, storage=storage)
        assert whole.card is not None
        check_set(uri, whole.card, whole.d_model, dataset.plan)
        if (warning := other_windows(uri, whole.card, dataset.plan)) is not None:
            log.warning(warning)
        spec, dataset = restricted(spec or EvaluateSpec(), whole.card.rows, dataset)
        return cls(uri, whole, whole.card, dataset, spec, chosen, device, storage)

    @property
    def hook(self) -> str:
        """The hook that the first layer reads."""
        return self.reads[0]

    @property
    def reads(self) -> tuple[str, ...]:
        """The hooks that the layers read, ascending."""
        return tuple(self.card.of.read_hook(layer) for layer in self.whole.layers)

    @property
    def hooks(self) -> tuple[str, ...]:
        """Every hook that is read or predicted."""
        return self.card.of.hooks

    @property
    def saes(self) -> dict[str, Sae]:
        """The hook that is read -> the layer's transcoder."""
        return {self.card.of.read_hook(layer): self.whole[layer] for layer in self.whole.layers}

    @property
    def sha256(self) -> str:
        """Digest of `set.json`, which holds those of all layers."""
        return sha256_hex(self.card.to_json())

    @property
    def latents(self) -> int:
        """Latents of all layers."""
        return sum(sae.latents for sae in self.saes.values())

    @property
    def k(self) -> int:
        """Active latents per row that the layers were trained for, together."""
        return sum(sae.k for sae in self.saes.values())

    @property
    def identity(self) -> SaeIdentity | None:
        """What it was trained on."""
        return self.card.identity

    @cached_property
    def left_out(self) -> dict[Family, str]:
        """Families that make no sense for a whole set, and why."""
        layer = f"{self.uri.rstrip('/')}/{self.card.layers[0].folder}"
        why = f"they are about the latents of one layer, such as {layer}"
        for_layers: dict[Family, str] = {family: why for family in FAMILIES if family not in SET_FAMILIES}
        return for_layers | self.without_subject

    def held_out_rows(self) -> Iterator[SetRows]:
        """Yield the stored rows of the sampled held-out windows that have weight 1 at every hook."""
        plan = self.dataset.plan
        size, count = plan.rows_per_unit, len(self.windows)
        numbers = 2 * len(self.whole.layers) * self.whole.d_model
        # Whole slices: the store reads and verifies no less.
        step = max(1, _CHUNK_NUMBERS // numbers // plan.rows_per_slice) * plan.rows_per_slice
        for unit in range(-(-count // plan.spec.windows_per_unit)):
            windows, _ = self.dataset.locate(np.arange(unit * size, (unit + 1) * size))
            for low in range(0, size, step):
                part = slice(low, min(low + step, size))
                edges = (unit * size + part.start, unit * size + part.stop)
                keep = (self.dataset.weights(self.hooks, *edges) > 0) & (windows[part] < count)
                if not keep.any():
                    continue
                found = {hook: self.dataset.read_rows(hook, *edges)[keep] for hook in self.hooks}
                rows = {hook: torch.from_numpy(each).to(self.device) for hook, each in found.items()}
                layers = zip(self.whole.layers, self.reads, strict=True)
                yield SetRows(
                    {layer: rows[hook] for layer, hook in layers},
                    {layer: rows[f"{WRITES}.{layer}"] for layer in self.whole.layers},
                    windows[part][keep],
                )


def named_root(uri: str, storage: StorageSpec | None = None) -> str | None:
    """Of an SAE of several datasets: the address of the first of them, as its card names it; else None.

    Raises:
        MissingObject: There is no SAE at `uri`.
    """
    store = open_store(uri, storage or StorageSpec())
    if read_set_card(store) is not None:
        return None
    return next(iter(read_card(store, uri).roots.values()), None)


def open_setting(
    uri: str,
    root: str,
    spec: EvaluateSpec | None = None,
    *,
    subject: SubjectSpec | None = None,
    storage: StorageSpec | None = None,
    judge_key: str | None = None,
    roots: dict[str, str] | None = None,
) -> Setting | SetSetting:
    """Open whatever is published at `uri`: a set, or one SAE; arguments and errors as for `Setting.open`."""
    if read_set_card(open_store(uri, storage or StorageSpec())) is not None:
        return SetSetting.open(uri, root, spec, subject=subject, storage=storage)
    return Setting.open(uri, root, spec, subject=subject, storage=storage, judge_key=judge_key, roots=roots)
