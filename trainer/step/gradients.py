"""The gradients of a step, in blocks of latents that stay in cache while they are projected and measured.

Legend: B rows, D width of the input, O width of the output, T targets, N latents, n latents of this shard,
S slots of codes, E entries of codes.

With g the gradient of the reconstruction and z the codes: dW_dec = scatter(z)^T g, dz = (g W_dec^T) at
the codes' places, 0 if a negative was cut, dW_enc = scatter(dz)^T (x - b_pre), db_enc = sum_b dz,
db_pre = sum_b g - db_enc W_enc. They are written to the parameters' `.grad`, which lives from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.trainer.kernels.encode_topk import cuts_of, grad_bias, places_of
from winnow.trainer.kernels.fused_ops import Finish, FusedOps
from winnow.trainer.kernels.segment_grad import Segments
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
    grads: tuple[Tensor, ...]
    """[B, O/T] per target, as the operations take them."""

    @classmethod
    def of(cls, model: Model, part: EntryPart) -> Entries:
        """From the codes of rows at hand."""
        segments = model.ops.segments(part.indices, model.ctx.sae.latents, part.chosen)
        values = part.values.flatten()[segments.order]
        grads = tuple(model.ops.low(grad) for grad in part.grads)
        if part.dz is not None:
            return cls(segments, values, part.dz.flatten()[segments.order], grads)
        dz = zero_where_cut(model.dots(grads, part.indices, segments), values)
        return cls(segments, values, dz, grads)

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


class _Source(NamedTuple):
    """Entries, and what is summed over them."""

    entries: Entries
    weights: Tensor
    """[E]."""
    rows: Tensor
    """[B, O/T] or [B, D]."""


class Gradients:
    """The gradients of a step, micro-batch by micro-batch; `finish` ends them.

    Args:
        model: The step's; its SAE's `.grad`s are overwritten.
        over: The data axis if each rank sums its own rows only; None if its sums are of all rows.
    """

    def __init__(self, model: Model, over: Axis | None) -> None:
        sae = model.ctx.sae
        self.model, self._over = model, over
        own = (sae.W_enc, sae.b_enc, sae.W_dec)
        self._W_enc, self.b_enc, self._W_dec = (gradient_buffer(parameter) for parameter in own)
        # the output's bias first (a transcoder's b_dec, else b_pre), a linear path last: `add` relies on it
        self._biases = [gradient_buffer(p) for p in (sae.b_dec, sae.b_pre, sae.W_skip) if p is not None]
        self._first = True
        self._travels: list[Pending] = []
        self._norms: dict[str, list[Tensor]] = {"W_dec": [], "W_enc": []}
        # [n]: what of the decoder's gradient is parallel to its rows. Only of several targets it is taken
        # from the entries before any row is summed, since no block holds a whole row; None if it is measured,
        # block by block, or the sums are not whole here, or dots are of rounded rows
        ahead = model.targets > 1 and over is None and model.ctx.spec.compute_dtype == "float32"
        ahead = ahead and model.fused is None  # whose kernels go through whole rows
        self._along = torch.zeros_like(sae.b_enc.detach()) if ahead else None

    def add(
        self,
        entries: list[Entries],
        dead: DeadRows | None,
        centred: Tensor,
        pull: Tensor,
        skip: tuple[Tensor, Tensor] | None,
        *,
        last: bool,
    ) -> None:
        """Add the gradients of one micro-batch.

        Args:
            entries: Codes that a gradient flows through.
            dead: What is added to the dead latents' gradients.
            centred: The encoder's input [B, D] of the entries' rows.
            pull: Gradient of the output's bias [O], or of that of the first target, the only one with a bias.
            skip: That and the normalised rows [B, D], of this rank's own rows, for a linear path.
            last: Whether this is the last micro-batch.
        """
        b_enc = self.b_enc
        if self._first:
            # not the matrices: the first micro-batch overwrites them, which saves a pass over [N, D]
            for grad in (b_enc, *self._biases):
                grad.zero_()
        self._biases[0][: len(pull)] += pull
        if skip is not None:
            self._biases[-1].addmm_(skip[0].T, skip[1])
        fused = self.model.fused
        if fused is not None:
            self._add_at_once(fused, entries, dead, centred, last=last)
        else:
            self._add_in_blocks(entries, dead, centred, last=last)
        self._first = False

    def _add_in_blocks(
        self, entries: list[Entries], dead: DeadRows | None, centred: Tensor, *, last: bool
    ) -> None:
        """Add the sums over entries, block by block; arguments as for `add`."""
        b_enc, sae = self.b_enc, self.model.ctx.sae
        for part in entries:
            b_enc += per_latent(part.dz, part.segments, sae.latents)
        if dead is not None:
            b_enc.index_add_(0, dead.ids, dead.b_enc)
        if self._along is not None:
            self._add_along(self._along, entries, dead)
        travels = self._over is not None and last
        if travels:
            self._send(b_enc, self._biases[0])
        finish = last and self._over is None and (self._along is not None or self.model.targets == 1)
        width = sae.d_out // self.model.targets
        for target in range(self.model.targets):
            sources = [_Source(part, part.values, part.grads[target]) for part in entries]
            self._add_columns("W_dec", slice(target * width, (target + 1) * width), sources, dead, finish)
        if travels:
            # sent while the encoder's is computed; projection and norm, which need the whole sum, are left
            # to `finish`
            self._send(self._W_dec)
        sources = [_Source(part, part.dz, centred) for part in entries]
        self._add_columns("W_enc", slice(0, sae.d_model), sources, dead, finish)
        if travels:
            self._send(self._W_enc)

    def _add_at_once(
        self, fused: FusedOps, entries: list[Entries], dead: DeadRows | None, centred: Tensor, *, last: bool
    ) -> None:
        """The same by kernels that finish each row in the pass that writes it."""
        more = None if dead is None else places_of(dead.ids, len(self.b_enc))
        if dead is not None:
            self.b_enc.index_add_(0, dead.ids, dead.b_enc)
        travels, finish = self._over is not None and last, last and self._over is None
        targets = self.model.targets
        width = self._W_dec.shape[1] // targets
        for target in range(targets):
            sources = [_Source(part, part.values, part.grads[target]) for part in entries]
            columns = slice(target * width, (target + 1) * width)
            self._add_rows(fused, "W_dec", columns, sources, dead, more, finish and targets == 1)
        if finish and targets > 1:
            self._finish_decoder(fused)
        if travels:
            self._send(self._W_dec, self._biases[0])
        sources = [_Source(part, part.dz, centred) for part in entries]
        self._add_rows(fused, "W_enc", slice(None), sources, dead, more, finish)
        if travels:
            self._send(self._W_enc, self.b_enc)

    def _add_rows(
        self,
        fused: FusedOps,
        name: str,
        columns: slice,
        sources: list[_Source],
        dead: DeadRows | None,
        places: Tensor | None,
        finish: bool,
    ) -> None:
        """Add to columns of a matrix's gradient, and with the encoder's to that of its bias."""
        buffer, decoder = getattr(self, f"_{name}")[:, columns], name == "W_dec"
        directions = self.model.ctx.sae.W_dec.detach() if decoder and finish else None
        squares = self.b_enc.new_empty(len(buffer)) if finish else None
        more = None
        if dead is not None:
            assert places is not None
            more = places, getattr(dead, name)[:, columns].contiguous()
        for number, source in enumerate(sources):
            fused.add_sums(
                buffer,
                source.weights,
                source.entries.segments,
                source.rows,
                bias=None if decoder else self.b_enc,
                finish=Finish(not self._first or number > 0)
                if number < len(sources) - 1
                else Finish(not self._first or number > 0, more, directions, squares),
            )
        if not sources:
            if self._first:
                buffer.zero_()
            if dead is not None:
                buffer.index_add_(0, dead.ids, getattr(dead, name)[:, columns])
            if finish:
                squares = fused.finish_rows(buffer, directions)
        if squares is not None:
            self._norms[name].append(norm_of(squares))

    def _finish_decoder(self, fused: FusedOps) -> None:
        """Project and measure the decoder's gradient, which is whole, in a pass of its own."""
        squares = fused.finish_rows(self._W_dec, self.model.ctx.sae.W_dec.detach())
        self._norms["W_dec"].append(norm_of(squares))

    def _add_along(self, along: Tensor, entries: list[Entries], dead: DeadRows | None) -> None:
        """Add what of each latent's decoder gradient is parallel to its row."""
        for part in entries:
            # <sum z g, W> = sum z <g, W>: the dots of the values' gradient, which are at hand; where those
            # are cut to 0, z is 0
            along += per_latent(part.values * part.dz, part.segments, len(along))
        if dead is not None:
            rows = self.model.ctx.sae.W_dec.detach()[dead.ids]
            along.index_add_(0, dead.ids, torch.linalg.vecdot(dead.W_dec, rows))

    def _add_columns(
        self, name: str, columns: slice, sources: list[_Source], dead: DeadRows | None, finish: bool
    ) -> None:
        """Add to columns of a matrix's gradient, one block of latents after the other."""
        ops, latents = self.model.ops, self.model.ctx.sae.latents
        buffer = getattr(self, f"_{name}")[:, columns]
        blocks = ops.blocks(latents, buffer)
        # dead ids ascend, so those of a block are one slice
        cuts = cuts_of(dead.ids, [0, *(block.stop for block in blocks)]) if dead is not None else []
        for number, block in enumerate(blocks):
            # a block that no entry reaches is still written: its buffer holds the previous step's gradient
            here = [source for source in sources if source.entries.reaches(block)] or sources[:1]
            total = None
            for source in here:
                sums = ops.sums(source.weights, source.entries.segments, source.rows, block)
                total = sums if total is None else total.add_(sums)
            total = torch.zeros_like(buffer[block]) if total is None else total
            if dead is not None:
                some = slice(cuts[number], cuts[number + 1])
                # ids are distinct, so the order of additions, and with it the bits, is fixed
                total.index_add_(0, dead.ids[some] - block.start, getattr(dead, name)[some, columns])
            if not self._first:
                total += buffer[block]
            if finish and name == "W_dec" and self._along is None:
                # before the copy to `.grad`, while the block is in cache
                project(total, self.model.ctx.sae.W_dec.detach()[block])
                buffer[block] = total
            elif finish and name == "W_dec":
                assert self._along is not None
                # without the parallel part, in the pass that copies: `measure` leaves it out of the norm
                directions, along = (
                    self.model.ctx.sae.W_dec.detach()[block, columns],
                    self._along[block, None],
                )
                torch.addcmul(total, directions, along, value=-1.0, out=buffer[block])
            else:
                buffer[block] = total
            if finish:
                # while the block is in cache
                self._norms[name].append(total.norm())

    def _project(self, block: slice) -> None:
        """The same for a block of `.grad`, whose parallel part is not known yet."""
        decoder = self._W_dec[block]
        project(decoder, self.model.ctx.sae.W_dec.detach()[block])
        self._norms["W_dec"].append(decoder.norm())
        self._norms["W_enc"].append(self._W_enc[block].norm())

    def _send(self, *tensors: Tensor) -> None:
        assert self._over is not None
        self._travels += [self._over.sum_start(tensor) for tensor in tensors]

    def settle(self) -> Tensor:
        """Wait for the sums over `data` and project; gives this shard's part [D] of b_pre's second term."""
        ctx = self.model.ctx
        if ctx.sae.W_skip is not None:
            # always of this rank's own rows, since a gather sends the centred rows only
            self._travels.append(ctx.world.data.sum_start(self._biases[-1]))
        for travel in self._travels:
            travel.wait()
        fused = self.model.fused
        if fused is not None:
            if self._over is not None:
                self._finish_decoder(fused)
                self._norms["W_enc"].append(norm_of(fused.finish_rows(self._W_enc, None)))
        elif self._along is None and (self._over is not None or self.model.targets > 1):
            for block in self.model.ops.blocks(ctx.sae.latents, self._W_dec):
                self._project(block)
        # the encoder reads x - b_pre, so b_pre's gradient has this second term, of all shards; it comes after
        # the waits, so that it is also of all ranks
        return torch.mv(ctx.sae.W_enc.detach().T, self.b_enc)

    def measure(self, through_encoder: Tensor) -> tuple[Tensor, Tensor]:
        """Take in b_pre's second term [D], of all shards; squared norms: of sharded, of replicated ones."""
        gradient_buffer(self.model.ctx.sae.b_pre).sub_(through_encoder)
        own = torch.stack([self.b_enc.norm(), *self.norms]).double().square().sum()
        if self._along is not None:
            # rows are unit, so by Pythagoras
            own -= self._along.double().square().sum()
        everywhere = torch.stack(self.replicated).double().square().sum()
        return own.clamp_min(0.0), everywhere

    @property
    def norms(self) -> list[Tensor]:
        """Norms of both matrices' blocks, block by block where both have the same."""
        decoder, encoder = self._norms["W_dec"], self._norms["W_enc"]
        if len(decoder) != len(encoder):
            return [*decoder, *encoder]
        return [norm for pair in zip(decoder, encoder, strict=True) for norm in pair]

    @property
    def replicated(self) -> list[Tensor]:
        """Norms of what every rank computes alike."""
        return [grad.norm() for grad in self._biases]


