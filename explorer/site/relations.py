"""Which latents of other layers of a transcoder set feed a latent, and which it feeds.

By the direct path: what a latent writes to the MLP outputs of the layers between reaches what a later one
reads through the residual stream, without attention (docs/explorer.md, "Across layers"). By weights alone
the strongest pairs are often never active together ("interference"; Ameisen et al. 2025, "Circuit Tracing",
global weights), so each weight is also multiplied by what happens on rows on which the latent fires.

Letters: E rows of the sample, N latents of a layer, D width of the residual stream, O width of a layer's
output (D for each of its targets), M entries of a list.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.evaluator.circuits.norms import HeldNorm
from winnow.explorer.index.latents import TOP_BAND
from winnow.explorer.site.exhibit import Exhibit
from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError
from winnow.schemas.subject import parse_hook
from winnow.store import ActivationStore
from winnow.store.format import layout
from winnow.subject.load import Subject

# A layer of 65,536 latents at D = 768 has 0.4 GB: ten of them; of larger ones each is read anew.
_HELD_BYTES = 4 << 30
"""Most bytes of transcoders that are kept between questions; one is held in any case."""


class Sample(NamedTuple):
    """Rows on which a latent fires, from its examples in the index."""

    window: NDArray[np.int64]
    """[E]"""
    position: NDArray[np.int64]
    """Position of each in its window, [E]."""
    activation: Tensor
    """The latent's activation there, float32 [E]."""
    share: Tensor
    """The share of all rows on which it fires that each stands for, float32 [E]; they sum to 1."""

    @classmethod
    def of(cls, row: Mapping[str, Any], bands: int) -> Sample:
        """The rows drawn from each band of a latent's activations; if there are none, its best windows."""
        drawn = [each for each in row["examples"] if each["band"] != TOP_BAND]
        # The strongest windows are no fair draw; beside drawn ones they would count what is rare as common.
        chosen = drawn or row["examples"]
        # As `latents.choose` divides the activations into bands.
        sizes = np.diff(np.linspace(0, row["fires"], bands + 1).astype(np.int64))
        of_band = np.asarray([each["band"] for each in chosen], np.int64)
        each_counts = np.ones(len(chosen))
        if drawn:
            each_counts = (sizes / np.maximum(np.bincount(of_band, minlength=bands), 1))[of_band]
        values = [each["values"][each["position"] - each["first"]] for each in chosen]
        return cls(
            np.asarray([each["window"] for each in chosen], np.int64),
            np.asarray([each["position"] for each in chosen], np.int64),
            torch.tensor(values, dtype=torch.float32),
            torch.from_numpy(each_counts / max(each_counts.sum(), 1e-30)).float(),
        )


class _Candidates(NamedTuple):
    """Latents of one other layer, best first by one of the two measures."""

    layer: int
    latent: Tensor
    weight: Tensor
    expected: Tensor
    together: Tensor


