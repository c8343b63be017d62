"""Hooks under the names that other libraries have for them."""

from __future__ import annotations

import re

LENS = re.compile(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|attn_out|mlp_out)")
OURS = re.compile(r"(resid_pre|resid_post|attn_out|mlp_out)\.(\d+)")
MODULE = re.compile(r"(?:model\.|gpt_neox\.|transformer\.)?(?:layers|h|blocks)\.(\d+)(?:\.(\w+))?")
PARTS = {
    None: "resid_post",
    "mlp": "mlp_out",
    "self_attn": "attn_out",
    "attn": "attn_out",
    "attention": "attn_out",
}


def to_lens(hook: str | None) -> str | None:
    """`resid_post.9` as TransformerLens says it, `blocks.9.hook_resid_post`; any other name as it is."""
    match = OURS.fullmatch(hook or "")
    return f"blocks.{match[2]}.hook_{match[1]}" if match else hook


def from_lens(name: str | None) -> str | None:
    """The inverse of `to_lens`; None where the name is none that Winnow could hold."""
    match = LENS.fullmatch(name or "")
    if match:
        return f"{match[2]}.{match[1]}"
    return name if name and re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", name) else None


def from_module(name: str) -> str | None:
    """A folder that is called after a module, as sparsify's are: `layers.9` is `resid_post.9`."""
    match = MODULE.fullmatch(name)
    return f"{PARTS[match[2]]}.{match[1]}" if match and match[2] in PARTS else None


def layer_of(hook: str | None) -> int | None:
    """The layer of one of Winnow's own hooks."""
    match = OURS.fullmatch(hook or "")
    return int(match[2]) if match else None
