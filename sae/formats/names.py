"""Hooks by the names that other libraries give them."""

from __future__ import annotations

import re

from winnow.schemas.subject import HOOK_SITES, LENS_MODULE_SITES, READ_ONLY_SITES, parse_lens

# Not `hook_mlp_in`, which stands for two places: TransformerLens' stream before the MLP's norm and, in
# SAELens' files, the row after it that Gemma Scope 2's transcoders read.
LENS_ANY = re.compile(r"(?:.*\.)?hook_\w+")
MLP_INPUT = LENS_MODULE_SITES["mlp_in"]
"""`mlp_in`, the row after the MLP's norm, in TransformerLens 3's bridge to transformers; HookedTransformer
has no hook there."""
HEADS_JOINED = LENS_MODULE_SITES["attn_z"]
"""`attn_z`, by head: [B, T, heads, D / heads]."""
OURS = re.compile(rf"({'|'.join(HOOK_SITES)})\.(\d+)")
HOOK = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_MODULE = re.compile(r"(?P<head>(?:\w+\.)*)(?P<list>layers|h|blocks)\.(?P<layer>\d+)(?:\.(?P<rest>[\w.]+))?")
HEADS = {"layers": "model.", "h": "transformer.", "blocks": "transformer."}
"""Prefixes in a causal LM of lists of blocks whose names are relative to the base model."""
_ADDED = {"mlp": "mlp_out", "self_attn": "attn_out", "attn": "attn_out", "attention": "attn_out"}
"""Modules whose output a block adds to the stream, directly or after a norm."""


def to_lens(hook: str | None) -> str | None:
    """`resid_post.9` as TransformerLens names it, `blocks.9.hook_resid_post`; any other name unchanged.

    It has no name for a router's logits.
    """
    match = OURS.fullmatch(hook or "")
    if not match or match[1] in READ_ONLY_SITES:
        return hook
    return f"blocks.{match[2]}." + LENS_MODULE_SITES.get(match[1], f"hook_{match[1]}")


def is_at(hook: str | None, *sites: str) -> bool:
    """Whether a hook, by its name here or in TransformerLens, is at one of these sites."""
    match = OURS.fullmatch(parse_lens(hook) or hook or "")
    return match is not None and match[1] in sites


def from_lens(name: str | None) -> str | None:
    """The inverse of `to_lens`; None for a name that a card cannot hold."""
    # Names of places that Winnow does not read (`hook_q`) are kept: the card says where the SAE belongs.
    return parse_lens(name) or (name if name and HOOK.fullmatch(name) else None)


def is_lens_name(name: str | None) -> bool:
    """Whether a name is a hook point of TransformerLens and not a module of transformers' model."""
    return LENS_ANY.fullmatch(name or "") is not None


def module_path(name: str) -> str | None:
    """The path in the causal LM of a module relative to the base model: `layers.9.mlp`, `model.layers.9.mlp`.

    Whether the subject has the path is checked when it is read, with an error that names similar ones.
    """
    match = _MODULE.fullmatch(name)
    if not match:
        return None
    head = match["head"] or HEADS[match["list"]]
    # GPT-NeoX has `layers` too, but is the only family that calls a module `attention`. Its `mlp` looks like
    # any other's: that path is refused when it is read, with an error that names the right one.
    if not match["head"] and match["list"] == "layers" and (match["rest"] or "").startswith("attention"):
        head = "gpt_neox."
    path = f"{head}{match['list']}.{match['layer']}"
    return f"{path}.{match['rest']}" if match["rest"] else path


def from_module(name: str) -> tuple[str | None, str | None]:
    """The input and the output of a module as hooks, for sparsify's folders, which are named after modules.

    `layers.9` is a block: `resid_pre.9` and `resid_post.9`. Of any other module Winnow reads the output only.
    """
    match = _MODULE.fullmatch(name)
    if match and not match["rest"]:
        return f"resid_pre.{match['layer']}", f"resid_post.{match['layer']}"
    return None, module_path(name)


def added_note(hook: str | None) -> tuple[str, ...]:
    """A note on a hook at a module whose output some families norm before they add it."""
    match = _MODULE.fullmatch(hook or "")
    site = _ADDED.get(match["rest"] or "") if match else None
    if match is None or site is None:
        return ()
    return (
        f"it reads {hook}, the module's own output; {site}.{match['layer']} holds the same rows unless the "
        "family norms them first (Gemma 2 and 3, OLMo 2 and 3): --hook takes either one",
    )


def hooked_note(hook: str | None) -> tuple[str, ...]:
    """A note on an SAE of `attn_out` or `mlp_out` for a library that hooks modules; see `added_note`."""
    match = OURS.fullmatch(hook or "")
    if match is None or match[1] not in _ADDED.values():
        return ()
    norm = "post_attention_layernorm" if match[1] == "attn_out" else "post_feedforward_layernorm"
    return (
        f"{hook} is what is added to the stream: on Gemma 2 and 3 and OLMo 2 and 3 hook "
        f"layers.{match[2]}.{norm} for it, on other families the module itself",
    )


def layer_of(hook: str | None) -> int | None:
    """The layer of one of Winnow's own hooks."""
    match = OURS.fullmatch(hook or "")
    return int(match[2]) if match else None
