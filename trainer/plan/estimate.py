"""Estimate of a run on a given GPU before it is rented: memory, step time, tokens/s, hours, money.

Memory is computed (`winnow.trainer.plan.memory`); tests compare it with what torch allocates. Time is a
roofline: the encoder's product at the card's rate, everything sparse and the update at its memory bandwidth,
and collectives at the rate of its link, none of it overlapped. EFFICIENCY holds the assumed shares of the
data sheet's rates.

Legend: B rows, D d_model, N latents, K active latents per row.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from winnow.common.figures import human_bytes
from winnow.schemas.errors import ConfigError, DependencyMissing
from winnow.schemas.training import SaeParts, TrainSpec
from winnow.trainer.mesh.world import check_mesh
from winnow.trainer.plan.memory import FLOAT, HALF, Memory, outputs, parameters, sae_memory
from winnow.trainer.step.moments import BYTES
from winnow.trainer.step.recipe import choose_kernels

_GIB = 2**30


class _Gpu(NamedTuple):
    """A card's constants. Rates are the data sheet's, dense, without sparsity."""

    memory: float
    """Bytes."""
    flops: float
    """FLOP/s of a float32 product without tensor cores, the trainer's default."""
    half_flops: float
    """FLOP/s of a product of bfloat16 operands on tensor cores, summed in float32."""
    bandwidth: float
    """Bytes per second of its memory."""
    link: float
    """Bytes per second to another card of the machine, in one direction."""
    source: str


GPUS = {
    "a100-40gb": _Gpu(40e9, 19.5e12, 312e12, 1.555e12, 300e9, "data sheet: NVIDIA A100 SXM"),
    "a100-80gb": _Gpu(80e9, 19.5e12, 312e12, 2.039e12, 300e9, "data sheet: NVIDIA A100 SXM"),
    "h100": _Gpu(80e9, 67e12, 989e12, 3.35e12, 450e9, "data sheet: NVIDIA H100 SXM"),
    "h200": _Gpu(141e9, 67e12, 989e12, 4.8e12, 450e9, "data sheet: NVIDIA H200 SXM"),
    "l4": _Gpu(24e9, 30.3e12, 121e12, 0.3e12, 32e9, "data sheet: NVIDIA L4"),
    "l40s": _Gpu(48e9, 91.6e12, 362e12, 0.864e12, 32e9, "data sheet: NVIDIA L40S"),
    "rtx-4090": _Gpu(24e9, 82.6e12, 165e12, 1.008e12, 32e9, "data sheet: GeForce RTX 4090"),
}
EFFICIENCY = {
    "product": (0.75, "assumed: a large product's share of the float32 rate; not measured"),
    "bandwidth": (0.7, "assumed: gathers and the update's share of the memory's bandwidth; not measured"),
    "link": (0.7, "assumed: a ring's share of the link; not measured"),
    "memory": (0.92, "assumed: what driver, context and the allocator leave of the card; not measured"),
}
"""Constant -> its value and source. No GPU has been measured yet; docs/estimate.md says how to do it."""
_GATHERS = 5
"""Passes over K rows of D numbers per row of the batch: decoding, the gradients of the values, and the
sums for W_dec and W_enc, one of which reads and writes."""
_OF_TARGET = 3
"""Those of them that are made for every target: decoding, gradients of the values, sums for W_dec."""
# fewer than the code makes: on `meta` tensors 48 passes over an [N, D] were counted for both matrices
# together, casts and temporaries included, where 22 would do
UPDATE_PASSES = 14
"""Times that every weight's number is read or written: gradient written, projected (2), clipped (1);
Adam reads four and writes three; renormalisation 1; the moving average 2."""

_MOMENT_PASSES = 4
"""Those of UPDATE_PASSES that read or write Adam's moments: fewer bytes if they are packed."""


class Estimate(NamedTuple):
    """Memory, time and money of a run."""

    gpu: str
    gpus: int
    data: int
    latent: int
    memory: Memory
    """Memory of one GPU."""
    available: int
    """Bytes of one GPU that a run may take."""
    stream_bytes: int
    """Bytes of host memory of the streams, buffers and batches ahead, over all processes."""
    seconds: dict[str, float]
    """Seconds of a step by part."""
    rows: int
    """Rows B of a step."""
    steps: int
    currency: str
    price: float | None
    """Price of one GPU per hour."""

    @property
    def step_seconds(self) -> float:
        """Seconds of one step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Rows per second, over all GPUs."""
        return self.rows / self.step_seconds

    @property
    def hours(self) -> float:
        """Hours of the whole run."""
        return self.steps * self.step_seconds / 3600

    @property
    def money(self) -> float | None:
        """Price of all GPUs and hours; None without a price."""
        return None if self.price is None else self.hours * self.gpus * self.price


