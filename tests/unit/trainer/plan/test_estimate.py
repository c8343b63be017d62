"""The estimate: what it refuses and advises, meshes, sets, time by part, the paper's large run."""

from __future__ import annotations

import itertools
import json

import pytest

from winnow.schemas.errors import ConfigError
from winnow.schemas.layers import SetSpec
from winnow.schemas.training import MeshSpec, TrainSpec
from winnow.trainer.mesh.fit import check_mesh
from winnow.trainer.mesh.world import Axis, World
from winnow.trainer.plan import estimate as estimate_module
from winnow.trainer.plan.estimate import as_json, data_volume, estimate, table_rows
from winnow.trainer.plan.memory import gpu_memory
from winnow.trainer.plan.paper import step_on_paper
from winnow.trainer.plan.rates import GPUS


def spec_of(**fields) -> TrainSpec:
    return TrainSpec(**{"out": "x", "hook": "h.1", "latents": 2048, "k": 16, "batch_rows": 1024} | fields)


def test_the_estimate_of_a_set_counts_every_product_and_decoder():
    hooks = {"hook": "resid_mid.0", "target_hook": "mlp_out.0", "normalize": "dataset"}
    spec, layers = spec_of(auxk_coefficient=0.0, **hooks), 4
    plt, clt = (SetSpec(layers=(0, layers - 1), cross=cross) for cross in (False, True))
    found = [
        estimate(spec.model_copy(update={"set": of}), 256, tokens=1e8, gpu="h100", count=1)
        for of in (None, plt, clt)
    ]
    one, plt, clt = (estimate.parts for estimate in found)
    assert plt["encode"].flops == clt["encode"].flops == layers * one["encode"].flops
    assert plt["update"] == tuple(layers * number for number in one["update"])
    # layer l has an encoder and L - l decoders, of each of which a row is read per active latent
    decoders = layers * (layers + 1) // 2
    assert clt["decode"].gathered == decoders * one["decode"].gathered
    # all but the one pass over each encoder that b_pre's gradient takes
    matrices = (layers + decoders) / 2
    assert 0.95 * matrices < clt["update"].streamed / one["update"].streamed < matrices


def test_the_papers_large_run_needs_a_mesh_and_is_told_which():
    large = spec_of(latents=2**24, k=256, batch_rows=131_072)
    few = large.model_copy(update={"batch_rows": 1024, "auxk_coefficient": 0.0})
    with pytest.raises(
        ConfigError, match=r"does not fit 1 x h100.*What fits: (\d+) such GPUs with mesh.latent"
    ):
        estimate(few, 768, tokens=40e9, gpu="h100", count=1)
    meshed = large.model_copy(update={"mesh": MeshSpec(latent=16)})
    found = estimate(meshed, 768, tokens=40e9, gpu="h100", count=16, price=2.5)
    assert found.memory.total < found.available < 80e9
    assert found.steps == 305_176
    assert found.money == pytest.approx(found.hours * 16 * 2.5)
    assert found.seconds["encode"] > 0.5 * found.step_seconds
    assert sum(part.seconds for part in found.parts.values()) < found.step_seconds, "the mesh sends"
    assert found.dead_step_seconds > found.step_seconds
    assert data_volume(40e9, 768)["bytes"] == pytest.approx(61.44e12)
    told = as_json(found, data_volume(40e9, 768))
    assert json.loads(json.dumps(told))["step_seconds"] == pytest.approx(found.step_seconds)
    assert any("assumed" in row[1] for row in table_rows(found, data_volume(40e9, 768)))
    # Two groups, and five runs of one batch each in the only rank that opens a stream.
    assert found.stream_bytes == 2 * large.group_bytes + 5 * 131_072 * 768 * 2


def test_a_sets_batches_ahead_have_the_rows_of_all_its_hooks():
    spec = spec_of(latents=1024, k=16, batch_rows=4096)
    of = SetSpec(layers=(0, 29), cross=False, reads="resid_mid")
    whole = spec.model_copy(update={"set": of, "target_normalize": "dataset"})
    found = [estimate(each, 64, tokens=1e6, gpu="h100", count=1) for each in (spec, whole)]
    ahead = [each.stream_bytes - 2 * spec.group_bytes for each in found]
    # 1/2 MiB a batch of one hook in bfloat16, of which five make a run, and 30 MiB one of sixty.
    assert ahead == [5 * 5 * 2**19, 5 * 30 * 2**20]


def test_packed_moments_fit_where_float32_does_not():
    spec = spec_of(latents=2**19, k=32, batch_rows=8192, auxk_coefficient=0.0)
    with pytest.raises(ConfigError, match="moments: bfloat16"):
        estimate(spec, 1024, tokens=1e9, gpu="l4", count=1)
    found = [
        estimate(spec.model_copy(update={"moments": kind}), 1024, tokens=1e9, gpu="l4", count=1)
        for kind in ("bfloat16", "int8")
    ]
    assert found[0].memory.moments == pytest.approx(2 * found[1].memory.moments, rel=0.01)


