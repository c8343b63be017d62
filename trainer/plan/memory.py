"""Memory of a training process: on a CPU by arithmetic, tensor by tensor; on a GPU from the step's ledger.

tests/unit/trainer/plan/test_memory.py compares the arithmetic with what torch allocates.

Legend: B rows, D d_model, O width of the output, N latents, K active latents per row, L layers of a set.
Sizes are of one process: with a mesh, B is its rows and N its latents.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from winnow.schemas.harvest import Dtype
from winnow.schemas.training import MomentsDtype, TrainSpec
from winnow.trainer.kernels.segment_grad import BLOCK_BYTES
from winnow.trainer.plan.paper import HELD, Paper, step_on_paper
from winnow.trainer.step.moments import BYTES

FLOAT = 4
"""Bytes of a float32: weights, gradients, average and rows, and moments unless they are packed."""
ROWS_ENCODING, ROWS_GRADIENTS = 3, 6
"""Tensors [B, D] held while rows are encoded: the batch as read, normalised, centred; and, while gradients
are computed, also the reconstruction, its error and its gradient."""
_ENTRY_BYTES = 36
"""Bytes per active latent of a row: value 4, index 8, and the peak of sorting them by latent."""
_TILE_BYTES = 1024 * 4096 * FLOAT
"""Bytes of the encoder's tile of pre-activations; a mask of one byte per number is held beside it."""
DEAD_SHARE = 0.1
"""Share of the latents that are taken to be dead where AuxK's tensors are counted, on a GPU."""


class Memory(NamedTuple):
    """Bytes of one SAE on one device."""

    weights: int
    gradients: int
    moments: int
    """Both of Adam's moments."""
    average: int
    """The moving average; 0 if none is kept."""
    counts: int
    """Rows since each latent was active."""
    step: int
    """What a step holds at its peak in addition to all that."""

    @property
    def standing(self) -> int:
        """What is held between steps, gradients included."""
        # gradient buffers live as long as the run: a fresh [N, D] tensor costs more than filling it
        # (docs/kernels.md: 17 ms for 38 MB, against 11 ms for the sums that fill it)
        return self.weights + self.gradients + self.moments + self.average + self.counts

    @property
    def total(self) -> int:
        """Bytes at the peak of a step."""
        return self.standing + self.step

    @classmethod
    def of(cls, paper: Paper) -> Memory:
        """Of a step on paper."""
        held = {name: paper.held[name] for name in HELD}
        return cls(**held, step=paper.peak - sum(held.values()))


def parameters(d_model: int, latents: int, d_out: int | None = None) -> int:
    """Numbers in W_enc, W_dec, b_enc and b_pre; of a transcoder with output [B, O] also in b_dec."""
    if d_out is None:
        return 2 * latents * d_model + latents + d_model
    return latents * (d_model + d_out + 1) + d_model + d_out


def outputs(spec: TrainSpec) -> tuple[int | None, ...]:
    """For each dictionary of a spec the width of its output, in widths D; None for an autoencoder.

    An autoencoder or transcoder is one dictionary, a set one per layer; layer l of a cross-layer set writes
    to all L - l targets from l on.
    """
    if spec.set is None:
        return (1 if spec.target_hook is not None else None,)
    return tuple(len(spec.set.targets(layer)) for layer in spec.set.range)


def _moments_bytes(kind: MomentsDtype, d_model: int, latents: int, d_out: int | None) -> int:
    """Bytes of Adam's two moments: packed for matrices, with one scale per row for `int8`; biases float32."""
    matrices = latents * (d_model + (d_out or d_model))
    scales = 2 * latents if kind == "int8" else 0
    return 2 * (matrices * BYTES[kind] + (scales + parameters(d_model, latents, d_out) - matrices) * FLOAT)