def estimate(
    spec: TrainSpec,
    d_model: int,
    *,
    tokens: float,
    gpu: str,
    count: int,
    price: float | None = None,
    currency: str = "USD",
) -> Estimate:
    """Estimate memory, time and money of a run.

    Args:
        spec: What is trained; its mesh says how `count` GPUs share the work, as for a run.
        d_model: D.
        tokens: Rows of the whole run.
        gpu: A name of GPUS.
        count: Number of GPUs.
        price: Price of one GPU per hour.
        currency: Currency of the price.

    Raises:
        ConfigError: There is no such GPU, training would refuse the spec on them, or the run does not fit;
            the last error says what would.
    """
    card = GPUS.get(gpu)
    if card is None:
        raise ConfigError("--gpu", expected=" or ".join(sorted(GPUS)), got=repr(gpu))
    data, latent = check_mesh(spec, count)
    # only for its refusals; a missing Triton is none, because the machine that estimates need not train
    with suppress(DependencyMissing):
        choose_kernels(spec, SaeParts(activation=spec.activation), torch.device("cuda"))
    memory = _one_gpu(spec, d_model, data, latent)
    available = int(card.memory * EFFICIENCY["memory"][0])
    if memory.total > available:
        raise ConfigError(
            f"the run does not fit {count} x {gpu}: each GPU",
            expected=f"at most {human_bytes(available)}",
            got=f"{human_bytes(memory.total)} ({human_bytes(memory.standing)} for weights, gradients, Adam "
            f"and average, {human_bytes(memory.step)} for a step)",
            fix=_what_would_fit(spec, d_model, available, count),
        )
    return Estimate(
        gpu=gpu,
        gpus=count,
        data=data,
        latent=latent,
        memory=memory,
        available=available,
        stream_bytes=_stream_bytes(spec, d_model, data),
        seconds=step_seconds(spec, d_model, card, data, latent),
        rows=spec.batch_rows,
        steps=math.ceil(tokens / spec.batch_rows),
        currency=currency,
        price=price,
    )


def _stream_bytes(spec: TrainSpec, d_model: int, data: int) -> int:
    """Host memory of the streams of all data ranks; a GPU that holds a further shard opens none."""
    batch = spec.batch_rows // data * len(spec.stream_hooks) * d_model * FLOAT
    # twice, because the next group is read while the current one is used
    # here, not above: with it come the store's codecs, which `benchmarks.gpu` does without
    from winnow.store.read.assemble import assembled_bytes

    return 2 * spec.group_bytes + data * assembled_bytes(batch)


