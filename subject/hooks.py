"""Hooks: resolves the name of a place in a subject to a module. Pure: no weights, no forward pass.

::

    resid_pre.L    input of block L: the residual stream [W, T, D] before it
    resid_post.L   output of block L: the residual stream after it
    attn_out.L     what block L's attention adds to the residual stream
    mlp_out.L      what block L's MLP adds to the residual stream
    any.module.3   the output of that module (the first tensor, if it is a tuple)

`resid_post == resid_pre + attn_out + mlp_out` holds on every architecture of `LAYOUTS`, including blocks with
parallel attention and MLP (GPT-NeoX, Phi). If a block normalises the output of attention or MLP before
adding it (Gemma 2 and 3, OLMo 2 and 3), `attn_out` and `mlp_out` are read *after* that norm, since that
is what reaches the stream.

The table goes by the family of the *text* model: if that is a part of a larger one (Gemma 3 with its
vision tower), its blocks are found inside it. Architectures with several residual streams
(hyper-connections) have no `resid_pre` and `resid_post`: only module paths can be read there.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from winnow.schemas.errors import ConfigError
from winnow.schemas.subject import HOOK_SITES, parse_hook

log = logging.getLogger("winnow.subject")


class _BlockPaths(NamedTuple):
    """Paths of an architecture's blocks, and of the modules whose outputs a block adds."""

    blocks: str
    attention: str
    mlp: str


_LLAMA = _BlockPaths("model.layers", "self_attn", "mlp")
# The norms, not the attention and the MLP before them: what a block adds is the norm's output.
_POST_NORM = _BlockPaths("model.layers", "post_attention_layernorm", "post_feedforward_layernorm")

LAYOUTS: dict[str, _BlockPaths] = {
    "gpt2": _BlockPaths("transformer.h", "attn", "mlp"),
    "gpt_neox": _BlockPaths("gpt_neox.layers", "attention", "mlp"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _POST_NORM,
    "gemma3_text": _POST_NORM,
    "olmo": _LLAMA,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "phi": _LLAMA,
    "phi3": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA,
}
"""transformers' `model_type` of the text model -> paths. Add one only with a line in the test of the residual
identity."""

# With several streams a block's output was flattened and truncated to the first D numbers, without an error:
# a tiny DeepSeek V4 was harvested, sealed and verified clean with 32 of its rows' 128 numbers.
_STREAMS = ("hc_mult", "hc_count", "altup_num_inputs")
"""Config fields with the number of residual streams: DeepSeek V4 and HY V4, Qwen 4, Gemma 3n."""
_PARTS = ("self_attn", "linear_attn", "attention", "attn", "mixer", "mlp", "feed_forward")
"""Names in blocks of modules that read one stream and return one, for messages."""


@dataclass(frozen=True)
class Layout:
    """The blocks of one subject.

    Attributes:
        architecture: transformers' `model_type`.
        blocks: Dotted path of the list of blocks.
        layers: Number of blocks in the whole model.
        attention: Path, inside a block, of the module whose output attention adds; None if unknown.
        mlp: The same for the MLP.
        streams: How many residual streams a block passes on, as far as the config tells.
    """

    architecture: str
    blocks: str
    layers: int
    attention: str | None = None
    mlp: str | None = None
    streams: int = 1


@dataclass(frozen=True)
class Tap:
    """A hook resolved to a module.

    Attributes:
        hook: The name that was resolved.
        path: Dotted path of the module.
        reads_input: Read the module's input (only `resid_pre`), not its output.
        layer: The block that holds it; None for modules outside the blocks (embeddings, final norm, head).
    """

    hook: str
    path: str
    reads_input: bool
    layer: int | None

    @property
    def named(self) -> bool:
        """Whether the hook is one of the four sites, whose width is the model's D."""
        return parse_hook(self.hook) is not None


def find_layout(model: nn.Module, config: Any) -> Layout:
    """The layout of `model`: from the table, else its only list of `num_hidden_layers` modules (logged).

    If the model is more than a text model (vision, audio), only its text decoder is considered.

    Args:
        model: A causal language model of transformers.
        config: Its text config (`model_type`, `num_hidden_layers`).

    Raises:
        ConfigError: The architecture is not in the table and its blocks cannot be identified.
    """
    architecture, layers = str(config.model_type), int(getattr(config, "num_hidden_layers", None) or 0)
    streams = max(int(getattr(config, name, None) or 1) for name in _STREAMS)
    lists = _block_lists(model, layers)
    known = LAYOUTS.get(architecture)
    if known is not None:
        # By the last name of the path only: a composite keeps the same blocks under another prefix.
        name, parts = known.blocks.rpartition(".")[2], (known.attention, known.mlp)
        fitting = [path for path in lists if path.rpartition(".")[2] == name and _has(model, path, parts)]
        if len(fitting) == 1:
            return Layout(architecture, fitting[0], layers, *parts, streams)
    if len(lists) != 1:
        raise ConfigError(
            f"architecture {architecture!r} is unknown and its blocks cannot be told",
            expected=f"one list of {layers} modules",
            got=", ".join(lists) or "none",
            fix=f"Known architectures: {', '.join(LAYOUTS)}",
        )
    log.warning(
        "architecture %r is not in the table of hooks: using %s as its blocks; %smodule paths can be "
        "read, attn_out and mlp_out cannot",
        architecture,
        lists[0],
        "resid_pre, resid_post and " if streams == 1 else "",
    )
    return Layout(architecture, lists[0], layers, streams=streams)


def _block_lists(model: nn.Module, layers: int) -> list[str]:
    """Paths of the outermost lists of `layers` modules: of the text decoder, if it has any, else of all."""
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    # A list of experts inside a block may happen to be as long as the list of blocks.
    outer = [path for path in found if not any(path.startswith(other + ".") for other in found)]
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else None
    if decoder is None or decoder is model:
        return outer
    inside = {id(module) for module in decoder.modules()}
    return [path for path in outer if id(model.get_submodule(path)) in inside] or outer


def _has(model: nn.Module, blocks: str, parts: tuple[str, ...]) -> bool:
    """Whether the first block of a list has these modules."""
    names = {name for name, _ in model.get_submodule(f"{blocks}.0").named_modules()}
    return names.issuperset(parts)


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
    part = layout.attention if site == "attn_out" else layout.mlp
    if part is None:
        raise ConfigError(
            f"hook {hook!r}: where {layout.architecture!r} adds its {site[:-4]} output is not known",
            expected="resid_pre, resid_post or a module path",
            fix=f"Name the module itself; block {layer} is {block}",
        )
    return Tap(hook, f"{block}.{part}", False, layer)


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
    near = difflib.get_close_matches(hook, [*sites, *sorted(modules)], n=5, cutoff=0.5)
    raise ConfigError(
        f"hook {hook!r} is not a place in this {layout.architecture} subject",
        expected=f"{'|'.join(HOOK_SITES)} with a layer from 0 to {layout.layers - 1} (such as "
        f"{HOOK_SITES[1]}.0), or a module path",
        fix=f"Near ones: {', '.join(near)}" if near else None,
    )


def _check_layer(hook: str, layer: int, layout: Layout) -> None:
    if layer >= layout.layers:
        raise ConfigError(
            f"hook {hook!r}: layer out of range",
            expected=f"0 to {layout.layers - 1} ({layout.architecture} with {layout.layers} layers)",
            got=layer,
        )
