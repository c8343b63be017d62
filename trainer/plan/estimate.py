"""Estimate of a run on a given GPU before it is rented: memory, step time, tokens/s, hours, money.

Memory and time come from the ledger of a step on paper (`winnow.trainer.plan.paper`): the step's own code,
run at full size on tensors without contents. Time divides its products and bytes by the card's rates
(`winnow.trainer.plan.rates`), and what a mesh sends by its link, none of it overlapped.

Legend: B rows, D d_model, N latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from winnow.common.figures import count_of, human_bytes, human_hours
from winnow.schemas.errors import ConfigError, DependencyMissing
from winnow.schemas.harvest import Dtype, row_bytes
from winnow.schemas.training import SaeParts, TrainSpec
from winnow.trainer.mesh.fit import check_mesh
from winnow.trainer.plan.memory import DEAD_SHARE, Memory, gpu_memory, standing_memory
from winnow.trainer.plan.no_triton import has_triton
from winnow.trainer.plan.paper import Paper, step_on_paper
from winnow.trainer.plan.rates import EFFICIENCY, GPUS, Part, Rates, parts_of
from winnow.trainer.step.moments import BYTES
from winnow.trainer.step.recipe import choose_kernels


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
    stream_known: bool
    """Whether that is of a dataset that was opened, and not the most that any may take."""
    parts: dict[str, Part]
    """The step's parts as its code marks them, on one GPU, none of the latents dead."""
    seconds: dict[str, float]
    """Seconds of a step: of the device by part, `between GPUs`, and `host` for what the host takes longer."""
    dead_step_seconds: float | None
    """Seconds of a step in which DEAD_SHARE of the latents are dead; None without AuxK."""
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
    stored: Dtype = "bfloat16",
    stream_bytes: Callable[[int], int] | None = None,
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
        stored: Type of the dataset, in which rows reach a GPU.
        stream_bytes: Data ranks -> host memory of their streams over a dataset. None, without a dataset,
            takes the most that `group_bytes` allows.

    Raises:
        ConfigError: There is no such GPU, training would refuse the spec on them, or the run does not fit;
            the last error says what would.
    """
    if gpu == "cpu":
        raise ConfigError(
            "--gpu",
            expected=" or ".join(sorted(GPUS)),
            got="cpu, for whose products and memory there is no published rate",
            fix="Run `winnow train` for a minute instead: it shows its rows/s and the time left, and resumes "
            "when it was interrupted",
        )
    card = GPUS.get(gpu)
    if card is None:
        raise ConfigError("--gpu", expected=" or ".join(sorted(GPUS)), got=repr(gpu))
    data, latent = check_mesh(spec, count)
    rates = Rates.of(card)
    # only for its refusals; a missing Triton is none, because the machine that estimates need not train
    with suppress(DependencyMissing):
        choose_kernels(spec, SaeParts(activation=spec.activation), torch.device("cuda"))
    available = int(card.memory * EFFICIENCY["memory"][0])
    papers: list[Paper] = []
    memory = standing_memory(spec, d_model, -(-spec.latents // latent))
    # what stands is known at once, and a step that could not begin need not be reckoned
    if memory.total <= available:
        for dead in (0.0, DEAD_SHARE) if spec.auxk_coefficient else (0.0,):
            papers.append(
                step_on_paper(spec, d_model, data=data, latent=latent, dead_share=dead, stored=stored)
            )
        memory = max((Memory.of(paper) for paper in papers), key=lambda memory: memory.total)
    if memory.total > available:
        raise ConfigError(
            f"the run does not fit {count} x {gpu}: each GPU",
            expected=f"at most {human_bytes(available)}",
            got=f"{human_bytes(memory.total)} ({human_bytes(memory.standing)} for weights, gradients, Adam "
            "and average" + (f", {human_bytes(memory.step)} for a step)" if memory.step else " alone)"),
            fix=_what_would_fit(spec, d_model, available, count, stored),
        )
    usual = papers[0]
    return Estimate(
        gpu=gpu,
        gpus=count,
        data=data,
        latent=latent,
        memory=memory,
        available=available,
        stream_bytes=stream_bytes(data) if stream_bytes else _most_stream_bytes(spec, d_model, data, stored),
        stream_known=stream_bytes is not None,
        parts=parts_of(((site.part, entry) for site, entry in usual.entries.items()), rates, usual.runs),
        seconds=step_seconds(usual, rates),
        dead_step_seconds=sum(step_seconds(papers[1], rates).values()) if len(papers) > 1 else None,
        rows=spec.batch_rows,
        steps=math.ceil(tokens / spec.batch_rows),
        currency=currency,
        price=price,
    )


def _most_stream_bytes(spec: TrainSpec, d_model: int, data: int, stored: Dtype) -> int:
    """Most host memory of all data ranks' streams; a GPU that holds a further shard of latents opens none."""
    batch = spec.batch_rows // data * len(spec.stream_hooks) * row_bytes(stored, d_model)
    # twice, because the next group is read while the current one is used
    # here, not above: with it come the store's codecs, which `benchmarks.gpu` does without
    from winnow.store.read.assemble import assembled_bytes

    return 2 * spec.group_bytes + data * assembled_bytes(batch)


