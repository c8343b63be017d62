"""Hooks: resolves the name of a place in a subject to a module. Pure: no weights, no forward pass.

::

    resid_pre.L    input of block L: the residual stream [W, T, D] before it
    attn_z.L       the heads of block L's attention, joined: what its output projection reads
    attn_out.L     what block L's attention adds to the residual stream
    resid_mid.L    the residual stream that the norm of block L's MLP reads
    mlp_in.L       what block L's MLP module is given, after that norm
    mlp_out.L      what block L's MLP adds to the residual stream
    router.L       the router's logits of block L, one for each expert, before softmax or sigmoid
    resid_post.L   output of block L: the residual stream after it
    any.module.3   the output of that module (the first tensor, if it is a tuple)

`resid_post == resid_pre + attn_out + mlp_out` holds on every architecture of `LAYOUTS`, including blocks with
parallel attention and MLP (GPT-NeoX, Phi), and `resid_mid == resid_pre + attn_out` on those without: in a
parallel block `resid_mid` is `resid_pre`. If a block normalises the output of attention or MLP before
adding it (Gemma 2 and 3, OLMo 2 and 3), `attn_out` and `mlp_out` are read *after* that norm, since that
is what reaches the stream. OLMo 2 and 3 have no norm before the MLP: there `mlp_in` equals `resid_mid`.

What replaces `resid_mid` replaces the stream, so that the block adds its MLP's output to it; what replaces
`mlp_in` is seen by the MLP only.

Where the layers of the MLP have no module of their own (OPT), `mlp_in` is what the first is given, and
`mlp_out` what the last gives.

`router` is read-only: a router gives its logits beside the experts that it has chosen from them, and only the
choice is used.

Architectures with several residual streams (hyper-connections) have none of these sites but `router`: only it
and module paths can be read there.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from winnow.schemas.errors import ConfigError
from winnow.schemas.subject import HOOK_SITES, parse_hook, parse_lens, read_only, reads_stream
from winnow.subject.layout import Layout

_PARTS = ("self_attn", "linear_attn", "attention", "attn", "mixer", "mlp", "feed_forward")
"""Names in blocks of modules that read one stream and return one, for messages."""


@dataclass(frozen=True)
class Tap:
    """A hook resolved to a module.

    Attributes:
        hook: The name that was resolved.
        path: Dotted path of the module.
        reads_input: Read the module's input, not its output.
        layer: The block that holds it; None for modules outside the blocks (embeddings, final norm, head).
        in_place: What replaces it is written into the tensor itself, because the block has another use of it.
        output: Which tensor, if the module's output is several.
    """

    hook: str
    path: str
    reads_input: bool
    layer: int | None
    in_place: bool = False
    output: int = 0

    @property
    def read_only(self) -> bool:
        """Whether nothing is computed from what is read there."""
        return read_only(self.hook)

    @property
    def of_stream(self) -> bool:
        """Whether the hook is a site whose width is the residual stream's."""
        return reads_stream(self.hook)

    @property
    def named(self) -> bool:
        """Whether the hook is one of the sites, and not a module path."""
        return parse_hook(self.hook) is not None


