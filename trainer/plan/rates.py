"""What a card does in a second, and how long the entries of a ledger take it.

Rates are those of the data sheets; the shares of them that are reached are assumed: `python -m
benchmarks.gpu` measures them on a card, and no card has been measured yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from winnow.trainer.plan.ledger import Entry


class Gpu(NamedTuple):
    """A card's constants. Rates are the data sheet's, dense, without sparsity."""

    memory: float
    """Bytes."""
    flops: float
    """FLOP/s of a float32 product without tensor cores, the trainer's default."""
    half_flops: float
    """FLOP/s of a product of bfloat16 operands on tensor cores, summed in float32; twice that of TF32."""
    bandwidth: float
    """Bytes per second of its memory."""
    link: float
    """Bytes per second to another card of the machine, in one direction."""
    source: str


GPUS = {
    "a100-40gb": Gpu(40e9, 19.5e12, 312e12, 1.555e12, 300e9, "data sheet: NVIDIA A100 SXM"),
    "a100-80gb": Gpu(80e9, 19.5e12, 312e12, 2.039e12, 300e9, "data sheet: NVIDIA A100 SXM"),
    "h100": Gpu(80e9, 67e12, 989e12, 3.35e12, 450e9, "data sheet: NVIDIA H100 SXM"),
    "h200": Gpu(141e9, 67e12, 989e12, 4.8e12, 450e9, "data sheet: NVIDIA H200 SXM"),
    "l4": Gpu(24e9, 30.3e12, 121e12, 0.3e12, 32e9, "data sheet: NVIDIA L4"),
    "l40s": Gpu(48e9, 91.6e12, 362e12, 0.864e12, 32e9, "data sheet: NVIDIA L40S"),
    "rtx-4090": Gpu(24e9, 82.6e12, 165e12, 1.008e12, 32e9, "data sheet: GeForce RTX 4090"),
}
EFFICIENCY = {
    "product": (
        680 / 989,
        "assumed: the library's bfloat16 product, 680 of the 989 TFLOP/s of an H100; not measured",
    ),
    "float32 product": (0.75, "assumed: the library's float32 product without tensor cores; not measured"),
    "fused product": (0.8, "assumed: what a kernel with its own product gets of the library's; not measured"),
    "stream": (0.9, "assumed: a long streaming kernel's share of the memory's bandwidth; not measured"),
    "gather": (0.75, "assumed: the same of rows at places given by indices; not measured"),
    "link": (0.7, "assumed: a ring's share of the link; not measured"),
    "memory": (0.92, "assumed: what driver, context and the allocator leave of the card; not measured"),
    "operation": (6e-6, "assumed: seconds of the host per operation of torch or launch; not measured"),
    "synchronisation": (15e-6, "assumed: seconds of the host per wait for the device; not measured"),
}
"""Constant -> its value and source. No GPU has been measured yet; docs/estimate.md says how to do it."""
_HALF_PRODUCTS = {"bfloat16": 1, "float16": 1, "tf32": 2, "bf16x3": 3, "tf32x3": 6, "bf16x6": 6, "bf16x9": 9}
"""Precision -> bfloat16 products in whose time one is made; float32 and float64 are not on tensor cores."""


class Rates(NamedTuple):
    """What a card is taken to do in a second."""

    product: float
    """FLOP/s of the library's bfloat16 product."""
    float32: float
    """FLOP/s of its float32 product."""
    fused: float
    """Share of either that a kernel with its own product gets."""
    stream: float
    """Bytes per second."""
    gather: float
    """Bytes per second."""
    link: float
    """Bytes per second."""
    operation: float
    """Seconds of the host per operation."""
    sync: float
    """Seconds of the host per synchronisation."""

    @classmethod
    def of(cls, card: Gpu, fused: float | None = None) -> Rates:
        """Of a card, by EFFICIENCY; `fused` replaces the assumed share."""
        share = {name: value for name, (value, _) in EFFICIENCY.items()}
        return cls(
            product=card.half_flops * share["product"],
            float32=card.flops * share["float32 product"],
            fused=share["fused product"] if fused is None else fused,
            stream=card.bandwidth * share["stream"],
            gather=card.bandwidth * share["gather"],
            link=card.link * share["link"],
            operation=share["operation"],
            sync=share["synchronisation"],
        )

    def multiply(self, kind: str, own: bool, flops: float) -> float:
        """Seconds of a product of a precision, by a kernel of the project (`own`) or the library."""
        products = _HALF_PRODUCTS.get(kind)
        rate = self.float32 if products is None else self.product / products
        return flops / (rate * (self.fused if own else 1.0))

    def device_seconds(self, entry: Entry) -> float:
        """Seconds of the device: the longer of products and streamed bytes, and the gathered bytes."""
        products = sum(self.multiply(kind, own, flops) for (kind, own), flops in entry.flops.items())
        return max(products, entry.streamed / self.stream) + entry.gathered / self.gather

    def host_seconds(self, entries: Iterable[Entry]) -> float:
        """Seconds of the host for all of them."""
        some = list(entries)
        operations, syncs = sum(e.operations for e in some), sum(e.syncs for e in some)
        return operations * self.operation + syncs * self.sync


class Part(NamedTuple):
    """A part of the step."""

    seconds: float
    """Of the device."""
    streamed: int
    """Bytes."""
    gathered: int
    """Bytes."""
    flops: float
    operations: int
    launches: int
    syncs: int


def parts_of(entries: Iterable[tuple[str, Entry]], rates: Rates, times: int = 1) -> dict[str, Part]:
    """Add entries up by part, `times` times over."""
    found: dict[str, list[Entry]] = {}
    for part, entry in entries:
        found.setdefault(part, []).append(entry)
    return {
        part: Part(
            times * sum(map(rates.device_seconds, some)),
            times * sum(e.streamed for e in some),
            times * sum(e.gathered for e in some),
            times * sum(sum(e.flops.values()) for e in some),
            times * sum(e.operations for e in some),
            times * sum(e.launches for e in some),
            times * sum(e.syncs for e in some),
        )
        for part, some in found.items()
    }
