"""The gradients of a step, in blocks of latents that stay in cache while they are projected and measured.

Legend: B rows, D width of the input, O width of the output, N latents, n latents of this shard, S slots of
codes, E entries of codes.

With g the gradient of the reconstruction and z the codes: dW_dec = scatter(z)^T g, dz = (g W_dec^T) at
the codes' places, 0 if a negative was cut, dW_enc = scatter(dz)^T (x - b_pre), db_enc = sum_b dz,
db_pre = sum_b g - db_enc W_enc. They are written to the parameters' `.grad`, which lives from step to step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from winnow.trainer.kernels.encode_topk import cuts_of, grad_bias
from winnow.trainer.kernels.segment_grad import Segments, segments_of
from winnow.trainer.mesh.exchange import Gather
from winnow.trainer.mesh.world import Axis, Pending
from winnow.trainer.step.context import Model
from winnow.trainer.step.prefixes import EntryPart


class Entries(NamedTuple):
    """A part's entries by latent."""

    segments: Segments
    values: Tensor
    """[E], as the next, in the segments' order."""
    dz: Tensor
    grad: Tensor
    """[B, O], as the operations take it."""

    @classmethod
    def of(cls, model: Model, part: EntryPart) -> Entries:
        """From the codes of rows at hand."""
        segments = segments_of(part.indices, model.ctx.sae.latents, part.chosen)
        values = part.values.flatten()[segments.order]
        grad = model.ops.low(part.grad)
        dz = zero_where_cut(model.ops.dots(grad, part.indices, segments, model.W_dec), values)
        return cls(segments, values, dz, grad)

    def in_rows(self, like: Tensor) -> Tensor:
        """`dz` in the places of the codes [B, S]; 0 for those that no gradient flows through."""
        dz = torch.zeros_like(like)
        dz.view(-1)[self.segments.order] = self.dz
        return dz

    def reaches(self, block: slice) -> bool:
        """Whether any entry is in a block of latents."""
        ends = self.segments.ends
        return bool(ends[block.start] < ends[block.stop])


class DeadRows(NamedTuple):
    """What AuxK adds to the gradients of the dead latents `ids`."""

    ids: Tensor
    W_dec: Tensor
    W_enc: Tensor
    b_enc: Tensor