def resolve_hook(hook: str, layout: Layout, modules: Collection[str]) -> Tap:
    """Resolve a hook's name to a module.

    Args:
        hook: A site and a layer (`resid_post.9`) or a dotted module path.
        layout: The subject's blocks.
        modules: Dotted paths of every module of the whole model.

    Raises:
        ConfigError: No such hook (similar ones are listed), a layer out of range, or a site that is
            not known for this architecture.
    """
    named = parse_hook(hook)
    # `resid_post.09` would be a second name, and a second column, of `resid_post.9`.
    if named is None or f"{named[0]}.{named[1]}" != hook:
        return _resolve_path(hook, layout, modules)
    site, layer = named
    _check_layer(hook, layer, layout)
    block = f"{layout.blocks}.{layer}"
    if site in ("resid_pre", "resid_post"):
        if layout.streams > 1:
            parts = [f"{block}.{part}" for part in _PARTS if f"{block}.{part}" in modules]
            raise ConfigError(
                f"hook {hook!r}: {layout.architecture!r} has {layout.streams} residual streams, not one",
                expected="the path of a module that gives one tensor [windows, T, D]",
                fix=f"Name a module inside the block{', such as ' + ' or '.join(parts) if parts else ''}",
            )
        # The input of block L, not the output of block L - 1: layer 0 has no block before it.
        return Tap(hook, block, site == "resid_pre", layer)
    if site == "router":
        return _resolve_router(hook, layer, layout)
    parts = layout.parts[layer]
    if parts is None:
        what = f"adds its {site[:-4]} output" if site.endswith("_out") else "has the norm of its MLP"
        what = "has the projection of its heads" if site == "attn_z" else what
        raise ConfigError(
            f"hook {hook!r}: where {layout.architecture!r} {what} is not known",
            expected="resid_pre, resid_post or a module path",
            fix=f"Name the module itself; block {layer} is {block}",
        )
    if site == "attn_z":
        if parts.projection is None:
            raise ConfigError(
                f"hook {hook!r}: block {layer} of {layout.architecture!r} has no projection of heads that is "
                "known",
                expected="another site, or a module path",
                fix=f"Name the module itself; its attention is {block}.{parts.attention}",
            )
        return Tap(hook, f"{block}.{parts.projection}", True, layer)
    if site == "attn_out":
        return Tap(hook, f"{block}.{parts.attention_post_norm or parts.attention}", False, layer)
    if site == "mlp_out":
        return Tap(hook, f"{block}.{parts.mlp_post_norm or parts.mlp_last or parts.mlp}", False, layer)
    if site == "mlp_in":
        return Tap(hook, f"{block}.{parts.mlp}", True, layer)
    if parts.parallel:
        return Tap(hook, block, True, layer)
    # In place: the block adds the MLP's output to the same tensor that it gave to the norm. A replacement
    # that only the norm sees would leave the stream as it was.
    return Tap(hook, f"{block}.{parts.mlp_norm or parts.mlp}", True, layer, in_place=True)


def require_writable(hooks: Iterable[str]) -> None:
    """Check that what replaces the rows at some hooks would have an effect.

    Raises:
        ConfigError: One of them is read-only.
    """
    for hook in hooks:
        if read_only(hook):
            raise ConfigError(
                f"hook {hook!r} can be read but not replaced",
                expected="a place from which the block goes on to compute",
                got="a router's logits, beside which the experts are chosen already",
                fix="Replace mlp_out or the stream of the same layer",
            )


def _resolve_router(hook: str, layer: int, layout: Layout) -> Tap:
    router = layout.router(layer)
    if router is None:
        known = [number for number in range(layout.layers) if layout.router(number) is not None]
        raise ConfigError(
            f"hook {hook!r}: block {layer} of {layout.architecture!r} has no router of experts that is known",
            expected=f"one of the layers {', '.join(map(str, known))}" if known else "a mixture of experts",
            fix=f"Name a module; block {layer} is {layout.blocks}.{layer}",
        )
    return Tap(hook, f"{layout.blocks}.{layer}.{router.module}", False, layer, output=router.output)


def _resolve_path(hook: str, layout: Layout, modules: Collection[str]) -> Tap:
    prefix = layout.blocks + "."
    index = hook.removeprefix(prefix).split(".")[0] if hook.startswith(prefix) else ""
    layer = int(index) if index.isdecimal() else None
    # `modules` are of the whole model, since a truncated one no longer has the module that a message should
    # name.
    if hook and hook in modules:
        return Tap(hook, hook, False, layer)
    if layer is not None:
        _check_layer(hook, layer, layout)
    sites = [f"{site}.{number}" for site in HOOK_SITES for number in range(layout.layers)]
    ours = parse_lens(hook)
    near = difflib.get_close_matches(hook, [*sites, *sorted(modules)], n=5, cutoff=0.5)
    fix = f"Near ones: {', '.join(near)}" if near else None
    raise ConfigError(
        f"hook {hook!r} is not a place in this {layout.architecture} subject",
        expected=f"{'|'.join(HOOK_SITES)} with a layer from 0 to {layout.layers - 1} (such as "
        f"{HOOK_SITES[1]}.0), or a module path",
        fix=f"This is TransformerLens' name of {ours}" if ours in sites else fix,
    )


def _check_layer(hook: str, layer: int, layout: Layout) -> None:
    if layer >= layout.layers:
        raise ConfigError(
            f"hook {hook!r}: layer out of range",
            expected=f"0 to {layout.layers - 1} ({layout.architecture} with {layout.layers} layers)",
            got=layer,
        )