def _one_gpu(spec: TrainSpec, d_model: int, data: int, latent: int) -> Memory:
    """Memory of the GPU of a mesh that holds the largest shard."""
    # a run fits only if every shard does
    shard = largest_shard(spec.latents, latent)
    return sae_memory(spec, d_model, rows=spec.batch_rows // data, latents=shard, device="cuda")


def largest_shard(latents: int, shards: int) -> int:
    """Latents of the largest of the shards, which differ by one if `shards` does not divide `latents`."""
    return -(-latents // shards)


def step_seconds(spec: TrainSpec, d_model: int, card: _Gpu, data: int, latent: int) -> dict[str, float]:
    """Seconds of a step by part; the module's docstring says what is counted."""
    rows, latents = spec.batch_rows / data, largest_shard(spec.latents, latent)
    bandwidth = card.bandwidth * EFFICIENCY["bandwidth"][0]
    # Multi-TopK decodes K and then 4K
    active = spec.k * (5 if spec.multi_topk else 1) / latent
    widths, layers = [count or 1 for count in outputs(spec)], len(outputs(spec))
    size = sum(
        parameters(d_model, latents, None if count is None else count * d_model) for count in outputs(spec)
    )
    size *= FLOAT
    passes = UPDATE_PASSES if spec.ema else UPDATE_PASSES - 2
    passes -= _MOMENT_PASSES * (1 - BYTES[spec.moments] / FLOAT)
    half = spec.compute_dtype == "bfloat16"
    operand, flops = (HALF, card.half_flops) if half else (FLOAT, card.flops)
    # the encoder's part of the gathers, and for each target the decoder's
    gathered = sum(_GATHERS - _OF_TARGET + _OF_TARGET * count for count in widths)
    sent = 0.0
    # the table in docs/trainer.md; every shard has the whole error, so no gradient crosses the latent axis
    if latent > 1:
        sent += layers * 2 * (latent - 1) / latent * rows * d_model * FLOAT
        one = min(spec.k, math.ceil(2 * spec.k / latent) + 4)
        sent += layers * one * rows * FLOAT * (latent - 1)
    if data > 1:  # a step sends what is smaller: gradients, or rows and codes
        dense = 2 * (data - 1) / data * size
        codes = layers * (data - 1) * rows * (d_model * FLOAT + active * 12)
        # with micro-batches only gradients are left to send: the rows of earlier parts are gone
        by_sums = spec.accumulate > 1 or (spec.set is not None and spec.set.cross)
        sent += dense if by_sums else min(dense, codes)
    return {
        "encoder product": layers * 2 * rows * d_model * latents / (flops * EFFICIENCY["product"][0]),
        "top-k": layers * rows * latents * FLOAT * 2 / bandwidth,
        "sparse gathers and sums": gathered * rows * active * d_model * operand / bandwidth,
        "update": passes * size / bandwidth,
        "between GPUs": sent / (card.link * EFFICIENCY["link"][0]),
    }


def _what_would_fit(spec: TrainSpec, d_model: int, available: int, count: int) -> str:
    """Name the smallest changes that would fit, each of them one that training accepts."""

    def fits(gpus: int, change: dict[str, Any]) -> bool:
        # validated as a run's spec: advice that training refuses is worse than none
        try:
            changed = TrainSpec.model_validate(spec.model_dump() | change)
            return _one_gpu(changed, d_model, *check_mesh(changed, gpus)).total <= available
        except (ConfigError, ValidationError):
            return False

    data, latent = spec.mesh.data, spec.mesh.latent
    shards = [latent << times for times in range(1, 13)]
    moments = [kind for kind in ("bfloat16", "int8") if BYTES[kind] < BYTES[spec.moments]]
    ways = [
        [(shard * (data or 1), {"mesh": {"data": data, "latent": shard}}) for shard in shards],
        [(count, {"batch_rows": rows}) for rows in _halved(spec.batch_rows)],
        [(count, {"ema": False})] if spec.ema else [],
        [(count, {"moments": kind}) for kind in moments],
        [(count, {"latents": latents}) for latents in _halved(spec.latents)],
    ]
    found = [next((way for way in each if fits(*way)), None) for each in ways]
    said = [_describe(*way) for way in found if way is not None]
    return "What fits: " + "; or ".join(said) if said else "Take a GPU with more memory"


def _halved(size: int) -> list[int]:
    """Half of `size`, a quarter and so on down to 1."""
    return [size >> times for times in range(1, size.bit_length())]


def _describe(gpus: int, change: dict[str, Any]) -> str:
    ((field, value),) = change.items()
    if field == "mesh":
        return f"{gpus} such GPUs with mesh.latent: {value['latent']}"
    return f"{field}: {str(value).lower()}"


def data_volume(
    tokens: float, d_model: int, bytes_a_number: int = 2, shard_bytes: int = 256 * 2**20, hooks: int = 1
) -> dict[str, float]:
    """`bytes` and `shards` of the activations of some hooks."""
    size = tokens * d_model * bytes_a_number * hooks
    return {"bytes": size, "shards": math.ceil(size / shard_bytes)}


def table_rows(found: Estimate, volume: dict[str, float]) -> list[list[str]]:
    """Rows of the table that the command prints."""
    memory = found.memory
    parts = ", ".join(f"{name} {seconds * 1000:,.1f}" for name, seconds in found.seconds.items() if seconds)
    return [
        ["GPUs", f"{found.gpus} x {found.gpu} (data {found.data} x latent {found.latent})"],
        ["memory, each GPU", f"{human_bytes(memory.total)} of {human_bytes(found.available)}"],
        ["  weights and gradients", human_bytes(memory.weights + memory.gradients)],
        ["  Adam, average, counts", human_bytes(memory.moments + memory.average + memory.counts)],
        ["  a step", human_bytes(memory.step)],
        ["host memory of the stream", f"up to {human_bytes(found.stream_bytes)}"],
        ["a step", f"{found.step_seconds * 1000:,.1f} ms"],
        ["  of it, ms", parts],
        ["tokens/s", f"{found.tokens_per_second:,.0f}"],
        ["steps", f"{found.steps:,} of {found.rows:,} rows"],
        ["data", f"{human_bytes(volume['bytes'])}, {volume['shards']:,.0f} shards of 256 MiB"],
        # `max`: an estimate of no tokens takes no hours
        ["read", f"{human_bytes(volume['bytes'] / max(found.hours * 3600, 1e-9))}/s"],
        ["hours", f"{found.hours:,.1f}"],
        ["money", "no price" if found.money is None else f"{found.money:,.0f} {found.currency}"],
        ["constants", f"{GPUS[found.gpu].source}; shares of it assumed, not measured (docs/estimate.md)"],
    ]


def as_json(found: Estimate, volume: dict[str, float]) -> dict[str, object]:
    """Everything as JSON-compatible values."""
    return {
        **{key: value for key, value in found._asdict().items() if key != "memory"},
        "memory": {**found.memory._asdict(), "standing": found.memory.standing, "total": found.memory.total},
        "step_seconds": found.step_seconds,
        "tokens_per_s": found.tokens_per_second,
        "hours": found.hours,
        "money": found.money,
        "data": volume,
        "constants": {
            name: {"value": value, "source": source} for name, (value, source) in EFFICIENCY.items()
        }
        | {"gpu": GPUS[found.gpu]._asdict()},
    }