def finish(layers: Sequence[Gradients]) -> Tensor:
    """Sum over the mesh what is not summed yet; the joint norm of all shards' gradients [].

    Args:
        layers: Those of one SAE, or of all layers of a set, clipped by their joint norm.
    """
    latent = layers[0].model.ctx.world.latent
    through_encoder = latent.sum(torch.stack([layer.settle() for layer in layers]))
    found = [layer.measure(second) for layer, second in zip(layers, through_encoder, strict=True)]
    if len(layers) == 1 and latent.size == 1:
        # one SAE on one process: in one sum, whose bits resumed runs of earlier versions rest on
        (alone,) = layers
        return torch.stack([alone.b_enc.norm(), *alone.replicated, *alone.norms]).norm()
    own, everywhere = (torch.stack(squares).sum() for squares in zip(*found, strict=True))
    # replicated ones are counted once, and left out of the sum over shards
    return (latent.sum(own) + everywhere).sqrt()


def project(gradient: Tensor, directions: Tensor) -> None:
    """Take from rows [n, O] of the decoder's gradient what is parallel to the (unit) directions, in place."""
    # not einsum: 0.37 ms per block against 0.07 (docs/kernels.md)
    along = torch.linalg.vecdot(gradient, directions)
    gradient.addcmul_(directions, along[:, None], value=-1.0)


