"""The columns of the tokens that latents promote and suppress by their directions.

Letters: N latents, P latents of a part of the index, H parts of a crosscoder, D width of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from winnow.explorer.index.directions import DirectLogits, stream_rows
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

    def logits(hook: str) -> DirectLogits:
        name = split_hook(hook)[0]
        if name not in loaded:
            loaded[name] = DirectLogits(subjects[name].whole())
        return loaded[name]

    if not sae.parts.widths:
        whole, written = logits(card.output_hooks[0]), stream_rows(sae)
        return lambda first, stop: _columns(whole, written[first:stop], count)
    rows = sae.W_dec.detach().split(list(sae.parts.widths), dim=1)
    heads = [logits(hook) for hook in card.input_hooks]
    home = torch.stack([part.norm(dim=1) for part in rows]).argmax(dim=0).tolist()

    def columns(first: int, stop: int) -> dict[str, Any]:
        found = [_columns(head, part[first:stop], count) for head, part in zip(heads, rows, strict=True)]
        made = {f"{name}_{m}": column for m, part in enumerate(found) for name, column in part.items()}
        for name in found[0]:
            chosen = [found[home[first + i]][name][i].as_py() for i in range(stop - first)]
            made[name] = pa.array(chosen, found[0][name].type)
        return made

    return columns


def _columns(logits: DirectLogits, rows: Tensor, count: int) -> dict[str, Any]:
    """The four columns of some rows [P, D]."""
    kept = logits.extremes(rows, count)
    # A row of zeros promotes nothing, and its extremes would be any tokens.
    there = (rows.norm(dim=1) > 0).tolist()
    columns: dict[str, Any] = {}
    for name, ids, scores in (("promoted", kept.up_ids, kept.up), ("suppressed", kept.down_ids, kept.down)):
        for kind, of, each in (("ids", pa.uint32(), ids), ("logits", pa.float32(), scores)):
            told = [row if some else row[:0] for row, some in zip(each, there, strict=True)]
            columns[f"{name}_{kind}"] = lists(told, of)
    return columns
