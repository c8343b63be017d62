"""An activation is one file: what it says is all that schema, SAE, step, mesh and storage need."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from pydantic import ValidationError

from tests.support.meeting import meet
from winnow.sae.activations import Activation, DenseCodes, activation_of
from winnow.sae.formats.plain import from_sae
from winnow.sae.init import initialise
from winnow.sae.model import Sae
from winnow.schemas.activations import OWN, Traits, traits_of
from winnow.schemas.errors import ConfigError
from winnow.schemas.training import SaeParts, TrainSpec
from winnow.store.objects import open_store
from winnow.trainer.mesh.shard import has_latents
from winnow.trainer.mesh.world import World
from winnow.trainer.run.checkpoint import pack
from winnow.trainer.step import Recipe, Run, train_step

B, D, N, K, STEPS = 64, 10, 30, 4, 12
GAP = 0.1


class Gapped(Activation):
    """Active above a fixed gap, kept sparse by the squares of what is active."""

    traits = Traits("gapped")

    def floor(self, sae):
        return GAP

    def codes(self, sae, pre, bandwidth):
        return DenseCodes(torch.where(pre > GAP, pre, 0.0))

    def default_sparsity(self, d_model):
        return 0.3

    def counted(self, codes):
        return codes.values.square().sum(1)

    def sparsity(self, counted, total, k, constant, weight):
        return weight * counted / (total * constant)


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """The one file that a new activation is."""
    found = ModuleType("winnow.sae.activations.gapped")
    found.ACTIVATION = Gapped()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, found.__name__, found)


def rows(seed: int) -> torch.Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 1


def trained(world: World | None = None, **given) -> Run:
    """After its steps; on a mesh, this rank's part."""
    world = world or World()
    fields = {"out": "x", "hook": "h.1", "latents": N, "k": K, "batch_rows": B, "epochs": 5, "auxk_k": 4}
    spec = TrainSpec.model_validate(fields | {"activation": "gapped", "dead_after_tokens": 150} | given)
    whole = Sae(D, N, K, "layer", spec.parts({"h.1": D}), dtype=torch.float64)
    constant = initialise(whole, rows(99), torch.ones(B, dtype=torch.float64), seed=0)
    with torch.no_grad():
        whole.b_enc[::7] = -1.0  # silent, so that AuxK has work
    part, tensors = world.part(N), whole.tensors()
    sae = Sae(D, len(part), K, "layer", whole.parts, dtype=torch.float64)
    sae.fill({n: t[part.start : part.stop] if has_latents(n, t) else t for n, t in tensors.items()})
    run = Run(sae, Recipe.resolve(spec, D, steps_per_epoch=5), constant, world)
    size = B // world.data.size
    for step in range(STEPS):
        share = slice(world.data.rank * size, (world.data.rank + 1) * size)
        assert train_step(run, rows(step)[share], torch.ones(size, dtype=torch.float64)) is not None
    return run


def test_a_new_activation_is_trained_on_any_mesh(told):
    alone = trained()
    assert any("eager, since activation gapped" in line for line in told)
    assert alone.recipe.sparsity == 0.3
    assert alone.counts.auxk_steps > 2
    expected = pack(alone)
    for row in meet(2, 2, lambda world: pack(trained(world))):
        for shard, state in enumerate(row):
            assert not isinstance(state, Exception), state
            for name, tensor in expected.items():
                right = tensor[shard * N // 2 : (shard + 1) * N // 2] if has_latents(name, tensor) else tensor
                torch.testing.assert_close(state[name], right, rtol=1e-7, atol=1e-9, msg=name)


def test_its_sparsity_term_is_trained():
    free, held = (trained(sparsity_coefficient=weight).sae.encode(rows(7))[0] for weight in (0.0, 30.0))
    assert held.square().sum() < 0.9 * free.square().sum()


def test_a_new_activation_is_stored_and_encodes_as_it_says(tmp_path):
    sae = trained().sae.float()
    sae.save(open_store(str(tmp_path)), hook="h.1")
    again = Sae.load(tmp_path)
    x = rows(3).float()
    pre = (again.normalise(x)[0] - again.b_pre) @ again.W_enc.T + again.b_enc
    dense = torch.zeros_like(pre).scatter(1, *reversed(again.encode(x)))
    torch.testing.assert_close(dense, torch.where(pre > GAP, pre, 0.0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="activation gapped cannot be exported"):
        from_sae(again)


@pytest.mark.parametrize("name", ["gelu", "base", "Topk", "../topk", ""])
def test_a_name_that_is_none_is_refused_with_those_that_are(name):
    with pytest.raises(ValidationError, match="batchtopk, jumprelu, relu, topk"):
        SaeParts(activation=name)


@pytest.mark.parametrize("name", OWN)
def test_the_table_and_the_files_say_the_same(name):
    assert activation_of(name).traits == traits_of(name) == OWN[name]
