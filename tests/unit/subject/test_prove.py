"""Guessed parts of blocks are dropped unless a pass confirms them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.support.tiny import tiny_model
from winnow.subject.layout import LAYOUTS, Layout, find_layout
from winnow.subject.prove import proved
from winnow.subject.shapes import Block, guess_block

LAYERS, VOCABULARY = 3, 384


def novel(architecture: str, **extra: object) -> tuple[nn.Module, Layout]:
    """A tiny model, and its layout as if the architecture were not in the table."""
    model = tiny_model(architecture, layers=LAYERS, **extra)
    setattr(model.config, "model_type", "novel")  # noqa: B010
    return model, find_layout(model, model.config)


def prove(model: nn.Module, layout: Layout, kept: int = LAYERS) -> Layout:
    run: Callable[[Tensor], object] = lambda ids: model(input_ids=ids, use_cache=False)  # noqa: E731
    return proved(model, layout, kept, run, VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [*sorted({"llama", "gpt2", "gemma2", "olmo2", "phi", "gpt_neox"})])
def test_right_guesses_are_kept(architecture: str, dtype: torch.dtype) -> None:
    """Every shape of the table is also found by its names alone."""
    model, layout = novel(architecture)
    model.to(dtype)
    found = prove(model, layout)
    known = LAYOUTS[architecture].block
    # Of the names alone a parallel GPT-NeoX is like one that is not.
    assert found.parts == (replace(known, parallel=architecture in ("phi", "gpt_neox")),) * LAYERS


def test_a_scaled_part_is_refuted(caplog: pytest.LogCaptureFixture) -> None:
    """Granite multiplies what it adds; by 1 the names are right, by less they are not."""
    model, layout = novel("granite")
    assert all(prove(model, layout).parts)
    model, layout = novel("granite", residual_multiplier=0.5)
    assert all(layout.parts)
    with caplog.at_level(logging.WARNING):
        assert not any(prove(model, layout).parts)
    assert "block 0: attention and MLP do not add up to what the block adds" in caplog.text


def test_only_the_wrong_layer_is_dropped() -> None:
    model, layout = novel("llama")
    layer = model.get_submodule("model.layers.1")
    layer.register_forward_hook(lambda *called: called[-1] * 2)
    assert [part is not None for part in prove(model, layout).parts] == [True, False, True]


def test_an_outlier_channel_hides_no_wrong_part() -> None:
    """In bfloat16, half a unit in the last place of a channel of 10,000 is larger than all the others."""
    model, layout = novel("granite", residual_multiplier=0.5)
    with torch.no_grad():
        model.get_submodule("model.embed_tokens").weight[:, 5] = 1e4
    model.to(torch.bfloat16)
    assert not any(prove(model, layout).parts)


def test_blocks_that_were_dropped_are_not_run() -> None:
    model, layout = novel("llama")
    model.get_submodule("model").layers = model.get_submodule("model.layers")[:2]
    assert all(prove(model, layout, kept=2).parts)
    # Nor is anything said of them: what they have may still be asked for, and is refused as dropped.
    assert prove(model, layout, kept=2) == layout


def test_an_mlp_without_a_module_and_with_flattened_windows_is_found() -> None:
    """OPT; with its norms after the sums (350m) the parts do not add up to what the block adds."""
    model = tiny_model("opt", layers=LAYERS, ffn_dim=64)
    layout = find_layout(model, model.config)
    block = Block(
        "self_attn", "fc1", "self_attn_layer_norm", "final_layer_norm",
        projection="self_attn.out_proj", mlp_last="fc2",
    )  # fmt: skip
    assert prove(model, layout).parts == layout.parts == (block,) * LAYERS
    assert layout.final_norm == "model.decoder.final_layer_norm"
    model = tiny_model("opt", layers=LAYERS, ffn_dim=64, do_layer_norm_before=False)
    assert prove(model, find_layout(model, model.config)).parts == (None,) * LAYERS


class Flat(nn.Module):
    """A block whose MLP reads windows flattened, position by position if `turned`."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.turned = turned

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        given = self.post_attention_layernorm(x)
        given = given.transpose(0, 1) if self.turned else given
        made = self.mlp(given.flatten(0, 1)).view(given.shape)
        return x + (made.transpose(0, 1) if self.turned else made)


@pytest.mark.parametrize("turned", [False, True])
def test_windows_that_are_flattened_in_another_order_are_refuted(turned: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([Flat(turned)])})
    embed, block = nn.Embedding(VOCABULARY, 8), model.get_submodule("layers.0")
    guess = guess_block({name for name, _ in block.named_modules()})
    run: Callable[[Tensor], object] = lambda ids: block(embed(ids))  # noqa: E731
    found = proved(model, Layout("flat", "layers", 1, (guess,)), 1, run, VOCABULARY)
    assert guess is not None
    assert found.parts == ((None,) if turned else (guess,))


def test_shapes_by_name() -> None:
    plain = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    assert guess_block({*plain, "self_attn.o_proj"}) == LAYOUTS["llama"].block
    assert guess_block(plain - {"mlp"}) is None
    both = {*plain, "post_self_attn_layernorm", "post_mlp_layernorm"}
    assert guess_block(both) == Block(
        "self_attn", "mlp", "input_layernorm", "post_attention_layernorm",
        "post_self_attn_layernorm", "post_mlp_layernorm",
    )  # fmt: skip
    parallel = guess_block({"self_attn", "mlp", "input_layernorm"})
    assert parallel == Block("self_attn", "mlp", "input_layernorm", "input_layernorm", parallel=True)
