"""Which language model is read, and where in it."""

from __future__ import annotations

import re
from typing import Any, Literal, cast

from pydantic import Field

from winnow.schemas.base import Contract, HookName, Sha256

STREAM_SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "resid_mid", "mlp_in")
"""Sites whose rows are as wide as the residual stream."""
HOOK_SITES = (*STREAM_SITES, "attn_z", "router")
"""All sites: `router` is where a block has a mixture of experts. Any other place is named by a dotted module
path."""
READ_ONLY_SITES = ("router",)
"""Sites whose rows can be read but not replaced: nothing is computed from them there."""

# Anchored at both ends: `model.resid_post.9` is a module path, not a named site.
_NAMED = re.compile(rf"^({'|'.join(HOOK_SITES)})\.(\d+)$")

_RANGE = re.compile(rf"^({'|'.join(HOOK_SITES)})\.(\d{{1,3}})-(\d{{1,3}})$")


LENS_MODULE_SITES = {"mlp_in": "mlp.hook_in", "attn_z": "attn.hook_z"}
"""Sites that TransformerLens names after a module of the block."""
_LENS = re.compile(
    r"blocks\.(\d+)\.(hook_(?:resid_pre|attn_out|resid_mid|mlp_out|resid_post)|mlp\.hook_in|attn\.hook_z)"
)


def parse_lens(name: str | None) -> str | None:
    """`resid_post.9` for TransformerLens' name `blocks.9.hook_resid_post`; None for other names."""
    match = _LENS.fullmatch(name or "")
    if not match:
        return None
    sites = {name: site for site, name in LENS_MODULE_SITES.items()}
    return f"{sites.get(match[2], match[2].removeprefix('hook_'))}.{match[1]}"


def parse_hook(name: str) -> tuple[str, int] | None:
    """Split `"resid_post.9"` into `("resid_post", 9)`; return None if `name` is a module path."""
    match = _NAMED.match(name)
    return (match[1], int(match[2])) if match else None


def reads_stream(name: str) -> bool:
    """Whether a hook is one of `STREAM_SITES`."""
    named = parse_hook(name)
    return named is not None and named[0] in STREAM_SITES


def read_only(name: str) -> bool:
    """Whether a hook, of one dataset or of several (`base/router.9`), is one of `READ_ONLY_SITES`."""
    named = parse_hook(name.rpartition("/")[2])
    return named is not None and named[0] in READ_ONLY_SITES


def expand_hooks(names: Any) -> Any:
    """Replace each range of layers in a list of hooks: `mlp_in.0-2` by the hooks of layers 0 to 2."""
    if not isinstance(names, (list, tuple)):
        return names
    found: list[Any] = []
    for name in cast("list[Any]", names):
        match = _RANGE.match(name) if isinstance(name, str) else None
        # Only so many digits: a typing error must not make a list of millions of names.
        layers = range(int(match[2]), int(match[3]) + 1) if match else ()
        if match and not layers:
            raise ValueError(f"a range of layers runs upwards, got {name!r}")
        found += [f"{match[1]}.{layer}" for layer in layers] if match else [name]
    return found


Engine = Literal["transformers", "interp-engine", "interp-engine-vllm"]
"""What runs the subject in a harvest."""


