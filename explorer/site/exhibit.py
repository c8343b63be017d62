"""What the server shows: SAEs with their indices, as the pages need them; nothing here needs the subject.

Letters: N latents.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from numpy.typing import NDArray

from winnow.evaluator.families.diffing import owners
from winnow.explorer.index.directions import unit_rows
from winnow.explorer.index.parts import AXIS
from winnow.explorer.index.table import FeatureTable
from winnow.sae.model import Sae
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError
from winnow.schemas.features import FeatureIndex
from winnow.schemas.fit import mismatch
from winnow.schemas.joined import split_hook
from winnow.schemas.window import WindowRule

AXES = {
    "density": "share of tokens on which it fires",
    "largest": "largest activation",
    "mean": "mean activation when it fires",
    "token_share": "share of its activation on its favourite token",
    "logit_peak": "logit of its most promoted token",
    "enc_dec_cosine": "cosine of encoder and decoder row",
    "direction_1": "its decoder row along the first principal component of all",
    "direction_2": "its decoder row along the second principal component of all",
}
"""The axes of the map, and their descriptions; a crosscoder has further ones (`Exhibit.own_axes`)."""
SHARED, NEITHER = "shared", "neither"
"""Whose a latent of a crosscoder is if it is no part's alone."""
_MAX_POINTS = 100_000
"""Points sent to the map; of more latents a fixed random choice is sent."""
_LABEL_TOKENS = 3
# 512 x N cosines are 2 GB of float32 at a million latents; all pairs would be N^2.
_SAMPLED = 512
"""Latents whose best match in another SAE the overview of two SAEs looks up."""


class SteeredPlace(NamedTuple):
    """Where a latent is steered."""

    subject: str
    """The name of the subject's dataset; empty if there is one subject."""
    hook: str
    """The hook, as the subject names it."""
    part: str
    """Of a crosscoder: the hook of the part as its card has it; empty otherwise."""


