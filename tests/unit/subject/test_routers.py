"""Guessed routers are dropped unless a pass shows that the experts follow their logits."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.tiny import make_subject, tiny_model
from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError
from winnow.subject import Subject
from winnow.subject.generate import Steer
from winnow.subject.layout import Layout, find_layout
from winnow.subject.routers import prove_routers, router_width
from winnow.subject.shapes import Router, guess_router
from winnow.subject.tail import Tail

LAYERS, EXPERTS, VOCABULARY = 3, 8, 384
MIXTRAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "layers": LAYERS}


def built(dtype: torch.dtype = torch.float32) -> tuple[Any, Layout]:
    model = tiny_model("mixtral", **MIXTRAL).to(dtype)  # pyright: ignore
    return model, find_layout(model, model.config)


def prove(model: nn.Module, layout: Layout) -> tuple[Router | None, ...]:
    found = prove_routers(
        model, layout, LAYERS, lambda ids: model(input_ids=ids, use_cache=False), VOCABULARY
    )
    return found.routers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_is_confirmed_in_every_block(dtype: torch.dtype) -> None:
    model, layout = built(dtype)
    assert prove(model, layout) == (Router("mlp.gate", "mlp.experts"),) * LAYERS
    assert router_width(model.get_submodule("model.layers.0.mlp.gate")) == EXPERTS


def test_a_bias_in_the_choice_is_seen_through() -> None:
    """Other experts than those of the largest logits, but weighed in their order, as in DeepSeek V3."""
    model, layout = built()

    def biased(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits = output[0]
        chosen = (logits + 4.0 * torch.linspace(-1, 1, EXPERTS)).topk(2).indices
        weights = logits.sigmoid().gather(1, chosen)
        return logits, weights / weights.sum(1, keepdim=True), chosen

    model.get_submodule("model.layers.1.mlp.gate").register_forward_hook(biased)
    assert None not in prove(model, layout)


@pytest.mark.parametrize("what", ["probabilities", "others", "narrow"])
def test_what_the_experts_do_not_follow_is_refuted(what: str, caplog: pytest.LogCaptureFixture) -> None:
    model, layout = built()

    def other(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits = output[0]
        if what == "probabilities":
            logits = logits.softmax(1)
        elif what == "others":
            logits = logits.roll(1, 1)
        else:
            logits = logits[:, :-1]
        return logits, *output[1:]

    model.get_submodule("model.layers.1.mlp.gate").register_forward_hook(other)
    with caplog.at_level(logging.WARNING):
        found = prove(model, layout)
    assert [router is not None for router in found] == [True, False, True]
    assert "the experts of 1 blocks do not follow the logits of a module named mlp.gate" in caplog.text


def test_two_routers_of_a_block_are_not_told_apart() -> None:
    names = {"mlp", "mlp.gate", "mlp.experts", "mlp.experts.gate_proj"}
    assert guess_router(names) == Router("mlp.gate", "mlp.experts")
    assert guess_router({*names, "attn.router", "attn.experts"}) is None
    assert guess_router({"mlp.gate", "mlp.gate_proj"}) is None


def test_a_router_is_read_and_nothing_takes_its_place(tmp_path) -> None:
    subject = Subject.load(make_subject(tmp_path, "mixtral", **MIXTRAL))  # pyright: ignore
    (site,) = subject.sites(["router.1"])
    assert site.d_model == EXPERTS
    ids = torch.arange(24).view(2, 12)
    rows = subject.activations(ids, ["router.1"])["router.1"]
    told = subject.model(input_ids=ids, output_router_logits=True).router_logits[1]  # pyright: ignore
    assert torch.equal(rows, told.view(2, 12, EXPERTS))
    steer = {"router.1": [Steer(Sae(EXPERTS, 16, 2), 3, "add", 1.0)]}
    for replace in (
        lambda: subject.logits(ids, {"router.1": torch.zeros_like}),
        lambda: Tail(subject, "router.1"),
        lambda: list(subject.generate([1, 2], max_new_tokens=1, steer=steer)),
    ):
        with pytest.raises(ConfigError, match=r"hook 'router.1' can be read but not replaced"):
            replace()


def test_a_dense_block_has_no_router(tmp_path) -> None:
    subject = Subject.load(make_subject(tmp_path, layers=2))
    with pytest.raises(ConfigError, match="block 1 of 'llama' has no router of experts that is known"):
        subject.sites(["router.1"])
