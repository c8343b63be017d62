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
from winnow.subject.causal import LENGTH
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
        run: Runs the model on ids int64 [1, T].
        vocabulary: V.
    """
    ids = (vocabulary // 4 + torch.arange(LENGTH) * max(1, vocabulary // 64))[None] % vocabulary
    guessed = [layer for layer in range(kept) if layout.parts[layer] is not None]
    wrong: dict[int, str] = {}
    parts = list(layout.parts)
    rows = _read(model, layout, guessed, run, ids)
    for layer in guessed:
        found = rows.get(layer)
        if found is None:
            # One pass for all layers is refused as a whole where one of them is odd.
            found = _read(model, layout, [layer], run, ids).get(layer)
        try:
            parts[layer] = _confirmed(model, layout, layer, found)
        except _Refuted as reason:
            wrong[layer], parts[layer] = str(reason), None
    for layer in _headless(model, layout, parts, run, ids):
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
    model: nn.Module, layout: Layout, layers: list[int], run: Callable[[Tensor], object], ids: Tensor
) -> dict[int, dict[str, Tensor]]:
    """Layer -> site -> rows [T, D] in float64; nothing if any of them cannot be read."""
    taps: dict[tuple[int, str], Tap] = {}
    for layer in layers:
        for site in _STREAM:
            taps[layer, site] = resolve_hook(f"{site}.{layer}", layout, ())
    if not taps:
        return {}
    try:
        with torch.no_grad():
            read = read_taps(model, list(taps.values()), lambda: run(ids), (1, ids.shape[1]))
    except ConfigError:
        return {}
    found: dict[int, dict[str, Tensor]] = {}
    for (layer, site), tap in taps.items():
        found.setdefault(layer, {})[site] = read[tap.hook][0]
    return found


def _headless(
    model: nn.Module,
    layout: Layout,
    parts: Sequence[Block | None],
    run: Callable[[Tensor], object],
    ids: Tensor,
) -> list[int]:
    """Layers whose attention's output is not what its projection makes of what it reads."""
    wrong: list[int] = []
    for layer, block in enumerate(parts):
        if block is None or block.projection is None:
            continue
        heads = resolve_hook(f"attn_z.{layer}", layout, ())
        whole = Tap(f"attention.{layer}", f"{layout.blocks}.{layer}.{block.attention}", False, layer)
        try:
            with torch.no_grad():
                read = read_taps(model, [heads, whole], lambda: run(ids), (1, ids.shape[1]))
                made = model.get_submodule(heads.path)(read[heads.hook])
        except Exception:  # no rows, or a layer of another signature
            wrong.append(layer)
            continue
        slack = 16 * torch.finfo(made.dtype).eps
        given = read[whole.hook]
        if made.shape != given.shape or not torch.allclose(
            made.float(), given.float(), rtol=slack, atol=slack * float(given.abs().max())
        ):
            wrong.append(layer)
    return wrong


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
    slack = 16 * eps
    if given.shape[1:] != found["mlp_in"].shape or not torch.allclose(
        given[0].float(), found["mlp_in"].float(), rtol=slack, atol=slack * float(given.abs().max())
    ):
        raise _Refuted("its MLP is given something else than that norm's output")
    return block
