"""Proves by one short pass that the guessed parts of a subject's blocks are what reaches its residual stream.

A part whose name looks right but which is scaled, gated or added elsewhere would be stored, trained on and
reported without an error.

Letters: T positions of the pass, D width of the residual stream, L a layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from winnow.schemas.errors import ConfigError
from winnow.subject.causal import probe_ids
from winnow.subject.hooks import Tap, resolve_hook
from winnow.subject.layout import Layout
from winnow.subject.shapes import Block
from winnow.subject.splice import read_taps

log = logging.getLogger("winnow.subject")

_STREAM = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
# Two additions, each rounded to half a unit in the last place, and as much again.
_ROUNDINGS = 4.0
"""Largest difference that counts as rounding, in units of the dtype's epsilon and of the summed magnitudes.
Per number, not of the largest one: a few channels of a residual stream are thousands of times the others."""


def proved(
    model: nn.Module, layout: Layout, kept: int, run: Callable[[Tensor], object], vocabulary: int
) -> Layout:
    """The layout without the guessed parts that a pass does not confirm (logged).

    Confirmed are `resid_post = resid_pre + attn_out + mlp_out`, `resid_mid = resid_pre + attn_out` (in
    parallel blocks `resid_pre`), and that `mlp_in` is the MLP's norm of `resid_mid`.

    Args:
        model: The model, with its weights.
        layout: Its layout, with guessed parts.
        kept: Number of blocks that are there.
        run: Runs the model on ids int64 [2, T].
        vocabulary: V.
    """
    # Two windows: a block that flattens them (OPT) must do so in the order in which its output has them.
    ids = torch.stack([probe_ids(vocabulary), probe_ids(vocabulary).flip(0)])
    guessed = [layer for layer in range(kept) if layout.parts[layer] is not None]
    wrong: dict[int, str] = {}
    parts = list(layout.parts)
    taps = {
        layer: {site: resolve_hook(f"{site}.{layer}", layout, ()) for site in _STREAM} for layer in guessed
    }
    rows = _read(model, taps, run, ids)
    for layer in guessed:
        try:
            parts[layer] = _confirmed(model, layout, layer, rows.get(layer))
        except _Refuted as reason:
            wrong[layer], parts[layer] = str(reason), None
    for layer in _headless(model, layout, parts[:kept], run, ids):
        block = parts[layer]
        assert block is not None
        parts[layer] = replace(block, projection=None)
    if wrong:
        first = min(wrong)
        log.warning(
            "architecture %r: parts of %d of %d blocks are not what their names say (block %d: %s); "
            "attn_out, mlp_out, resid_mid and mlp_in cannot be read there",
            layout.architecture,
            len(wrong),
            kept,
            first,
            wrong[first],
        )
    return replace(layout, parts=tuple(parts))


def _read(
    model: nn.Module, taps: Mapping[int, Mapping[str, Tap]], run: Callable[[Tensor], object], ids: Tensor
) -> dict[int, dict[str, Tensor]]:
    """Layer -> name of a tap -> rows [2T, D]; layers with a tap that cannot be read are left out."""
    every = [tap for own in taps.values() for tap in own.values()]
    if not every:
        return {}
    try:
        with torch.no_grad():
            read = read_taps(model, every, lambda: run(ids), (ids.shape[0], ids.shape[1]))
    except ConfigError:
        # One pass for all layers is refused as a whole if one of them is odd: then each has its own.
        if len(taps) == 1:
            return {}
        alone = (_read(model, {layer: own}, run, ids) for layer, own in taps.items())
        return {layer: rows for found in alone for layer, rows in found.items()}
    return {
        layer: {name: read[tap.hook].flatten(0, 1) for name, tap in own.items()}
        for layer, own in taps.items()
    }


def _headless(
    model: nn.Module,
    layout: Layout,
    parts: Sequence[Block | None],
    run: Callable[[Tensor], object],
    ids: Tensor,
) -> list[int]:
    """Layers whose attention's output is not what its projection makes of what it reads."""
    taps = {
        layer: {
            "heads": resolve_hook(f"attn_z.{layer}", layout, ()),
            "whole": Tap(f"attention.{layer}", f"{layout.blocks}.{layer}.{block.attention}", False, layer),
        }
        for layer, block in enumerate(parts)
        if block is not None and block.projection is not None
    }
    rows = _read(model, taps, run, ids)
    return [layer for layer, own in taps.items() if not _projects(model, own["heads"], rows.get(layer))]


def _projects(model: nn.Module, heads: Tap, found: Mapping[str, Tensor] | None) -> bool:
    if found is None:
        return False
    try:
        with torch.no_grad():
            made = model.get_submodule(heads.path)(found["heads"][None])[0]
    except Exception:  # a layer of any signature may have such a name
        return False
    return made.shape == found["whole"].shape and _close(made, found["whole"])


def _close(made: Tensor, given: Tensor) -> bool:
    """Whether two tensors agree as two runs of one module do."""
    slack = 16 * torch.finfo(made.dtype).eps
    return torch.allclose(made.float(), given.float(), rtol=slack, atol=slack * float(given.abs().max()))


class _Refuted(Exception):
    """Why the parts are not what their names say."""


def _confirmed(model: nn.Module, layout: Layout, layer: int, found: Mapping[str, Tensor] | None) -> Block:
    """The block's parts, with what the numbers say of their order; raises `_Refuted`."""
    block = layout.parts[layer]
    assert block is not None
    if found is None:
        raise _Refuted("a part gives no row for each token")
    eps = torch.finfo(found["resid_pre"].dtype).eps
    pre, attention, middle, mlp, post = (
        found[site].double().cpu() for site in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    )
    if len({part.shape for part in (pre, attention, middle, mlp, post)}) > 1:
        raise _Refuted("a part has another width than the residual stream")
    bound = _ROUNDINGS * eps * (pre.abs() + attention.abs() + mlp.abs())

    def same(one: Tensor, other: Tensor) -> bool:
        return bool(((one - other).abs() <= bound).all())

    if not same(pre + attention + mlp, post):
        raise _Refuted("attention and MLP do not add up to what the block adds")
    # The names do not tell: GPT-NeoX has the same two norms in parallel and one after the other.
    if not same(middle, pre if block.parallel else pre + attention):
        if not same(middle, pre):
            raise _Refuted("its MLP's norm reads something else than the stream")
        block = replace(block, parallel=True)
    norm = layout.path(layer, "mlp_norm")
    given = found["resid_mid"][None]
    try:
        with torch.no_grad():
            given = given if norm is None else model.get_submodule(norm)(given)
    except Exception as error:  # a module of any signature may have such a name
        raise _Refuted(f"{norm} is no norm of one tensor") from error
    if given.shape[1:] != found["mlp_in"].shape or not _close(given[0], found["mlp_in"]):
        raise _Refuted("its MLP is given something else than that norm's output")
    return block
