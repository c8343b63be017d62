"""The parts of a block by their names, for architectures outside the table. Pure: no weights, no pass.

Most causal LMs of transformers keep attention and MLP, and the norms before or after them, under a few names.
A name proves nothing: a block may scale what it adds (Granite), or read another module's output. So a shape
found here is only a guess until `winnow.subject.prove` has run the subject.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """Paths, inside a block, of its modules.

    One after the other: `mid = stream + post(attention(norm(stream)))`, then
    `mid + post(mlp(norm(mid)))`. In parallel, both read the stream that enters the block.

    Attributes:
        attention: The attention module; in hybrids the linear attention, state-space layer or convolution
            that has its place.
        mlp: The MLP module, or mixture of experts; the first of its layers if they have no module of their
            own (OPT's `fc1`).
        attention_norm: Norm of what attention reads; None if it reads the stream itself (OLMo 2 and 3).
        mlp_norm: Norm of what the MLP reads, which may be attention's too (Phi); None as above.
        attention_post_norm: Norm of what attention gives, before it is added; None if it is added as it is.
        mlp_post_norm: The same for the MLP.
        parallel: Whether attention and MLP run in parallel.
        projection: The linear layer that makes attention's output of all heads, joined; None if attention has
            no heads or another name for it.
        mlp_last: The last layer of an MLP whose layers have no module of their own (OPT's `fc2`); None if
            `mlp` is the whole.
    """

    attention: str
    mlp: str
    attention_norm: str | None
    mlp_norm: str | None
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    parallel: bool = False
    projection: str | None = None
    mlp_last: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """All of them that the block has."""
        found = (
            self.attention, self.mlp, self.attention_norm, self.mlp_norm,
            self.attention_post_norm, self.mlp_post_norm, self.projection, self.mlp_last,
        )  # fmt: skip
        return tuple(path for path in found if path is not None)


@dataclass(frozen=True)
class Router:
    """Paths, inside a block, of what chooses the experts for each token, and of the experts.

    Attributes:
        module: The module whose output holds the logits.
        experts: The experts, which are given the choice.
        output: Which of the module's outputs the logits are.
    """

    module: str
    experts: str
    output: int = 0


# Names in transformers 5.23, in the order in which they are tried.
_WITH_HEADS = (
    "self_attn", "attn", "self_attention", "attention", "multi_head_attention", "norm_attn_norm.attn",
)  # fmt: skip
_HEADLESS = ("linear_attn", "mamba", "conv", "temporal_block", "mlstm_layer")
_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""Names, inside attention, of the layer after the heads."""
_MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "mlp_block")
_BEFORE_ATTENTION = (
    "input_layernorm", "ln_1", "attention_layernorm", "attn_norm", "norm_1", "operator_norm", "layernorm1",
    "norm_attn_norm.norm_1", "ln_attn", "temporal_pre_norm", "norm_mlstm",
)  # fmt: skip
_BEFORE_MLP = (
    "post_attention_layernorm", "feedforward_layernorm", "pre_ff_layernorm", "pre_feedforward_layernorm",
    "ln_2", "mlp_norm", "ffn_norm", "norm_2", "layernorm2", "norm_attn_norm.norm_2", "channel_pre_norm",
    "norm_ffn",
)  # fmt: skip
_BEFORE_PARALLEL_MLP = ("ln_mlp",)
_SANDWICHES = (
    ("pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
    ("pre_mlp_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    ("post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"),
    ("post_attention_layernorm", "post_norm1", "post_norm2"),
    ("ffn_norm", "post_operator_norm", "post_ffn_norm"),
    (None, "post_attention_layernorm", "post_feedforward_layernorm"),
)
"""Norm before the MLP, norm after attention, norm after the MLP, of blocks that have the last two."""


_LOOSE = Block(
    "self_attn", "fc1", "self_attn_layer_norm", "final_layer_norm",
    projection="self_attn.out_proj", mlp_last="fc2",
)  # fmt: skip
"""OPT, XGLM, BioGPT, and the decoders in the manner of BART whose norms come before."""

_ROUTERS = ("gate", "router")
"""Names, beside `experts`, of the module that chooses among them."""


def guess_router(names: Collection[str]) -> Router | None:
    """What chooses a block's experts, from the paths of all modules inside it; None if that is not one."""
    found = [
        Router(f"{beside}{name}", f"{beside}experts")
        for beside in [path.removesuffix("experts") for path in names if path.split(".")[-1] == "experts"]
        for name in _ROUTERS
        if f"{beside}{name}" in names
    ]
    return found[0] if len(found) == 1 else None


def guess_block(names: Collection[str]) -> Block | None:
    """The parts of a block, from the paths of all modules inside it; None if its names are others."""
    attention, mlp = _first(names, (*_WITH_HEADS, *_HEADLESS)), _first(names, _MLP)
    if set(_LOOSE.paths) <= set(names):
        return _LOOSE
    if attention is None or mlp is None:
        return None
    norm = _first(names, _BEFORE_ATTENTION)
    after_heads = [f"{attention}.{name}" for name in _PROJECTIONS] if attention in _WITH_HEADS else []
    projection = _first(names, after_heads)
    for before, after_attention, after_mlp in _SANDWICHES:
        if {after_attention, after_mlp, before or after_mlp} <= set(names):
            return Block(attention, mlp, norm, before, after_attention, after_mlp, projection=projection)
    before = _first(names, _BEFORE_MLP)
    if before is not None:
        return Block(attention, mlp, norm, before, projection=projection)
    if norm is None:
        return None
    # One norm, or one for each: attention and MLP read the same stream.
    own = _first(names, _BEFORE_PARALLEL_MLP)
    return Block(attention, mlp, norm, own or norm, parallel=True, projection=projection)


def _first(names: Collection[str], wanted: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in names), None)