@dataclass
class Exhibit:
    """One SAE that the site shows.

    Attributes:
        name: The last part of its address.
        uri: Its address; no reply contains it.
        table: Its index.
        storage: Credentials and endpoint of its address.
        window: How a text begins that is read like a window of the dataset.
    """

    name: str
    uri: str
    table: FeatureTable
    storage: StorageSpec = field(default_factory=StorageSpec)
    window: WindowRule = field(default_factory=WindowRule)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _sae: Sae | None = None

    def sae(self, device: torch.device | None = None) -> Sae:
        """The SAE itself, loaded when it is first needed.

        Raises:
            SaeMismatch: It is not the one that was indexed.
        """
        # Under the lock: two first requests at once would load the SAE twice.
        with self._lock:
            if self._sae is None:
                self._sae = self.read()
            return self._sae.to(device) if device is not None else self._sae

    @property
    def held(self) -> Sae | None:
        """The SAE, if it is loaded."""
        return self._sae

    def read(self) -> Sae:
        """Read the SAE from its address; only the caller keeps it.

        Raises:
            SaeMismatch: It is not the one that was indexed.
        """
        sae, indexed = Sae.load(self.uri, storage=self.storage), self.table.meta.sae_sha256
        found = sae.card.weights_sha256 if sae.card else "none"
        # Somebody may train a new SAE to the same address while the server runs: the figures shown would
        # then be another SAE's.
        if found != indexed:
            fix = "Index it again"
            raise mismatch("weights", self.name, expected=indexed, of="the index", got=found, fix=fix)
        return sae

    def place(self, what: str, part: str = "") -> SteeredPlace:
        """Where a latent is steered or ablated.

        Args:
            what: What is asked for, for the message.
            part: Of a crosscoder: the part's name or hook.

        Raises:
            ConfigError: A crosscoder's part is not named, or it is a transcoder between subjects.
        """
        meta = self.table.meta
        found = next((one for one in meta.parts if part in (one.name, one.hook)), None)
        if found is not None:
            name, hook = split_hook(found.hook)
            return SteeredPlace(name, hook, found.hook)
        if meta.parts:
            raise ConfigError(
                f"{what} with {self.name}",
                expected=f"a part of it: {' or '.join(one.name for one in meta.parts)}",
                got=part or "none",
                fix="Name the part whose direction is meant, as `part`",
            )
        if part:
            raise ConfigError(f"{what} with {self.name}", expected="no part: it is no crosscoder", got=part)
        if meta.subjects:
            raise ConfigError(
                f"{what} with {self.name}",
                expected="an SAE of one subject, or a crosscoder",
                got=f"one of {', '.join((meta.hook, *meta.target_hooks))}",
                fix="`winnow attribute` tells what its latents do to a prediction",
            )
        return SteeredPlace("", meta.hook, "")

    # ---- all latents -----------------------------------------------------------------------------

    @property
    def own_axes(self) -> dict[str, str]:
        """The axes of this SAE alone: of a crosscoder, the relative norms in its parts."""
        return {
            AXIS + part.name: f"share of its decoder norm that is in {part.name}"
            for part in self.table.meta.parts
        }

    def axis(self, name: str) -> NDArray[np.float64]:
        """Values of one of `AXES` or `own_axes`, [N].

        Raises:
            ConfigError: There is no such axis, or the index is older than it.
        """
        if name == "density":
            return self.table.density()
        if name not in AXES | self.own_axes:
            known = ", ".join(AXES | self.own_axes)
            raise ConfigError(f"an axis of {self.name}", expected=f"one of {known}", got=name)
        if name not in self.table.summary.column_names:
            raise ConfigError(
                f"{name} of {self.name}",
                expected="an index that has it",
                got="an older one",
                fix="Delete the index and run `winnow index` again",
            )
        return self.table.column(name).astype(np.float64)

    @cached_property
    def _haystack(self) -> Any:
        """The text that a search looks through, one lower-case string per latent."""
        # Built with the first search and kept: Arrow then scans all latents in one call, where a loop over
        # Python strings would run again with every letter typed.
        texts = [text.lower() for text in self.table.texts]
        explained = self.table.explanations
        columns = [self.table.summary.column(name).to_pylist() for name in ("promoted", "token_ids")]
        lines: list[str] = []
        for number, lists in enumerate(zip(*columns, strict=True)):
            words = [texts[token] for tokens in lists for token in tokens]
            words += [each.text.lower() for each in explained.get(number, ())]
            lines.append("\n".join(words))
        return pa.array(lines)

    @cached_property
    def norms(self) -> NDArray[np.float64]:
        """Of a crosscoder: relative norms [N, H]; [N, 0] of others."""
        columns = [self.table.column(AXIS + part.name) for part in self.table.meta.parts]
        return np.stack(columns, axis=1) if columns else np.zeros((self.table.meta.latents, 0))

    @cached_property
    def _owners(self) -> NDArray[np.int64]:
        return owners(self.norms)

    @property
    def classes(self) -> list[str]:
        """Of a crosscoder, whose its latents may be: one part's alone, shared, or neither."""
        names = [part.name for part in self.table.meta.parts]
        return [*names, SHARED, NEITHER] if names else []

    def find(
        self, query: str, low: float, high: float, latents: list[int] | None = None, of: str = ""
    ) -> NDArray[np.int64]:
        """Latents with a density in [low, high] and `query` in their tokens or explanations, ascending.

        Args:
            query: Text, in any case; empty for all.
            low: Least density.
            high: Largest density.
            latents: Numbers among which is searched; None for all.
            of: One of `classes`; empty for all.

        Raises:
            ConfigError: `of` is no class of this SAE.
        """
        density = self.table.density()
        keep = (density >= low) & (density <= high)
        if of:
            if of not in self.classes:
                expected = ", ".join(self.classes) or "nothing: it is no crosscoder"
                raise ConfigError(f"of, for latents of {self.name}", expected=expected, got=of)
            # In the order of `classes`: the parts, then H for shared ones; -1 stands for the last.
            number = self.classes.index(of)
            keep &= self._owners == (-1 if of == NEITHER else number)
        if query:
            # pyarrow generates its functions at import, so type checkers do not know the attribute.
            match: Any = pyarrow.compute.__dict__["match_substring"]
            keep &= np.asarray(match(self._haystack, query.lower()))
        found = np.flatnonzero(keep)
        return found if latents is None else np.intersect1d(found, latents)

    def points(self, x: str, y: str, found: NDArray[np.int64]) -> dict[str, Any]:
        """The map: numbers and coordinates of latents, at most `_MAX_POINTS`."""
        # One seed, so that the same filters show the same points when the axes change.
        shown = found
        if len(found) > _MAX_POINTS:
            shown = np.sort(np.random.default_rng(0).choice(found, _MAX_POINTS, replace=False))
        return {
            "total": len(found),
            "latents": shown.tolist(),
            "x": _short(self.axis(x)[shown]),
            "y": _short(self.axis(y)[shown]),
        }

    def page(self, found: NDArray[np.int64], sort: str, descending: bool, offset: int, limit: int) -> Any:
        """One page of the list of latents."""
        keys = self.axis(sort)[found]
        # Ties by number, also when descending: without an order among equals a latent could be on two pages.
        order = np.lexsort((found, -keys if descending else keys))[offset : offset + limit]
        return {"total": len(found), "rows": [self.brief(int(number)) for number in found[order]]}

    # ---- one latent ------------------------------------------------------------------------------

    def brief(self, number: int) -> dict[str, Any]:
        """A latent in one line."""
        table = self.table
        explained = table.explanations.get(number)
        mine: dict[str, Any] = {}
        if self.classes:
            mine = {"owner": self.classes[self._owners[number]], "norms": self.norms[number].tolist()}
        return mine | {
            "latent": number,
            "density": float(table.column("fires")[number]) / max(table.meta.rows, 1),
            "largest": float(table.column("largest")[number]),
            "token_share": float(table.column("token_share")[number]),
            "explanation": explained[0].text if explained else None,
            "fires_on": self.words(table.summary.column("token_ids")[number].as_py()[:_LABEL_TOKENS]),
            "promotes": self.words(table.summary.column("promoted")[number].as_py()[:_LABEL_TOKENS]),
        }

    def words(self, ids: list[int]) -> list[str]:
        """Texts of token ids."""
        return [self.table.texts[number] for number in ids]

    def feature(self, number: int) -> dict[str, Any]:
        """All that a latent's page shows."""
        # The only read from storage per page: neighbours are described from the summary in memory.
        row = self.table.latent(number)
        page: dict[str, Any] = {"latent": number, "sae": self.name, "brief": self.brief(number)}
        page["figures"] = {
            name: row[name] for name in ("fires", "largest", "mean", "mean_square", "enc_dec_cosine")
        }
        page["quantiles"], page["histogram"] = row["quantiles"], row["histogram"]
        page["tokens"] = self.pairs(zip(row["token_ids"], row["token_shares"], strict=True))
        for name in ("promoted", "suppressed"):
            scores = row.get(f"{name}_logits", [])
            page[name] = self.pairs(zip(row.get(f"{name}_ids", []), scores, strict=True))
        for name in ("cosine", "coactive"):
            pairs = zip(row.get(f"{name}_ids", []), row.get(f"{name}_scores", []), strict=True)
            page[name] = [self.brief(other) | {"score": score} for other, score in pairs]
        page["parts"] = [self._part(number, at, row) for at in range(len(self.table.meta.parts))]
        page["explanations"] = [
            each.model_dump(mode="json") for each in self.table.explanations.get(number, [])
        ]
        page["examples"] = [self._example(each) for each in row["examples"]]
        return page

    def _part(self, number: int, at: int, row: dict[str, Any]) -> dict[str, Any]:
        """A part of a crosscoder as a latent's page shows it."""
        part = self.table.meta.parts[at]
        found: dict[str, Any] = {"name": part.name, "hook": part.hook}
        found["relative_norm"] = float(self.norms[number, at])
        for name in ("promoted", "suppressed"):
            scores = row.get(f"{name}_logits_{at}", [])
            found[name] = self.pairs(zip(row.get(f"{name}_ids_{at}", []), scores, strict=True))
        return found

    def _example(self, each: dict[str, Any]) -> dict[str, Any]:
        """An example with texts of its tokens; of a crosscoder with what each part contributes to each."""
        shares = [each.pop(f"part_{at}") for at in range(len(self.table.meta.parts))]
        short = {"tokens": self.words(each["tokens"]), "values": _short(np.asarray(each["values"]))}
        return each | short | ({"parts": [_short(np.asarray(one)) for one in shares]} if shares else {})

    def pairs(self, scored: Iterable[tuple[int, float]]) -> list[dict[str, Any]]:
        """Token ids and scores, with the tokens' texts."""
        return [{"token": self.table.texts[number], "id": number, "score": score} for number, score in scored]

    def facts(self) -> dict[str, Any]:
        """What the site says about this SAE."""
        meta, density = self.table.meta, self.table.density()
        # Silent latents have no logarithm; they are counted beside the histogram.
        alive = density > 0
        # A fixed range, so that the page can draw the histograms of two SAEs over each other.
        counts, edges = np.histogram(np.log10(density[alive]), bins=40, range=(-7, 0))
        return {
            "name": self.name,
            "sha256": meta.sae_sha256,
            "hook": meta.hook,
            "targets": list(meta.target_hooks),
            "parts": [
                {
                    "name": part.name,
                    "hook": part.hook,
                    "model": last_name(meta.subjects.get(split_hook(part.hook)[0], meta.subject).model),
                }
                for part in meta.parts
            ],
            "steers": bool(meta.parts) or not meta.subjects,
            "classes": self.classes,
            "reading": meta.spec.rows.words if meta.spec.rows is not None else "",
            "d_model": meta.d_model,
            "latents": meta.latents,
            "vocabulary": len(self.table.texts),
            "rows": meta.rows,
            "windows": meta.windows,
            "bos": self.window.bos,
            "silent": int((~alive).sum()),
            # The mean number of active latents per row is the sum of the densities.
            "l0": float(density.sum()),
            "bands": meta.spec.bands,
            "explained": len(self.table.explanations),
            "axes": [
                name
                for name in AXES | self.own_axes
                if name == "density" or name in self.table.summary.column_names
            ],
            "density_histogram": {
                "counts": counts.tolist(),
                "low": float(edges[0]),
                "high": float(edges[-1]),
            },
        }

    # ---- two SAEs --------------------------------------------------------------------------------

    @cached_property
    def directions(self) -> torch.Tensor:
        """Decoder rows of unit length [N, D], on the CPU."""
        # On the CPU: the GPU is the subject's, and these pages do not wait for it.
        return unit_rows(self.sae().W_dec.detach().float().cpu())