def pulls_of(parts: list[EntryPart]) -> Tensor:
    """The gradient of the whole output [B, O]."""
    first, *others = (part.grad for part in parts if part.whole)
    for other in others:
        first = first + other
    return first


def pull_of(parts: list[EntryPart]) -> Tensor:
    """The gradient of the output's bias [O]: the sum of that of the whole output over the rows."""
    at_hand = [part.pull for part in parts if part.pull is not None]
    left = [part for part in parts if part.whole and part.pull is None]
    sums = [*at_hand, *([pulls_of(left).sum(0)] if left else [])]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def per_latent(values: Tensor, segments: Segments, latents: int) -> Tensor:
    """Sums [N] of values [E] in the segments' order."""
    # one more: entries that belong to no latent
    return grad_bias(values, segments.latent, latents + 1)[:latents]


def norm_of(squares: Tensor) -> Tensor:
    """The norm [] of a matrix from the squared norms [N] of its rows."""
    return squares.sum(dtype=torch.float64).sqrt().to(squares.dtype)


def gathered(model: Model, gather: Gather) -> tuple[list[Entries], Tensor, Tensor]:
    """Entries, the encoder's input and the gradient of the whole output of all ranks' rows."""
    centred, parts = gather.result()
    entries: list[Entries] = []
    for part in parts:
        if part.values.numel():
            # ranks pad rows to the fullest of them and codes to the widest, with 0
            segments = model.ops.segments(part.indices, model.ctx.sae.latents, part.values > 0)
            values, dz = (codes.flatten()[segments.order] for codes in (part.values, part.dz))
            grads = model.by_target(model.ops.low(part.grad))
            entries.append(Entries(segments, values, dz, grads))
    pulls = pulls_of([EntryPart(part.values, part.indices, (part.grad,), whole=part.whole) for part in parts])
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