class Gradients:
    """The gradients of a step, micro-batch by micro-batch.

    Args:
        model: The step's; its SAE's `.grad`s are overwritten.
        over: The data axis if each rank sums its own rows only; None if its sums are of all rows.
    """

    def __init__(self, model: Model, over: Axis | None) -> None:
        sae = model.ctx.sae
        self._model, self._over = model, over
        own = (sae.W_enc, sae.b_enc, sae.W_dec)
        self._W_enc, self._b_enc, self._W_dec = (gradient_buffer(parameter) for parameter in own)
        # the output's bias first (a transcoder's b_dec, else b_pre), a linear path last: `add` relies on it
        self._biases = [gradient_buffer(p) for p in (sae.b_dec, sae.b_pre, sae.W_skip) if p is not None]
        self._first = True
        self._travels: list[Pending] = []
        self._norms: list[Tensor] = []

    def add(
        self,
        entries: list[Entries],
        dead: DeadRows | None,
        centred: Tensor,
        pulls: Tensor,
        skip: tuple[Tensor, Tensor] | None,
        *,
        last: bool,
    ) -> None:
        """Add the gradients of one micro-batch.

        Args:
            entries: Codes that a gradient flows through.
            dead: What is added to the dead latents' gradients.
            centred: The encoder's input [B, D] of the entries' rows.
            pulls: Gradient of the whole output [B, O].
            skip: That and the normalised rows [B, D], of this rank's own rows, for a linear path.
            last: Whether this is the last micro-batch.
        """
        b_enc, sae = self._b_enc, self._model.ctx.sae
        if self._first:
            # not the matrices: the first micro-batch overwrites them, which saves a pass over [N, D]
            for grad in (b_enc, *self._biases):
                grad.zero_()
        for part in entries:
            b_enc += grad_bias(part.dz, part.segments.latent, sae.latents)
        if dead is not None:
            b_enc.index_add_(0, dead.ids, dead.b_enc)
        self._biases[0] += pulls.sum(0)
        if skip is not None:
            self._biases[-1].addmm_(skip[0].T, skip[1])
        travels = self._over is not None and last
        if travels:
            self._send(b_enc, self._biases[0])
        # one after the other if they travel: the decoder's is sent while the encoder's is computed;
        # projection and norm, which need the whole sum, are then left to `end`
        for names in (("W_dec",), ("W_enc",)) if travels else (("W_dec", "W_enc"),):
            self._add_blocks(names, entries, dead, centred, finish=last and not travels)
            if travels:
                self._send(self._W_dec if names == ("W_dec",) else self._W_enc)
        self._first = False

    def _add_blocks(
        self,
        names: tuple[str, ...],
        entries: list[Entries],
        dead: DeadRows | None,
        centred: Tensor,
        *,
        finish: bool,
    ) -> None:
        """Add to the matrices' gradients, one block of latents after the other."""
        ops, latents = self._model.ops, self._model.ctx.sae.latents
        blocks = ops.blocks(latents, centred)
        # dead ids ascend, so those of a block are one slice
        cuts = cuts_of(dead.ids, [0, *(block.stop for block in blocks)]) if dead is not None else []
        for number, block in enumerate(blocks):
            # a block that no entry reaches is still written: its buffer holds the previous step's gradient
            here = [part for part in entries if part.reaches(block)] or entries[:1]
            made: dict[str, Tensor] = {}
            for name in names:
                total, kept = None, getattr(self, f"_{name}")[block]
                for part in here:
                    weights, rows = (part.values, part.grad) if name == "W_dec" else (part.dz, centred)
                    sums = ops.sums(weights, part.segments, rows, block)
                    total = sums if total is None else total.add_(sums)
                total = torch.zeros_like(kept) if total is None else total
                if dead is not None:
                    some = slice(cuts[number], cuts[number + 1])
                    # ids are distinct, so the order of additions, and with it the bits, is fixed
                    total.index_add_(0, dead.ids[some] - block.start, getattr(dead, name)[some])
                if not self._first:
                    total += kept
                made[name] = total
            if finish:
                # before the copy to `.grad`, while the block is in cache
                self._project(block, made["W_dec"], made["W_enc"])
            for name in names:
                getattr(self, f"_{name}")[block] = made[name]

    def _project(self, block: slice, decoder: Tensor, encoder: Tensor) -> None:
        """Take from a block of the decoder's gradient what is parallel to its rows, and measure both."""
        directions = self._model.ctx.sae.W_dec[block]
        # not einsum: 0.37 ms per block against 0.07 (docs/kernels.md)
        along = torch.linalg.vecdot(decoder, directions)
        decoder.addcmul_(directions, along[:, None], value=-1.0)
        self._norms += [decoder.norm(), encoder.norm()]

    def _send(self, *tensors: Tensor) -> None:
        assert self._over is not None
        self._travels += [self._over.sum_start(tensor) for tensor in tensors]

    def end(self) -> float:
        """Sum over the mesh what is not summed yet; the joint norm of all shards' gradients."""
        ctx = self._model.ctx
        sae, world = ctx.sae, ctx.world
        if sae.W_skip is not None:
            # always of this rank's own rows, since a gather sends the centred rows only
            self._travels.append(world.data.sum_start(self._biases[-1]))
        for travel in self._travels:
            travel.wait()
        if self._over is not None:
            for block in self._model.ops.blocks(sae.latents, self._W_enc):
                self._project(block, self._W_dec[block], self._W_enc[block])
        # the encoder reads x - b_pre, so b_pre's gradient has this second term, of all shards; it comes after
        # the waits, so that it is also of all ranks
        through_encoder = torch.mv(sae.W_enc.detach().T, self._b_enc)
        gradient_buffer(sae.b_pre).sub_(world.latent.sum(through_encoder))
        # replicated, so counted once and left out of the sum over shards
        everywhere = [grad.norm() for grad in self._biases]
        if world.latent.size == 1:
            return torch.stack([self._b_enc.norm(), *everywhere, *self._norms]).norm().item()
        own = torch.stack([self._b_enc.norm(), *self._norms]).double().square().sum()
        return (world.latent.sum(own) + torch.stack(everywhere).double().square().sum()).sqrt().item()


def pulls_of(parts: list[EntryPart]) -> Tensor:
    """The gradient of the whole output [B, O]."""
    first, *others = (part.grad for part in parts if part.whole)
    for other in others:
        first = first + other
    return first


def gathered(model: Model, gather: Gather) -> tuple[list[Entries], Tensor, Tensor]:
    """Entries, the encoder's input and the gradient of the whole output of all ranks' rows."""
    centred, parts = gather.result()
    entries: list[Entries] = []
    for part in parts:
        if part.values.numel():
            # ranks pad rows to the fullest of them and codes to the widest, with 0
            segments = segments_of(part.indices, model.ctx.sae.latents, part.values > 0)
            values, dz = (codes.flatten()[segments.order] for codes in (part.values, part.dz))
            entries.append(Entries(segments, values, dz, model.ops.low(part.grad)))
    pulls = pulls_of([EntryPart(part.values, part.indices, part.grad, whole=part.whole) for part in parts])
    return entries, centred, pulls


def zero_where_cut(grad: Tensor, values: Tensor) -> Tensor:
    """The gradient through a cut of negatives to 0: 0 unless the value is above 0; in place."""
    # torch's own backward of relu writes in place and needs no mask
    return torch.ops.aten.threshold_backward.grad_input(grad, values, 0, grad_input=grad)


def gradient_buffer(parameter: Tensor) -> Tensor:
    """The parameter's `.grad`, which lives from step to step."""
    if parameter.grad is None:
        # once per run: a fresh tensor above 32 MiB is mapped and faulted in anew, 17 ms for 38 MB, while the
        # sums that fill it take 11 (docs/kernels.md)
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
