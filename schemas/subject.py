"""Which language model is read, and where in it."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from winnow.schemas.base import Contract, HookName, Sha256

HOOK_SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")
"""The sites every common architecture has; anything else is a dotted module path."""

_NAMED = re.compile(rf"^({'|'.join(HOOK_SITES)})\.(\d+)$")


def parse_hook(name: str) -> tuple[str, int] | None:
    """`"resid_post.9"` -> `("resid_post", 9)`; None where `name` is a module path."""
    match = _NAMED.match(name)
    return (match[1], int(match[2])) if match else None


class SubjectSpec(Contract):
    """The subject model as the user names it."""

    model: str = Field(min_length=1)
    """A hub id, a local folder, a `.gguf` file, or `package://DIST/FILE.gguf` for weights that an
    installed Python distribution ships."""
    revision: str | None = None
    """Hub ids: branch, tag or commit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights and activations inside the LM. `auto`: float32 on a CPU (bfloat16 is several times
    slower there), bfloat16 on a GPU."""
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """For a subject larger than a card: how accelerate lays its layers over all the GPUs that the process
    sees (`harvest.gpus_per_actor` of them). Only GPUs: nothing is left to the CPU or a disk."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """The attention implementation of transformers. `auto`: sdpa where the architecture has it, else eager;
    for a dataset that has a plan, the plan's."""
    trust_remote_code: bool = False
    """Run model code that comes with the weights. Off: such a model is refused."""


class HookSite(Contract):
    """A hook, resolved against a subject."""

    name: HookName
    """`resid_post.9`, or a dotted module path."""
    d_model: int = Field(gt=0, le=1 << 20)
    """Width D of the activation read there."""


class SubjectIdentity(Contract):
    """The subject model as it was found: what a dataset's activations depend on."""

    model: str
    """As in `SubjectSpec.model`."""
    revision: str | None = None
    """The commit a hub id resolved to, where it is known."""
    architecture: str
    """transformers' `model_type`, such as `llama`."""
    weights_sha256: Sha256
    """Digest of the weight files in name order."""
    tokenizer_sha256: Sha256
    """Digest of the tokenizer's serialised form."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Resolved from `auto`."""
    attention: Literal["sdpa", "eager"]
    """Resolved from `auto`; `eager` for a model without attention."""
    layers: int = Field(gt=0)
    """Transformer blocks of the whole model."""
    vocabulary: int = Field(gt=0)
    """Rows V of the embedding."""
    context_limit: int | None = None
    """Longest context the model's config allows, in tokens."""
    bos_token_id: int | None = None
    """Beginning of sequence, where the tokenizer has one."""
    eos_token_id: int | None = None
    """End of sequence, where the tokenizer has one."""

    def spec(self, stated: SubjectSpec | None = None) -> SubjectSpec:
        """How to load this subject again.

        Args:
            stated: What a config says of it, which holds; attention that is `auto` there is this subject's.
        """
        if stated is None:
            return SubjectSpec(
                model=self.model, revision=self.revision, dtype=self.dtype, attention=self.attention
            )
        if stated.attention == "auto":
            return stated.model_copy(update={"attention": self.attention})
        return stated
