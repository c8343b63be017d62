"""The columns of the tokens that latents promote and suppress by their directions.

Letters: N latents, P latents of a part of the index, H parts of a crosscoder, D width of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from winnow.explorer.index.directions import DirectLogits, added_rows, stream_rows
from winnow.explorer.index.subjects import LazySubject
from winnow.explorer.index.table import lists
from winnow.sae.model import Sae
from winnow.schemas.joined import split_hook
from winnow.schemas.training import SaeCard


def promoted_columns(
    sae: Sae, card: SaeCard, subjects: Mapping[str, LazySubject], count: int
) -> Callable[[int, int], dict[str, Any]]:
    """A function from a range of latents to its columns; there are none if `count` is 0.

    Of a crosscoder every part's rows are read in its own subject: the columns end with the part's number,
    and those without a number are of the part in which the latent's row is longest.

    Args:
        sae: The SAE.
        card: Its card, which names its hooks.
        subjects: Name of the dataset -> its subject, which is loaded; the name is empty if there is one.
        count: Tokens listed on each side.
    """
    if not count:
        return lambda *_: {}
    loaded: dict[str, DirectLogits] = {}

    def of(hook: str, rows: Tensor) -> dict[str, Any]:
        name, own = split_hook(hook)
        subject = subjects[name].whole()
        if name not in loaded:
            loaded[name] = DirectLogits(subject)
        return _columns(loaded[name], rows, added_rows(subject, own, rows), count)

    if not sae.parts.widths:
        written = stream_rows(sae)
        return lambda first, stop: of(card.output_hooks[0], written[first:stop])
    rows = sae.W_dec.detach().split(list(sae.parts.widths), dim=1)
    home = torch.stack([part.norm(dim=1) for part in rows]).argmax(dim=0).tolist()

    def columns(first: int, stop: int) -> dict[str, Any]:
        parts = zip(card.input_hooks, rows, strict=True)
        found = [of(hook, part[first:stop]) for hook, part in parts]
        made = {f"{name}_{m}": column for m, part in enumerate(found) for name, column in part.items()}
        for name in found[0]:
            chosen = [found[home[first + i]][name][i].as_py() for i in range(stop - first)]
            made[name] = pa.array(chosen, found[0][name].type)
        return made

    return columns


def _columns(logits: DirectLogits, rows: Tensor, added: Tensor, count: int) -> dict[str, Any]:
    """The four columns of some rows [P, D] of the decoder, given what they add to the stream."""
    kept = logits.extremes(added, count)
    # A row of zeros promotes nothing, and its extremes would be any tokens.
    there = (rows.norm(dim=1) > 0).tolist()
    columns: dict[str, Any] = {}
    for name, ids, scores in (("promoted", kept.up_ids, kept.up), ("suppressed", kept.down_ids, kept.down)):
        for kind, of, each in (("ids", pa.uint32(), ids), ("logits", pa.float32(), scores)):
            told = [row if some else row[:0] for row, some in zip(each, there, strict=True)]
            columns[f"{name}_{kind}"] = lists(told, of)
    return columns