class Relations:
    """Answers for the latents of one set.

    Args:
        layers: Layer -> its index, of the layers that are indexed.
        numbers: Layer -> the number under which the site shows it.
        dataset: Opens the dataset; None if it is not available: then there are weights only.
        subject: Gives the subject, for the norms of sets that read `mlp_in`; None if there is none.
    """

    def __init__(
        self,
        layers: Mapping[int, Exhibit],
        numbers: Mapping[int, int],
        dataset: Callable[[], ActivationStore] | None,
        subject: Callable[[], Subject] | None,
    ) -> None:
        self._layers, self._numbers = dict(sorted(layers.items())), numbers
        self._dataset, self._subject = dataset, subject
        self._held: OrderedDict[int, Sae] = OrderedDict()

    @torch.no_grad()
    def of(self, layer: int, latent: int, count: int) -> dict[str, Any]:
        """The latents of other layers that feed a latent, and those that it feeds, `count` of each list.

        Layers are read one after another: beside the transcoders that are kept, this holds a few vectors [N].

        Raises:
            ConfigError: No such latent, or a set that is not linear in what it reads.
        """
        exhibit = self._layers[layer]
        meta, row = exhibit.table.meta, exhibit.table.latent(latent)
        sample = Sample.of(row, meta.spec.bands) if row["fires"] and self._at_hand(exhibit) else None
        own = self._sae(layer)
        reads = self._norm(layer, own.W_enc[latent].cpu() / own.input_scale.cpu())
        writes = _by_target(own, own.W_dec[latent] * own.target_norm.to(own.W_dec), meta.target_hooks)
        found: dict[str, list[_Candidates]] = {"inputs": [], "outputs": []}
        for other in self._layers:
            if other == layer:
                continue
            sae = self._sae(other)
            if other < layer:
                weight = self._from(other, sae, reads, below=layer)
            else:
                weight = self._to(other, sae, writes)
            expected, together = self._on_rows(other, sae, weight, sample, feeds=other < layer)
            side = "inputs" if other < layer else "outputs"
            found[side] += _best(other, weight, expected, together, count)
        return {
            "layer": layer,
            "layers": list(self._layers),
            "rows": 0 if sample is None else len(sample.window),
            "drawn": any(each["band"] != TOP_BAND for each in row["examples"]),
        } | {side: self._described(each, count, sample is not None) for side, each in found.items()}

    # ---- weights ---------------------------------------------------------------------------------

    def _from(self, layer: int, sae: Sae, reads: Tensor, below: int) -> Tensor:
        """Weights [N] of an earlier layer's latents on what `reads` [D] reads at layer `below`."""
        targets = _targets(self._layers[layer].table.meta.target_hooks)
        # What is written at `below` itself comes after that layer has read the stream.
        reached = torch.cat([reads if target < below else torch.zeros_like(reads) for target in targets])
        return (sae.W_dec @ (reached.to(sae.W_dec) * sae.target_norm.to(sae.W_dec))).float().cpu()

    def _to(self, layer: int, sae: Sae, writes: Mapping[int, Tensor]) -> Tensor:
        """Weights [N] on a later layer's latents of what is written to each target."""
        stream = torch.stack([rows for target, rows in writes.items() if target < layer]).sum(0)
        stream = self._norm(layer, stream.cpu(), forward=True)
        return (sae.W_enc @ stream.to(sae.W_enc) / sae.input_scale).float().cpu()

    def _norm(self, layer: int, rows: Tensor, *, forward: bool = False) -> Tensor:
        """Take a vector [D] through the norm of a layer's MLP, if the set reads behind it.

        Its denominator, which differs from row to row, is taken as 1. Not `forward`: the transposed map, of
        an encoder row to the stream.
        """
        named = parse_hook(self._layers[layer].table.meta.hook)
        if named is None or named[0] != "mlp_in":
            return rows
        if self._subject is None:
            raise ConfigError(
                "a set that reads `mlp_in`",
                expected="its subject, for the gains of the norms",
                got="none",
                fix="Name it in --config FILE",
            )
        norm = _linear_norm(self._subject(), layer)
        if norm is None:
            return rows
        rows = rows.float()
        if not forward:
            rows = norm.gain * rows
            return rows - rows.mean() if norm.centred else rows
        return norm.gain * (rows - rows.mean() if norm.centred else rows)

    def _sae(self, layer: int) -> Sae:
        """A layer's transcoder: the one that the site holds already, or one of the last that were read."""
        exhibit = self._layers[layer]
        if layer not in self._held:
            sae = exhibit.held or exhibit.read()
            if sae.normalize_mode == "layer" or sae.parts.centred:
                raise ConfigError(
                    f"the normalisation of layer {layer}",
                    expected="`dataset` or `none`, with which latents are linear in the stream",
                    got="centred rows" if sae.parts.centred else "layer",
                )
            self._held[layer] = sae
        self._held.move_to_end(layer)
        sizes = {at: 4 * (sae.W_enc.numel() + sae.W_dec.numel()) for at, sae in self._held.items()}
        while len(self._held) > 1 and sum(sizes.values()) > _HELD_BYTES:
            sizes.pop(self._held.popitem(last=False)[0])
        return self._held[layer]

    # ---- rows ------------------------------------------------------------------------------------

    def _at_hand(self, exhibit: Exhibit) -> bool:
        # Windows of another plan have other numbers.
        plan = exhibit.table.meta.plan_fingerprint
        return self._dataset is not None and self._dataset().plan.fingerprint == plan

    def _on_rows(
        self, layer: int, sae: Sae, weight: Tensor, sample: Sample | None, *, feeds: bool
    ) -> tuple[Tensor, Tensor]:
        """Expected attributions [N], and on which share [N] of the sample each latent fires too."""
        expected, together = torch.zeros_like(weight), torch.zeros_like(weight)
        if sample is None or self._dataset is None:
            return expected, together
        rows, read = stored_rows(self._dataset(), self._layers[layer].table.meta.hook, sample)
        values, indices = sae.encode(rows.to(sae.W_enc.device))
        values, indices = values.float().cpu() * read[:, None], indices.cpu()
        active = (values > 0).float()
        together.index_add_(0, indices.flatten(), (active * sample.share[:, None]).flatten())
        if feeds:
            # TWERA: E[a_target a_source] / E[a_target], both over the rows on which the target fires.
            each = sample.share * sample.activation
            per_slot = values * (each / each.sum())[:, None]
        else:
            # ERA: E[1(a_target > 0) a_source], over the rows on which the source fires.
            per_slot = active * (sample.share * sample.activation)[:, None]
        expected.index_add_(0, indices.flatten(), per_slot.flatten())
        return weight * expected, together

    def _described(self, found: list[_Candidates], count: int, known: bool) -> dict[str, Any]:
        """Both lists of one side, over all layers."""
        entries = {
            (each.layer, latent): {
                "sae": self._numbers[each.layer],
                "layer": each.layer,
                "weight": weight,
                "expected": expected if known else None,
                "together": together if known else None,
            }
            for each in found
            for latent, weight, expected, together in zip(
                *(column.tolist() for column in each[1:]), strict=True
            )
        }

        def by(name: str) -> list[dict[str, Any]]:
            # Ties by number: the same question must give the same answer.
            ranked = sorted((-abs(entry[name]), place) for place, entry in entries.items() if entry[name])
            return [
                self._layers[layer].brief(latent) | entries[layer, latent]
                for _, (layer, latent) in ranked[:count]
            ]

        return {"by_weight": by("weight"), "expected": by("expected")}