def test_bfloat16_products_are_faster_and_take_a_copy():
    spec = spec_of(latents=131_072, k=32, batch_rows=65_536, auxk_coefficient=0.0)
    half = spec.model_copy(update={"compute_dtype": "bfloat16"})
    one, two = (estimate(s, 768, tokens=1e9, gpu="h100", count=1) for s in (spec, half))
    assert two.step_seconds < one.step_seconds / 4
    assert two.memory.step > one.memory.step


def test_twice_the_cards_is_no_slower_and_a_faster_card_is_faster():
    spec = spec_of(latents=131_072, k=32, batch_rows=65_536, auxk_coefficient=0.0)
    two = spec.model_copy(update={"mesh": MeshSpec(latent=2)})
    one = estimate(spec, 768, tokens=1e9, gpu="h100", count=1)
    assert estimate(two, 768, tokens=1e9, gpu="h100", count=2).step_seconds < one.step_seconds
    assert estimate(spec, 768, tokens=1e9, gpu="a100-80gb", count=1).step_seconds > one.step_seconds
    assert all("data sheet" in card.source for card in GPUS.values())


@pytest.mark.parametrize(
    ("fields", "arguments", "words"),
    [
        ({}, {"gpu": "h1000"}, "a100-80gb"),
        ({"mesh": MeshSpec(latent=3)}, {"count": 4}, r"1 x 3 \(data x latent\).*3 processes.*--count 3"),
        ({"mesh": MeshSpec(data=3)}, {"count": 3}, r"mesh\.data.*divisor of lanes \(64\)"),
        ({"activation": "batchtopk", "accumulate": 8}, {"count": 2}, "multiple of data x accumulate"),
        ({"kernels": "eager"}, {"count": 2}, "kernels: eager"),
        ({"kernels": "cpu"}, {}, "kernels: cpu.*tensors on the CPU"),
        ({"latents": 2**22, "batch_rows": 1024, "auxk_coefficient": 0.0}, {"gpu": "l4"}, "latents: "),
    ],
)
def test_what_cannot_be_is_refused(fields, arguments, words):
    with pytest.raises(ConfigError, match=words):
        estimate(spec_of(**fields), 768, **{"tokens": 1e6, "gpu": "h100", "count": 1} | arguments)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu"])
@pytest.mark.parametrize("latents", [2048, 4097, 18])
def test_every_mesh_that_training_takes_is_estimated_and_no_other(monkeypatch, activation, latents):
    """18 latents over 3 shards: K = 16 is more than a shard holds."""
    some = step_on_paper(spec_of(batch_rows=64), 64)
    monkeypatch.setattr(estimate_module, "step_on_paper", lambda *_, **__: some)
    taken = 0
    for data, latent, lanes, accumulate in itertools.product((None, 2, 3), (1, 2, 3, 32), (16, 64), (1, 2)):
        if activation == "relu" and accumulate > 1:
            continue  # no spec
        mesh = MeshSpec(data=data, latent=latent)
        spec = spec_of(latents=latents, mesh=mesh, lanes=lanes, accumulate=accumulate, activation=activation)
        try:
            expected, refusal = check_mesh(spec, mesh.size), ""
        except ConfigError as refused:
            expected, refusal = None, str(refused)
        if expected is None:
            with pytest.raises(ConfigError) as also:
                estimate(spec, 64, tokens=1e6, gpu="h100", count=mesh.size)
            assert str(also.value) == refusal
        else:
            found = estimate(spec, 64, tokens=1e6, gpu="h100", count=mesh.size)
            assert (found.data, found.latent) == expected
            taken += 1
    assert taken >= 10


def test_what_is_reckoned_with_is_the_largest_shard():
    spec, shards = spec_of(latents=4097, mesh=MeshSpec(latent=2)), World(latent=Axis(None, 0, 2)).parts(4097)
    found = estimate(spec, 768, tokens=1e6, gpu="h100", count=2)
    assert found.memory == gpu_memory(spec, 768, latent=2)
    assert found.memory.counts == 8 * max(map(len, shards)) == 8 * 2049


def test_what_would_fit_is_something_that_training_takes():
    """Half of 3 x 2^19 latents, and so on, are below the prefix of 2^20 long before they fit."""
    fields = {"latents": 3 << 19, "matryoshka": (1 << 20,), "kernels": "eager", "batch_rows": 1 << 18}
    with pytest.raises(ConfigError, match=r"does not fit 1 x l4") as refused:
        estimate(spec_of(**fields), 4096, tokens=1e9, gpu="l4", count=1)
    fix = str(refused.value).partition("What fits")[2]
    assert not any(word in fix for word in ("latents:", "mesh.latent", "moments")), fix