def step_seconds(paper: Paper, rates: Rates) -> dict[str, float]:
    """Seconds of a step by part; see `Estimate.seconds`."""
    parts = parts_of(((site.part, entry) for site, entry in paper.entries.items()), rates, paper.runs)
    found = {name: part.seconds for name, part in parts.items()}
    # the host runs ahead of the device, so that only what it takes longer is waited for
    host = paper.runs * rates.host_seconds(paper.entries.values()) - sum(found.values())
    sent = paper.runs * sum(paper.sent.values())
    return found | {"between GPUs": sent / rates.link, "host": max(0.0, host)}


def _what_would_fit(spec: TrainSpec, d_model: int, available: int, count: int, stored: Dtype) -> str:
    """Name the smallest changes that would fit, each of them one that training accepts."""

    def fits(gpus: int, change: dict[str, Any]) -> bool:
        # validated as a run's spec: advice that training refuses is worse than none
        try:
            changed = TrainSpec.model_validate(spec.model_dump() | change)
            data, latent = check_mesh(changed, gpus)
            # first what takes no ledger to know
            if standing_memory(changed, d_model, -(-changed.latents // latent)).total > available:
                return False
            memory = gpu_memory(changed, d_model, data=data, latent=latent, stored=stored)
            return memory.total <= available
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
    """`bytes` and `shards` of the activations of some hooks, if a shard has `shard_bytes`."""
    size = tokens * d_model * bytes_a_number * hooks
    return {"bytes": size, "shards": math.ceil(size / shard_bytes), "shard_bytes": shard_bytes}


def table_rows(found: Estimate, volume: dict[str, float]) -> list[list[str]]:
    """Rows of the table that the command prints."""
    memory, dead = found.memory, found.dead_step_seconds
    rows = [
        ["GPUs", f"{found.gpus} x {found.gpu} (data {found.data} x latent {found.latent})"],
        ["memory, each GPU", f"{human_bytes(memory.total)} of {human_bytes(found.available)}"],
        ["  weights and gradients", human_bytes(memory.weights + memory.gradients)],
        ["  Adam, average, counts", human_bytes(memory.moments + memory.average + memory.counts)],
        ["  a step", human_bytes(memory.step)],
        [
            "host memory of the stream",
            ("" if found.stream_known else "up to ") + human_bytes(found.stream_bytes),
        ],
        ["a step, reckoned", f"{found.step_seconds * 1000:,.1f} ms"],
    ]
    for name, seconds in found.seconds.items():
        part = found.parts.get(name)
        said = f"{seconds * 1000:,.1f} ms"
        if part is not None:
            said += f"; {human_bytes(part.streamed + part.gathered)}, {part.operations:,} operations"
            said += f", {part.flops / 1e12:,.1f} TFLOP" if part.flops else ""
            said += f", {part.syncs:,} waits" if part.syncs else ""
        if seconds or part is not None:
            rows.append([f"  {name}", said])
    if dead is not None:
        rows.append([f"  with {DEAD_SHARE:.0%} of latents dead", f"{dead * 1000:,.1f} ms"])
    shards = count_of(int(volume["shards"]), "shard")
    return [
        *rows,
        ["tokens/s", f"{found.tokens_per_second:,.0f}"],
        ["steps", f"{found.steps:,} of {count_of(found.rows, 'row')}"],
        ["data", f"{human_bytes(volume['bytes'])}, {shards} of {human_bytes(volume['shard_bytes'])}"],
        # `max`: an estimate of no tokens takes no hours
        ["read", f"{human_bytes(volume['bytes'] / max(found.hours * 3600, 1e-9))}/s"],
        ["time", human_hours(found.hours)],
        ["money", "no price" if found.money is None else f"{found.money:,.2f} {found.currency}"],
        ["constants", f"{GPUS[found.gpu].source}; shares of it assumed, not measured (docs/estimate.md)"],
        *([] if has_triton() else [["kernels", "priced from their launches: Triton is not installed here"]]),
    ]


def as_json(found: Estimate, volume: dict[str, float]) -> dict[str, object]:
    """Everything as JSON-compatible values."""
    return {
        **{key: value for key, value in found._asdict().items() if key not in ("memory", "parts")},
        "parts": {name: part._asdict() for name, part in found.parts.items()},
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