class SubjectSpec(Contract):
    """The language model to read, as the user names it."""

    model: str = Field(min_length=1)
    """A hub id, a local folder, a `.gguf` file, or `package://DIST/FILE.gguf` for weights that an installed
    Python distribution ships."""
    revision: str | None = None
    """Of a hub id: branch, tag or commit. Null, the default, takes the hub's default branch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights and activations inside the model. `auto`: bfloat16 on a GPU, float32 on a CPU,
    where bfloat16 is several times slower."""
    device: str = "auto"
    """Device that runs it: `cpu`, `cuda`, `cuda:1`, or `auto`: a GPU if there is one, otherwise the CPU."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """For a subject larger than one GPU: how accelerate distributes its layers over the GPUs that the process
    sees (`harvest.gpus_per_actor` of them). A subject that does not fit on them is refused rather than partly
    placed on the CPU or a disk. Null, the default, uses one device."""
    tensor_parallel: int = Field(default=1, gt=0)
    """For a harvest of a subject larger than one GPU: processes that each hold a share of every weight
    matrix, by transformers' `tp_plan`. They run on the GPUs that the worker sees (`harvest.gpus_per_actor`
    of them), or on the CPU if there are none. 1, the default, divides nothing. Only a harvest divides."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention implementation of transformers. `auto`: that of the plan if the dataset has one; otherwise
    sdpa if the architecture supports it, and eager if not."""
    trust_remote_code: bool = False
    """Run code that comes with the weights. False, because such code can do anything; a model that needs it
    is then refused."""
    engine: Engine = "transformers"
    """What reads activations during a harvest. `interp-engine` is that library's eager backend and
    `interp-engine-vllm` its vLLM backend, for which a GPU is needed. Their rows are compared with those of
    transformers, which is loaded beside them (see `engine_check_every`); everything but the harvest runs
    transformers."""
    engine_check_every: int = Field(default=16, gt=0)
    """With another engine than transformers: of each worker's units, the first and every n-th after it are
    also read with transformers and compared before they are committed. 1 compares all."""
    engine_tolerance: float | None = Field(default=None, gt=0)
    """Largest difference that a compared row may have, as a fraction of its norm: |engine's row -
    transformers' row| / |transformers' row|; half of the rows of a pass must be within a fifth of it. A
    larger one ends the harvest. Null, the default, is 1e-4 if the subject runs in float32, and 0.25 in 16
    bits, where other kernels alone move single rows much farther."""


class HookSite(Contract):
    """A hook and the width that a subject has there."""

    name: HookName
    """Name of the hook: `resid_post.9`, or a dotted module path."""
    # Bounded, as a plan from elsewhere must not make a reader allocate what it merely claims.
    d_model: int = Field(gt=0, le=1 << 20)
    """Width D of the activations read there."""


class SubjectIdentity(Contract):
    """The subject model as it was found: what a dataset's activations depend on.

    Two subjects are the same if their digests are; `model` and `revision` only say where the files were.
    """

    model: str
    """The name that it was loaded by, as in `SubjectSpec.model`."""
    revision: str | None = None
    """The commit that a hub id resolved to; null if it is not known."""
    architecture: str
    """Model type of transformers, such as `llama`."""
    weights_sha256: Sha256
    """Digest of the weight files in the order of their names."""
    tokenizer_sha256: Sha256
    """Digest of the tokenizer in serialised form."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Type of weights and activations, resolved from `auto`."""
    attention: Literal["sdpa", "eager"]
    """Attention implementation, resolved from `auto`; `eager` for a model without attention."""
    layers: int = Field(gt=0)
    """Number of transformer blocks of the whole model."""
    vocabulary: int = Field(gt=0)
    """Vocabulary size V: rows of the embedding."""
    context_limit: int | None = None
    """Longest context that the model's config allows, in tokens; null if it sets no limit."""
    bos_token_id: int | None = None
    """Id of the token at the beginning of a sequence; null if the tokenizer has none."""
    eos_token_id: int | None = None
    """Id of the token at the end of a sequence; null if the tokenizer has none."""
    # Left out of the JSON where it says nothing new, so that older plans keep their fingerprints.
    engine: Engine = Field(default="transformers", exclude_if=lambda engine: engine == "transformers")
    """What read the activations; `attention` is then that of transformers, with which they were compared."""

    def spec(self, stated: SubjectSpec | None = None) -> SubjectSpec:
        """Return the spec that loads this subject again.

        Args:
            stated: A config's spec of it, which takes precedence; only `attention: auto` is replaced by this
                subject's.
        """
        if stated is None:
            return SubjectSpec(
                model=self.model,
                revision=self.revision,
                dtype=self.dtype,
                attention=self.attention,
                engine=self.engine,
            )
        # Another release of transformers may resolve `auto` differently, and sdpa ignored Gemma 2's cap of
        # attention logits on 4.51 to 5.20: the dataset's choice holds, not today's default.
        if stated.attention == "auto":
            return stated.model_copy(update={"attention": self.attention})
        return stated