def stored_rows(dataset: ActivationStore, hook: str, sample: Sample) -> tuple[Tensor, Tensor]:
    """The stored rows of a sample, float32 [E, D], and whether each was read by the SAE of `hook`, [E]."""
    plan = dataset.plan
    unit, window = np.divmod(sample.window, plan.spec.windows_per_unit)
    planned = window * plan.rows_per_window + sample.position - plan.spec.drop_leading
    rows = np.empty((len(planned), dataset.d_model(hook)), np.float32)
    read = np.empty(len(planned), np.float32)
    for one in np.unique(unit):
        # Rows are shuffled within their unit.
        place_of = np.argsort(layout.row_permutation(plan, int(one)))
        first = int(one) * plan.rows_per_unit
        weights = dataset.weights([hook], first, first + plan.rows_per_unit)
        for at in np.flatnonzero(unit == one):
            place = int(place_of[planned[at]])
            rows[at], read[at] = dataset.read_rows(hook, first + place, first + place + 1)[0], weights[place]
    return torch.from_numpy(rows), torch.from_numpy(read)


def _targets(hooks: tuple[str, ...]) -> list[int]:
    """The layers of target hooks."""
    return [named[1] for named in map(parse_hook, hooks) if named is not None]


def _by_target(sae: Sae, row: Tensor, hooks: tuple[str, ...]) -> dict[int, Tensor]:
    """A decoder row [O] by the layer that it is written to, [D] each."""
    return dict(zip(_targets(hooks), row.split(sae.d_model), strict=True))


def _best(layer: int, weight: Tensor, expected: Tensor, together: Tensor, count: int) -> list[_Candidates]:
    """A layer's candidates for either list."""
    found: list[_Candidates] = []
    for measure in (weight, expected):
        best = measure.abs().topk(min(count, len(measure))).indices
        found.append(_Candidates(layer, best, weight[best], expected[best], together[best]))
    return found


def _linear_norm(subject: Subject, layer: int) -> HeldNorm | None:
    """The norm in front of a layer's MLP as a linear map; None if the block has none there (OLMo 2)."""
    path = subject.layout.path(layer, "mlp_norm")
    if path is None:
        return None
    # A copy in float32: in bfloat16 no norm is linear to four digits.
    module = copy.deepcopy(subject.model.get_submodule(path)).float().cpu()
    width = subject.d_model
    probe = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    held = HeldNorm.fit(module, probe, module(probe))
    if held is None:
        raise ConfigError(
            f"the norm in front of the MLP of layer {layer}",
            expected="an RMSNorm or LayerNorm",
            got=type(module).__name__,
        )
    return held
