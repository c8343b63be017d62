"""The estimate: its memory against torch's own account of a real run, its refusals, the paper's large run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import set_step
from winnow.sae.init import initialise
from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError
from winnow.schemas.layers import SetSpec
from winnow.schemas.training import MeshSpec, TrainSpec
from winnow.trainer.mesh.world import Axis, World, check_mesh
from winnow.trainer.plan.estimate import GPUS, as_json, data_volume, estimate, largest_shard, table_rows
from winnow.trainer.plan.memory import fleet_memory, sae_memory
from winnow.trainer.step import Recipe, Run, train_step


def spec_of(**fields) -> TrainSpec:
    return TrainSpec(**{"out": "x", "hook": "h.1", "latents": 2048, "k": 16, "batch_rows": 1024} | fields)


def run_of(spec: TrainSpec, d_model: int) -> Run:
    sae = Sae(d_model, spec.latents, spec.k)
    rows = torch.randn(256, d_model, generator=torch.Generator().manual_seed(0))
    constant = initialise(sae, rows, torch.ones(256), seed=0)
    return Run(sae, Recipe.resolve(spec, d_model, 100), constant)


def standing_bytes(run: Run) -> dict[str, int]:
    """What is held between steps, by what it is."""
    parameters = list(run.sae.parameters())
    moments = [t for p in parameters for name, t in run.adam.state[p].items() if name != "step"]
    found = {
        "weights": parameters,
        "gradients": [p.grad for p in parameters],
        "moments": moments,
        "average": list(run.ema.sums.values()) if run.ema else [],
        "counts": [run.dead.since],
    }
    return {name: sum(t.nbytes for t in tensors) for name, tensors in found.items()}


def peak_of(step: Callable[[], object]) -> int:
    """Most bytes that a step allocates at a time beside what was there, by torch's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        step()
    events = [e for e in watch.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_of_a_step(run: Run, rows: torch.Tensor) -> int:
    """The same for a step on these rows, and their own bytes."""
    peak = peak_of(lambda: train_step(run, rows, torch.ones(len(rows))))
    return peak + rows.nbytes // run.recipe.spec.accumulate  # others wait on the host


@pytest.mark.parametrize(
    ("d_model", "fields"),
    [
        (256, {"latents": 4096, "k": 16, "batch_rows": 1024}),
        (128, {"latents": 8192, "k": 32, "batch_rows": 2048, "ema": False}),
        (512, {"latents": 1024, "k": 8, "batch_rows": 4096}),
        (64, {"latents": 1024, "k": 64, "batch_rows": 4096}),
        (256, {"latents": 2048, "k": 16, "batch_rows": 8192, "accumulate": 4}),
        (256, {"latents": 4096, "moments": "bfloat16", "batch_rows": 512, "compute_dtype": "bfloat16"}),
        (256, {"latents": 4096, "moments": "int8", "batch_rows": 512}),
    ],
)
def test_memory_is_what_torch_allocates(d_model, fields):
    spec = spec_of(**fields)
    run = run_of(spec, d_model)
    rows = torch.randn(spec.batch_rows, d_model, generator=torch.Generator().manual_seed(1))
    train_step(run, rows, torch.ones(len(rows)))  # makes gradients and moments
    said, held = sae_memory(spec, d_model), standing_bytes(run)
    for name, size in held.items():
        assert getattr(said, name) == size, name
    step = peak_of_a_step(run, rows)
    assert said.total == pytest.approx(said.standing + step, rel=0.10), (said.step / 2**20, step / 2**20)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_memory_of_a_set_is_what_torch_allocates(cross, moments):
    size = set_step.Size(layers=4, width=128, latents=1024, k=8, rows=2048)
    runs = set_step.make_runs(size, cross=cross, moments=moments)
    data = set_step.Data.of(size, size.rows, seed=1)

    def step() -> None:
        set_step.take(runs, data, cross=cross)

    step()  # makes gradients and moments
    said = sae_memory(runs[0].recipe.spec, size.width)
    for name in ("weights", "gradients", "moments", "average", "counts"):
        assert getattr(said, name) == sum(standing_bytes(run)[name] for run in runs), name
    batch = sum(rows.nbytes for rows in (*data.inputs, *data.targets))
    assert said.total == pytest.approx(said.standing + peak_of(step) + batch, rel=0.10)


def test_a_cross_layer_set_stands_at_16_bytes_per_number_of_all_encoders_and_decoders():
    layers, latents, d_model = 12, 2048, 576
    spec = spec_of(
        hook="resid_mid.0", target_hook="mlp_out.0", normalize="dataset", ema=False, latents=latents
    )
    of = {"layers": (0, layers - 1), "cross": True}
    said = sae_memory(spec.model_copy(update={"set": SetSpec(**of)}), d_model)
    whole = 16 * latents * d_model * (layers + layers * (layers + 1) // 2)
    assert said.weights + said.gradients + said.moments == pytest.approx(whole, rel=0.01)
    per_layer = sae_memory(spec.model_copy(update={"set": SetSpec(layers=(0, layers - 1))}), d_model)
    alone = sae_memory(spec, d_model)
    assert per_layer.standing == layers * alone.standing
    assert alone.weights > sae_memory(spec_of(ema=False), d_model).weights, "a transcoder has a bias more"


def test_the_estimate_of_a_set_counts_every_product_and_decoder():
    spec = spec_of(hook="resid_mid.0", target_hook="mlp_out.0", normalize="dataset")
    found = [
        estimate(spec.model_copy(update={"set": of}), 768, tokens=1e8, gpu="h100", count=1)
        for of in (None, SetSpec(layers=(0, 11)), SetSpec(layers=(0, 11), cross=True))
    ]
    one, plt, clt = (estimate.seconds for estimate in found)
    assert plt["encoder product"] == clt["encoder product"] == pytest.approx(12 * one["encoder product"])
    assert plt["update"] == pytest.approx(12 * one["update"])
    assert clt["update"] == pytest.approx((12 + 78) / 2 * one["update"], rel=0.01)
    assert clt["sparse gathers and sums"] > 4 * plt["sparse gathers and sums"]


def test_a_fleet_holds_all_and_steps_one_at_a_time():
    one, two = spec_of(), spec_of(latents=4096)
    a, b = sae_memory(one, 64), sae_memory(two, 64)
    assert fleet_memory([(one, 64), (two, 64)]) == a.standing + b.standing + max(a.step, b.step)


def test_the_papers_large_run_needs_a_mesh_and_is_told_which():
    large = spec_of(latents=2**24, k=256, batch_rows=131_072)
    with pytest.raises(
        ConfigError, match=r"does not fit 1 x h100.*What fits: (\d+) such GPUs with mesh.latent"
    ):
        estimate(large, 768, tokens=40e9, gpu="h100", count=1)
    meshed = large.model_copy(update={"mesh": MeshSpec(latent=16)})
    found = estimate(meshed, 768, tokens=40e9, gpu="h100", count=16, price=2.5)
    assert found.memory.total < found.available < 80e9
    assert found.steps == 305_176
    assert found.money == pytest.approx(found.hours * 16 * 2.5)
    assert found.seconds["encoder product"] > 0.5 * found.step_seconds
    assert data_volume(40e9, 768)["bytes"] == pytest.approx(61.44e12)
    told = as_json(found, data_volume(40e9, 768))
    assert json.loads(json.dumps(told))["step_seconds"] == pytest.approx(found.step_seconds)
    assert any("assumed" in row[1] for row in table_rows(found, data_volume(40e9, 768)))
    # Two groups, and five runs of one batch each in the only rank that opens a stream.
    assert found.stream_bytes == 2 * large.group_bytes + 5 * 131_072 * 768 * 4


def test_a_sets_batches_ahead_have_the_rows_of_all_its_hooks():
    spec = spec_of(latents=1024, k=16, batch_rows=4096)
    of = SetSpec(layers=(0, 29), cross=False, reads="resid_mid")
    whole = spec.model_copy(update={"set": of, "target_normalize": "dataset"})
    found = [estimate(each, 64, tokens=1e6, gpu="h100", count=1) for each in (spec, whole)]
    ahead = [each.stream_bytes - 2 * spec.group_bytes for each in found]
    # 1 MiB a batch of one hook, of which two make a run, and 60 MiB one of sixty.
    assert ahead == [5 * 2 * 2**20, 5 * 60 * 2**20]


def test_packed_moments_fit_where_float32_does_not():
    spec = spec_of(latents=2**21, k=256, batch_rows=16_384)
    with pytest.raises(ConfigError, match="moments: bfloat16"):
        estimate(spec, 1024, tokens=1e9, gpu="h100", count=1)
    found = [
        estimate(spec.model_copy(update={"moments": kind}), 1024, tokens=1e9, gpu="h100", count=1)
        for kind in ("bfloat16", "int8")
    ]
    assert found[0].memory.moments == pytest.approx(2 * found[1].memory.moments, rel=0.01)
    assert found[1].step_seconds < found[0].step_seconds


def test_bfloat16_products_are_faster_and_take_a_copy():
    spec = spec_of(latents=131_072, k=32, batch_rows=65_536)
    half = spec.model_copy(update={"compute_dtype": "bfloat16"})
    one, two = (estimate(s, 768, tokens=1e9, gpu="h100", count=1) for s in (spec, half))
    assert two.step_seconds < one.step_seconds / 4
    assert two.memory.step > one.memory.step + 2 * 131_072 * 768 * 2


def test_twice_the_cards_is_no_slower_and_a_faster_card_is_faster():
    spec = spec_of(latents=131_072, k=32, batch_rows=65_536)
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
        ({"latents": 2**22, "batch_rows": 4096}, {"gpu": "l4"}, "latents: "),
    ],
)
def test_what_cannot_be_is_refused(fields, arguments, words):
    with pytest.raises(ConfigError, match=words):
        estimate(spec_of(**fields), 768, **{"tokens": 1e6, "gpu": "h100", "count": 1} | arguments)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu"])
@pytest.mark.parametrize("latents", [2048, 4097, 18])
def test_every_mesh_that_training_takes_is_estimated_and_no_other(activation, latents):
    """18 latents over 3 shards: K = 16 is more than a shard holds."""
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
    largest = max(len(part) for part in shards)
    found = estimate(spec, 768, tokens=1e6, gpu="h100", count=2)
    assert largest == largest_shard(4097, 2) == 2049
    assert found.memory == sae_memory(spec, 768, latents=largest, device="cuda")
    assert found.memory.counts == 8 * largest


def test_what_would_fit_is_something_that_training_takes():
    """Half of 3 x 2^19 latents, and so on, are below the prefix of 2^20 long before they fit."""
    fields = {"latents": 3 << 19, "matryoshka": (1 << 20,), "kernels": "eager", "batch_rows": 1 << 18}
    with pytest.raises(ConfigError, match=r"does not fit 1 x l4") as refused:
        estimate(spec_of(**fields), 4096, tokens=1e9, gpu="l4", count=1)
    fix = str(refused.value).partition("What fits")[2]
    assert not any(word in fix for word in ("latents:", "mesh.latent", "moments")), fix
