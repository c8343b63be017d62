"""Where the parts of a subject's blocks are: one table of architectures. Pure: no weights, no forward pass.

The table goes by the family of the *text* model: if that is a part of a larger one (Gemma 3 with its
vision tower), its blocks are found inside it. Of other architectures the parts are guessed by name
(`winnow.subject.shapes`) and proved when the subject is loaded (`winnow.subject.prove`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import nn

from winnow.schemas.errors import ConfigError
from winnow.subject.shapes import Block, Router, guess_block, guess_router

log = logging.getLogger("winnow.subject")

Part = Literal[
    "attention",
    "mlp",
    "mlp_last",
    "attention_norm",
    "mlp_norm",
    "attention_post_norm",
    "mlp_post_norm",
    "projection",
]
"""A module of a block, by what it does."""


class _Family(NamedTuple):
    """One row of the table."""

    blocks: str
    """Path of the list of blocks; its last name counts, since composites have other prefixes."""
    block: Block
    final_norm: str = "norm"
    """Name, beside the list of blocks, of the norm before the unembedding."""
    parallel: str | None = None
    """The config's field that says whether attention and MLP run in parallel."""


_LLAMA = _Family(
    "model.layers",
    Block("self_attn", "mlp", "input_layernorm", "post_attention_layernorm", projection="self_attn.o_proj"),
)
_GEMMA = _Family(
    "model.layers",
    Block(
        "self_attn", "mlp", "input_layernorm", "pre_feedforward_layernorm",
        "post_attention_layernorm", "post_feedforward_layernorm", projection="self_attn.o_proj",
    ),
)  # fmt: skip
_OLMO = _Family(
    "model.layers",
    Block(
        "self_attn",
        "mlp",
        None,
        None,
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        projection="self_attn.o_proj",
    ),
)

LAYOUTS: dict[str, _Family] = {
    "gpt2": _Family("transformer.h", Block("attn", "mlp", "ln_1", "ln_2", projection="attn.c_proj"), "ln_f"),
    "gpt_neox": _Family(
        "gpt_neox.layers",
        Block(
            "attention", "mlp", "input_layernorm", "post_attention_layernorm", projection="attention.dense"
        ),
        "final_layer_norm",
        "use_parallel_residual",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo": _LLAMA,
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "phi": _Family(
        "model.layers",
        Block(
            "self_attn",
            "mlp",
            "input_layernorm",
            "input_layernorm",
            parallel=True,
            projection="self_attn.dense",
        ),
        "final_layernorm",
    ),
    "phi3": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA._replace(parallel="use_parallel_residual"),
    "starcoder2": _LLAMA,
}
"""transformers' `model_type` of the text model -> its parts. Add one only with a line in the test of the
identities between them."""

_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "layer_norm", "norm_f")
"""Names, beside the list of blocks, of the norm before the unembedding, outside the table."""

# With several streams a block's output was flattened and truncated to the first D numbers, without an error:
# a tiny DeepSeek V4 was harvested, sealed and verified clean with 32 of its rows' 128 numbers.
_STREAMS = ("hc_mult", "hc_count", "altup_num_inputs")
"""Config fields with the number of residual streams: DeepSeek V4 and HY V4, Qwen 4, Gemma 3n."""


@dataclass(frozen=True)
class Layout:
    """The modules of one subject, by dotted paths in the whole model.

    Attributes:
        architecture: transformers' `model_type`.
        blocks: Path of the list of blocks.
        layers: Number of blocks in the whole model.
        parts: Of each block, by paths inside it; None if they are not known.
        tabled: Whether the parts are of the table; others are guesses until they are proved.
        streams: How many residual streams a block passes on, as far as the config tells.
        embedding: Path of the token embedding; None if there is none. Its output need not be
            `resid_pre.0`: GPT-2 adds positions, Gemma scales it.
        final_norm: Path of the norm before the unembedding; outside the table a guess by its name, or None.
        unembedding: Path of the LM head; None if there is none.
        routers: Of each block, its router, a guess until it is proved; None if it has none that is known.
            Empty if no block has one.
    """

    architecture: str
    blocks: str
    layers: int
    parts: tuple[Block | None, ...]
    tabled: bool = False
    streams: int = 1
    embedding: str | None = None
    final_norm: str | None = None
    unembedding: str | None = None
    routers: tuple[Router | None, ...] = ()

    def router(self, layer: int) -> Router | None:
        """The router of block `layer`; None if it has none that is known."""
        return self.routers[layer] if self.routers else None

    def path(self, layer: int, part: Part) -> str | None:
        """The path of a part of block `layer`; None if the block has none, or its parts are not known."""
        block = self.parts[layer]
        name = None if block is None else getattr(block, part)
        return None if name is None else f"{self.blocks}.{layer}.{name}"


