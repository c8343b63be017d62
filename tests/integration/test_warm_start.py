"""`train.init_from`: what is kept of another SAE, and a run that begins from one."""

from __future__ import annotations

import pytest
import torch

from tests.support.evaluated import D_MODEL, HOOK, random_sae, toy_config
from winnow.sae import Sae
from winnow.sae.init import Place
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import MissingObject, SaeMismatch
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.trainer.run.loop import train
from winnow.trainer.run.warm_start import load_source, most_useful, warm_start

ROWS = torch.randn(256, D_MODEL, generator=torch.Generator().manual_seed(3)) * 4 + 1
WEIGHTS = torch.ones(256)


def test_the_latents_of_most_energy_are_kept_in_their_order():
    source = random_sae(latents=48, k=6)
    with torch.no_grad():
        source.W_dec[7] *= 30  # rarely the strongest code, but a long direction
        source.b_enc[11] = -100.0  # never active
    values, indices = source.encode(ROWS[:200])
    energy = torch.zeros(48).index_add_(0, indices.flatten(), values.detach().flatten().square())
    energy *= source.W_dec.detach().norm(dim=1).square()
    weights = (torch.arange(256) < 200).float()
    kept = most_useful(source, ROWS, weights, 12)
    assert kept.tolist() == sorted(energy.topk(12).indices.tolist())
    assert 7 in kept
    assert 11 not in most_useful(source, ROWS, weights, 47)
    assert most_useful(source, ROWS, weights, 48).tolist() == list(range(48))


def test_an_sae_of_equal_size_is_taken_as_it_is():
    source = random_sae()
    new = source.twin()
    constant = warm_start(new, source, ROWS, WEIGHTS)
    assert torch.equal(new(ROWS), source(ROWS))
    x = source.normalise(ROWS)[0]
    assert constant == pytest.approx(float((x - x.mean(0)).square().sum(1).mean()), rel=1e-5)


def test_shards_take_their_part_of_what_is_kept():
    source = random_sae(latents=48, k=6)
    whole = Sae(D_MODEL, 16, 6, "layer")
    warm_start(whole, source, ROWS, WEIGHTS)
    for part in (range(8), range(8, 16)):
        shard = Sae(D_MODEL, 8, 6, "layer")
        place = Place(16, part, lambda x, _: x)  # what it gives is not asked for
        warm_start(shard, source, ROWS, WEIGHTS, place=place)
        assert torch.equal(shard.W_enc, whole.W_enc[part.start : part.stop])
        assert torch.equal(shard.b_pre, source.b_pre)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return toy_config(tmp_path_factory.mktemp("toy"), units=2)


def test_a_run_begins_from_the_better_part_of_a_wider_one_and_resumes_without_it(config, tmp_path):
    assert config.train is not None
    base = {
        "latents": 32,
        "k": 4,
        "epochs": 1.0,
        "device": "cpu",
        "threads": 1,
        "out": str(tmp_path / "wide"),
    }
    wide = config.train.model_copy(update=base)
    train(config.model_copy(update={"train": wide}))
    source = Sae.load(wide.out)
    begun = wide.model_copy(
        update={"latents": 16, "init_from": wide.out, "out": str(tmp_path / "pruned"), "lr": 1e-12}
    )
    train(config.model_copy(update={"train": begun}))
    found = Sae.load(begun.out)
    near = (found.W_dec @ source.W_dec.T).max(1)
    assert float(near.values.min()) > 0.9999
    assert len(set(near.indices.tolist())) == 16
    rows = torch.from_numpy(ActivationStore.open(config.root).read_rows(HOOK, 0, 200))
    assert not torch.equal(found.W_enc, Sae.load(wide.out).W_enc[:16])
    assert float((found(rows) - rows).square().sum()) < float((rows - rows.mean(0)).square().sum())
    assert found.card is not None
    assert found.card.spec is not None
    assert found.card.spec.init_from == wide.out


def test_a_source_that_does_not_fit_is_named(tmp_path):
    store = open_store(str(tmp_path / "sae"))
    random_sae(latents=8, k=2).save(store, hook=HOOK)
    uri = str(tmp_path / "sae")
    with pytest.raises(SaeMismatch, match=r"the latents of .*16 or more \(the new SAE's\), got 8"):
        load_source(uri, Sae(D_MODEL, 16, 2, "layer"), StorageSpec())
    with pytest.raises(SaeMismatch, match="normalize dataset"):
        load_source(uri, Sae(D_MODEL, 8, 2, "dataset"), StorageSpec())
    with pytest.raises(SaeMismatch, match="d_model 8"):
        load_source(uri, Sae(8, 8, 2, "layer"), StorageSpec())
    with pytest.raises(MissingObject):
        load_source(str(tmp_path / "none"), Sae(D_MODEL, 8, 2, "layer"), StorageSpec())
