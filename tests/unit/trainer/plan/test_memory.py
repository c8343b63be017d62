"""Memory on a CPU by arithmetic against torch's own account of a real run; on a GPU from a step on paper."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import set_step
from winnow.sae.init import initialise
from winnow.sae.model import Sae
from winnow.schemas.layers import SetSpec
from winnow.schemas.training import TrainSpec
from winnow.trainer.plan.memory import (
    DEAD_SHARE,
    Memory,
    fleet_memory,
    gpu_memory,
    sae_memory,
    standing_memory,
)
from winnow.trainer.plan.paper import step_on_paper
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


def test_a_fleet_holds_all_and_steps_one_at_a_time():
    one, two = spec_of(), spec_of(latents=4096)
    a, b = sae_memory(one, 64), sae_memory(two, 64)
    assert fleet_memory([(one, 64), (two, 64)]) == a.standing + b.standing + max(a.step, b.step)


@pytest.mark.parametrize(
    "fields",
    [
        {"moments": "int8"},
        {"target_hook": "mlp_out.1", "skip": True},
        {"set": SetSpec(layers=(0, 2)), "normalize": "dataset", "hook": "resid_mid.0"},
        {"set": SetSpec(layers=(0, 2), cross=True), "normalize": "dataset", "hook": "resid_mid.0"},
    ],
)
def test_what_stands_on_a_gpu_is_what_stands_on_a_cpu(fields):
    """The arithmetic and the tensors of a step on paper, which are counted one by one."""
    if "set" in fields:
        fields = fields | {"target_hook": "mlp_out.0"}
    spec = spec_of(**{"batch_rows": 256, "auxk_coefficient": 0.0} | fields)
    said, counted = standing_memory(spec, 64, spec.latents), gpu_memory(spec, 64)
    skip = 2 * 64 * 64 * 4 if spec.skip else 0  # which the arithmetic leaves out, as it is small
    for name in ("weights", "gradients", "moments", "average", "counts"):
        assert getattr(counted, name) - getattr(said, name) in (0, skip // 2, skip), name


def test_a_plain_step_on_paper_holds_what_torch_allocates():
    """The eager step's operations are those of any device, so its peak on paper is that of torch's own."""
    spec = spec_of(latents=4096, k=16, batch_rows=1024, kernels="eager")
    run = run_of(spec, 128)
    rows = torch.randn(spec.batch_rows, 128, generator=torch.Generator().manual_seed(1))
    weights = torch.ones(len(rows))
    train_step(run, rows, weights)
    peak = peak_of(lambda: train_step(run, rows, weights))
    paper = step_on_paper(spec, 128, stored="float32")
    # the batch, and on a GPU the next one, with a weight for each row of this one
    batches = 2 * rows.nbytes + weights.nbytes
    assert paper.peak - sum(paper.held.values()) - batches == pytest.approx(peak, rel=0.05)
    assert standing_bytes(run) == paper.held


def test_memory_on_a_gpu_has_room_for_the_dead():
    spec = spec_of()
    dead = Memory.of(step_on_paper(spec, 64, dead_share=DEAD_SHARE))
    assert gpu_memory(spec, 64) == dead
    assert dead.step > Memory.of(step_on_paper(spec, 64)).step
    assert gpu_memory(spec.model_copy(update={"auxk_coefficient": 0.0}), 64).step < dead.step


def test_a_fleet_on_a_gpu_steps_one_at_a_time():
    one, two = spec_of(auxk_coefficient=0.0), spec_of(latents=4096, auxk_coefficient=0.0)
    a, b = gpu_memory(one, 64), gpu_memory(two, 64)
    whole = fleet_memory([(one, 64), (two, 64)], "cuda")
    assert whole == a.standing + b.standing + max(a.step, b.step)