def find_layout(model: nn.Module, config: Any) -> Layout:
    """The layout of `model`: from the table, else its only list of `num_hidden_layers` modules (logged).

    If the model is more than a text model (vision, audio), only its text decoder is considered.

    Args:
        model: A causal language model of transformers, not truncated.
        config: Its text config (`model_type`, `num_hidden_layers`).

    Raises:
        ConfigError: The architecture is not in the table and its blocks cannot be identified.
    """
    architecture, layers = str(config.model_type), int(getattr(config, "num_hidden_layers", None) or 0)
    streams = max(int(getattr(config, name, None) or 1) for name in _STREAMS)
    embedding = _path_of(model, "get_input_embeddings")
    unembedding = _path_of(model, "get_output_embeddings")
    lists = _block_lists(model, layers)
    family = LAYOUTS.get(architecture)
    if family is not None:
        # By the last name of the path only: a composite keeps the same blocks under another prefix.
        name, block = family.blocks.rpartition(".")[2], _block(family, config)
        fitting = [path for path in lists if path.rpartition(".")[2] == name and _has(model, path, block)]
        if len(fitting) == 1:
            norm = f"{fitting[0].rpartition('.')[0]}.{family.final_norm}"
            parts = (block,) * layers
            return Layout(
                architecture, fitting[0], layers, parts, True, streams, embedding, norm, unembedding
            )
    if len(lists) != 1:
        raise ConfigError(
            f"architecture {architecture!r} is unknown and its blocks cannot be told",
            expected=f"one list of {layers} modules",
            got=", ".join(lists) or "none",
            fix=f"Known architectures: {', '.join(LAYOUTS)}",
        )
    (blocks,) = lists
    # Blocks of several streams hand on something else than a sum.
    inside = [
        {name for name, _ in model.get_submodule(f"{blocks}.{layer}").named_modules()}
        for layer in range(layers)
    ]
    parts = tuple(guess_block(names) if streams == 1 else None for names in inside)
    norm = next((path for path in _final_norms(blocks) if path in dict(model.named_modules())), None)
    # No family of the table has experts.
    routers = tuple(guess_router(names) for names in inside)
    log.info("architecture %r is not in the table of hooks: using %s as its blocks", architecture, blocks)
    return Layout(
        architecture, blocks, layers, parts, False, streams, embedding, norm, unembedding,
        routers if any(routers) else (),
    )  # fmt: skip


def _final_norms(blocks: str) -> list[str]:
    """Where the norm after a list of blocks may be, in the order in which it is looked for."""
    beside = blocks.rpartition(".")[0]
    return [f"{beside}.{name}" for name in _FINAL_NORMS]


def _block(family: _Family, config: Any) -> Block:
    """The parts of a block of this config."""
    if family.parallel is None or not getattr(config, family.parallel, False):
        return family.block
    block = replace(family.block, parallel=True)
    # A parallel StableLM has one norm for both; a parallel GPT-NeoX has two of the same stream.
    return block if config.model_type == "gpt_neox" else replace(block, mlp_norm=block.attention_norm)


def _path_of(model: nn.Module, getter: str) -> str | None:
    """The path of the module that a getter of transformers gives."""
    get = getattr(model, getter, None)
    try:
        wanted = get() if get is not None else None
    except (AttributeError, NotImplementedError):
        return None  # some composites of transformers have no such module
    return next((path for path, module in model.named_modules() if module is wanted), None)


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


def _has(model: nn.Module, blocks: str, block: Block) -> bool:
    """Whether the first block of a list has these parts."""
    names = {name for name, _ in model.get_submodule(f"{blocks}.0").named_modules()}
    return names.issuperset(block.paths)