def sae_memory(spec: TrainSpec, d_model: int) -> Memory:
    """Memory for training one SAE or transcoder, or a transcoder set, on a CPU.

    AuxK's tensors are left out, because the number of dead latents is not known in advance. They are at most
    B x 12 k_aux numbers of a micro-batch, and with `accumulate` two rows of D per dead latent.

    Weights, gradients and float32 moments of an autoencoder are 32 N D bytes; those of a cross-layer set of L
    layers 16 N D (L + L (L + 1) / 2). The average adds a quarter.

    Args:
        spec: How it is trained. With `accumulate` only a part of the rows is held at a time.
        d_model: D; a transcoder's target is as wide.
    """
    rows = -(-spec.batch_rows // spec.accumulate)
    return standing_memory(spec, d_model, spec.latents)._replace(step=_step_bytes(spec, d_model, rows))


def standing_memory(spec: TrainSpec, d_model: int, latents: int) -> Memory:
    """What is held between steps of N latents on any device; its `step` is 0."""
    widths = [None if count is None else count * d_model for count in outputs(spec)]
    sizes = [parameters(d_model, latents, width) * FLOAT for width in widths]
    return Memory(
        weights=sum(sizes),
        gradients=sum(sizes),
        moments=sum(_moments_bytes(spec.moments, d_model, latents, width) for width in widths),
        average=sum(sizes) if spec.ema else 0,
        counts=8 * latents * len(sizes),
        step=0,
    )


def gpu_memory(
    spec: TrainSpec, d_model: int, *, data: int = 1, latent: int = 1, stored: Dtype = "bfloat16"
) -> Memory:
    """Memory of the GPU of a mesh that holds the largest shard, batches included; AuxK with DEAD_SHARE.

    From the ledger of a step (`winnow.trainer.plan.paper`), which no GPU has been compared with yet:
    `python -m benchmarks.gpu` does.

    Args:
        spec: How it is trained.
        d_model: D; a transcoder's target is as wide.
        data: Data ranks of the mesh.
        latent: Latent shards of the mesh.
        stored: Type of the dataset, in which rows reach the GPU.
    """
    dead = DEAD_SHARE if spec.auxk_coefficient else 0.0
    return Memory.of(step_on_paper(spec, d_model, data=data, latent=latent, dead_share=dead, stored=stored))


def _step_bytes(spec: TrainSpec, d_model: int, rows: int) -> int:
    """What a step of `rows` rows holds at its peak."""
    latents = spec.latents
    k = min(spec.k_start or spec.k, latents)  # of the widest step
    wide = min(4 * k, latents) if spec.multi_topk else 0
    one, layers = rows * d_model * FLOAT, len(outputs(spec))
    cross = spec.set is not None and spec.set.cross
    # layers of a per-layer set take their steps one after another, those of a cross-layer set one together
    together = layers if cross else 1
    # of a transcoder also the target, as read and normalised
    more = 2 if spec.target_hook is not None else 0
    tile = min(_TILE_BYTES, min(rows, 1024) * min(latents, 4096) * FLOAT) * 5 // 4
    encoding = (ROWS_ENCODING + more) * one * together + tile
    largest = parameters(d_model, latents, max(count or 1 for count in outputs(spec)) * d_model) * FLOAT
    # two blocks: sums, and what is added to them
    gradients = (ROWS_GRADIENTS + more) * one * together + 2 * min(BLOCK_BYTES, largest // 2)
    waiting = 2 * (layers - together) * one  # rows of the layers whose turn it is not
    # the larger, because encoding has ended when gradients begin; codes live through both
    step = max(encoding, gradients) + rows * (k + wide) * together * _ENTRY_BYTES + waiting
    # rounded copies of all matrices of a step and of the rows, which a CPU keeps in float32 (`step_ops`)
    if spec.compute_dtype == "bfloat16":
        numbers = sum((1 + (count or 1)) * latents * d_model for count in outputs(spec)) if cross else 0
        step += ((numbers or 2 * latents * d_model) + rows * d_model * together) * FLOAT
    return step


def fleet_memory(specs: list[tuple[TrainSpec, int]], device: Literal["cpu", "cuda"] = "cpu") -> int:
    """Bytes of several SAEs (spec, D) in one process: the standing memory of all, and one step at a time."""
    # the largest step, not the sum: members take their steps one after another
    memory = gpu_memory if device == "cuda" else sae_memory
    found = [memory(spec, d_model) for spec, d_model in specs]
    return sum(memory.standing for memory in found) + max(memory.step for memory in found)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still allocate: a GPU's free memory, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # `MemAvailable` also counts the page cache that can be dropped; without it (not Linux) free pages only
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    # in a container the limit of its cgroup, not the machine's memory, is what ends a process
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    # no such file (cgroup v1, not Linux), or `max`: no limit
    with suppress(OSError, ValueError):
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