def matches(one: Exhibit, other: Exhibit, latent: int, count: int) -> list[dict[str, Any]]:
    """The `count` latents of `other` whose decoder rows have the highest cosine with that of `latent`."""
    _comparable(one, other)
    cosines = other.directions @ one.directions[latent]
    best = cosines.topk(min(count, len(cosines)))
    return [
        other.brief(number) | {"score": score}
        for number, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def overview(one: Exhibit, other: Exhibit) -> dict[str, Any]:
    """Histogram of the best cosine in `other` of up to 512 random latents of `one`, and 12 of the pairs."""
    _comparable(one, other)
    draw = np.random.default_rng(0).permutation(one.table.meta.latents)[:_SAMPLED]
    best = (one.directions[torch.from_numpy(draw)] @ other.directions.T).max(1)
    counts, _ = np.histogram(best.values.numpy(), bins=40, range=(0, 1))
    order = np.argsort(-best.values.numpy())
    # Evenly over the ranks, from best to worst: the best alone would flatter.
    chosen = [order[round(i)] for i in np.linspace(0, len(order) - 1, min(12, len(order)))]
    return {
        "sampled": len(draw),
        "counts": counts.tolist(),
        "low": 0.0,
        "high": 1.0,
        "median": float(best.values.median()),
        "over_0.9": float((best.values > 0.9).float().mean()),
        "pairs": [
            {
                "one": one.brief(int(draw[i])),
                "other": other.brief(int(best.indices[i])),
                "score": float(best.values[i]),
            }
            for i in chosen
        ],
    }


def _comparable(one: Exhibit, other: Exhibit) -> None:
    # The number of targets too: a decoder row of a layer of a cross-layer set spans all of them.
    metas = [each.table.meta for each in (one, other)]
    kinds = [(meta.d_model, len(meta.parts) or max(len(meta.target_hooks), 1)) for meta in metas]
    if kinds[0] != kinds[1]:
        shown = [f"{width} at {count} hook{'s' if count > 1 else ''}" for width, count in kinds]
        raise ConfigError(
            "these SAEs cannot be compared by direction",
            expected=f"the same width ({shown[0]})",
            got=shown[1],
        )


def subject_names(meta: FeatureIndex) -> str:
    """The name of an index's subject, or of all of them: without folders of the server's disk."""
    several = [subject.model for subject in meta.subjects.values()]
    return ", ".join(map(last_name, several or [meta.subject.model]))


def last_name(model: str) -> str:
    """The last part of a model's name: a path of the server's disk is nobody's business."""
    return model.rstrip("/").rsplit("/", 1)[-1]


def _short(values: NDArray[Any]) -> list[float]:
    """Numbers rounded to four significant digits."""
    # Enough for a pixel and a tooltip, and it keeps the JSON of 100,000 points small.
    return [float(f"{value:.4g}") for value in values.tolist()]
