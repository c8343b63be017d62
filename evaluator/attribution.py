"""Which latents cause an output: gradients through SAEs whose error stays in place.

Letters: W windows, T positions, P = W T rows, S slots of the codes, D width at the hook, V vocabulary.

An SAE is spliced in as ``x' = decode(z') + (x - decode(z))``: its code z can be changed and differentiated,
and its error is passed on, so that the pass is the subject's own, bit for bit, while z' = z. The effect of an
active latent on a scalar m of the output is, to first order, ``z_i dm/dz_i``: about what m loses when the
latent is ablated (Marks et al. 2024, arXiv 2403.19647, section 2). One backward pass gives it for all latents
of all hooks at once, whereas ablating each takes a forward pass: `without` does that.

A transcoder reads one hook and is spliced in at its targets, in the same way: ``y' = y + decode(z') -
decode(z)``. The MLP runs as always, so that what the transcoder misses of it is the error there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError, SaeMismatch
from winnow.schemas.fit import mismatch, require_own_rows
from winnow.subject.load import Subject
from winnow.subject.splice import Replacement

Edit = Callable[[Tensor, Tensor], Tensor]
"""Codes (values [P, S], indices [P, S]) -> values that take their place; it must not change its arguments."""


@dataclass(frozen=True)
class Attribution:
    """First-order effects of each active latent of one hook, and of the SAE's error there, on a scalar."""

    values: Tensor
    """[W, T, S]: codes, in the SAE's own units."""
    indices: Tensor
    """int64 [W, T, S]: their latents."""
    effects: Tensor
    """[W, T, S]: z dm/dz, in units of the scalar; 0 in an empty slot."""
    error: Tensor
    """[W, T]: the same of what all SAEs together miss of the row, which no latent explains; of a transcoder,
    of the row of its (first) target."""

    def among(self, counted: Tensor) -> Attribution:
        """The same with effects and error 0 at positions that are not `counted`, bool [T]."""
        keep = counted.to(self.effects.device)
        error = torch.where(keep.to(self.error.device), self.error, 0.0)
        return Attribution(self.values, self.indices, torch.where(keep[:, None], self.effects, 0.0), error)

    def top(self, count: int, *, skip: int = 0) -> list[tuple[int, int, int]]:
        """List (window, position, slot) of the effects of largest magnitude, beyond `skip` positions."""
        size = self.effects.abs().clone()
        size[:, :skip] = 0
        # Empty slots have effect 0 and must not fill up the list.
        count = min(count, int((size > 0).sum()))
        places = torch.unravel_index(size.flatten().topk(count).indices, size.shape)
        return [(int(w), int(t), int(s)) for w, t, s in zip(*places, strict=True)]


def spliced(sae: Sae, edit: Edit) -> Replacement:
    """Make the replacement of the rows at an SAE's hook: its edited code, and its error as it was.

    It is differentiable in what `edit` adds; the gradient to the rows is that of the identity, since code and
    error are held constant. An edit that changes nothing leaves the rows as they are, bit for bit.

    Args:
        sae: An autoencoder of that hook; `spliced_hooks` also takes transcoders.
        edit: From the codes of rows [P, D] to new values [P, S] of the same slots.

    Raises:
        SaeMismatch: The SAE does not reconstruct its own input.
    """
    if sae.has_target:
        raise SaeMismatch(
            "spliced",
            expected="an autoencoder",
            got="a transcoder, which writes to other hooks",
            fix="Use `spliced_hooks`",
        )
    return spliced_hooks({"": sae}, {"": edit})[""]


Wrote = Callable[[str, Tensor, Tensor], Tensor]
"""(hook, its rows [P, D], what SAEs give of them [P, D]) -> what is added besides; of shape [P, D]."""


def spliced_hooks(
    saes: Mapping[str, Sae], edits: Mapping[str, Edit], wrote: Wrote | None = None
) -> dict[str, Replacement]:
    """Make the replacements of one pass at all hooks that SAEs read or write.

    A code is read at its SAE's hook. What the edit changes of the output is added there or, of a transcoder,
    at its targets: the MLP itself runs, and what the transcoder misses of it stays in place.

    Args:
        saes: hook -> the SAE that reads it; transcoders have a card, which names their targets.
        edits: hook -> the edit of its codes, as for `spliced`.
        wrote: Called at every hook that is written.

    Raises:
        SaeMismatch: An SAE is a crosscoder, or a transcoder without a card.
    """
    outputs = {hook: output_hooks(hook, sae) for hook, sae in saes.items()}
    written = {target for targets in outputs.values() for target in targets}
    # Hook that is written -> (what an SAE gives of it, and what the edit changes of that).
    waiting: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def at(hook: str) -> Replacement:
        def replace(rows: Tensor) -> Tensor:
            if hook in saes:
                parts = _parts(saes[hook], edits[hook], rows, len(outputs[hook]))
                for target, part in zip(outputs[hook], parts, strict=True):
                    waiting.setdefault(target, []).append(part)
            if hook not in written:
                return rows
            given = waiting.pop(hook, [])
            if not given:
                raise ConfigError(
                    f"hook {hook!r}", expected="it after the hook that is read", got="before it"
                )
            before, change = given[0]
            for more, changed in given[1:]:
                before, change = before + more, change + changed
            # The SAE may be on another device than these rows if the subject is spread over several.
            new = rows + change.to(rows.device, rows.dtype)
            return new if wrote is None else new + wrote(hook, rows, before)

        return replace

    return {hook: at(hook) for hook in (*saes, *sorted(written - saes.keys()))}


def output_hooks(hook: str, sae: Sae) -> tuple[str, ...]:
    """The hooks that the SAE at `hook` writes to.

    Raises:
        SaeMismatch: It is a crosscoder, or a transcoder without a card.
    """
    if sae.parts.widths:
        got = f"a crosscoder of {len(sae.parts.widths)} hooks"
        fix = "Use `attribution_joint.attribute_joint`"
        raise SaeMismatch(f"the SAE at {hook}", expected="an SAE of one hook", got=got, fix=fix)
    if not sae.has_target:
        return (hook,)
    if sae.card is None:
        got = "a transcoder without a card, which would name its targets"
        raise SaeMismatch(f"the SAE at {hook}", expected="a published SAE (`Sae.load`)", got=got)
    return sae.card.target_hooks


def _parts(sae: Sae, edit: Edit, rows: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """What an SAE gives of each of its outputs, and what the edit changes of that: each [P, D]."""
    # Code and error are held constant, so a lower hook's gradient passes here as in the subject itself, and
    # no graph of the encoder is kept.
    fixed = rows.detach().to(sae.W_dec.device)
    with torch.no_grad():
        values, indices = sae.encode(fixed)
        before = sae.decode(values, indices, like=fixed)
    after = sae.decode(edit(values, indices), indices, like=fixed)
    widths = list(sae.parts.target_widths) or [before.shape[1]]
    assert len(widths) == count
    # The difference first: it is exactly 0 for an unchanged code, so that rounding cannot move the rows.
    return list(zip(before.split(widths, 1), (after - before).split(widths, 1), strict=True))


def attribute(
    subject: Subject,
    saes: Mapping[str, Sae],
    token_ids: Tensor,
    metric: Callable[[Tensor], Tensor],
    *,
    positions: Any = None,
) -> dict[str, Attribution]:
    """Compute first-order effects of all active latents on a scalar: one forward, one backward pass.

    With several hooks these are total effects: what a lower latent does through a higher one counts for both,
    as it does when the subject runs.

    Args:
        subject: The whole subject.
        saes: hook -> the SAE that reads it, such as the layers of a transcoder set.
        token_ids: int64 [W, T]; the graph above the lowest hook is kept for all of them.
        metric: Logits [W, T, V] -> a scalar, such as `logit_difference`.
        positions: As for `Subject.logits`: of windows of several documents.

    Raises:
        SaeMismatch: An SAE is a crosscoder, its width is not that of its hook, or it was trained on means or
            differences of rows (`winnow derive`).
        ConfigError: There is no SAE, or the metric is not a scalar.
    """
    for hook, sae in saes.items():
        require_own_rows(f"the SAE at {hook}", None if sae.card is None else sae.card.identity)
    if not saes:
        raise ConfigError("saes", expected="one or more", got="none")
    # Before the pass: a wrong width would otherwise fail deep inside the subject, with a message about
    # shapes.
    for site in subject.sites(list(saes)):
        width, name = saes[site.name].d_model, f"the SAE at {site.name}"
        if width != site.d_model:
            raise mismatch("width D", name, expected=site.d_model, of="the subject", got=width)
    leaves = Leaves()
    replace = spliced_hooks(saes, {hook: leaves.edit(hook) for hook in saes}, leaves.wrote)
    total = metric(subject.logits(token_ids, replace, grad=True, positions=positions))
    leaves.differentiate(total)
    shape = (token_ids.shape[0], token_ids.shape[1], -1)
    return {hook: leaves.found(hook, output_hooks(hook, sae)[0], shape) for hook, sae in saes.items()}


class Leaves:
    """Zeros that are added to every code and to every row that is written, and differentiated by.

    The derivative by an added zero is that by what it is added to. Codes and rows cannot be leaves: codes are
    computed, and rows belong to the subject's graph.
    """

    def __init__(self) -> None:
        self._codes: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._rows: dict[str, tuple[Tensor, Tensor]] = {}
        self._slopes: dict[int, Tensor] = {}

    def edit(self, hook: str) -> Edit:
        """The edit that adds a leaf to the codes of a hook."""

        def add(values: Tensor, indices: Tensor) -> Tensor:
            leaf = torch.zeros_like(values, requires_grad=True)
            self._codes[hook] = values, indices, leaf
            return values + leaf

        return add

    def wrote(self, hook: str, rows: Tensor, given: Tensor) -> Tensor:
        """Keep what SAEs miss of the rows of a hook, and give the leaf that is added there."""
        leaf = torch.zeros_like(rows, requires_grad=True)
        self._rows[hook] = rows.detach().float() - given.detach().to(rows.device).float(), leaf
        return leaf

    def differentiate(self, total: Tensor) -> None:
        """Compute the derivatives of `total` by every leaf.

        Raises:
            ConfigError: It is not a scalar.
        """
        if total.numel() != 1:
            raise ConfigError("metric", expected="a scalar", got=f"a tensor of shape {list(total.shape)}")
        # All leaves in one call, since the graph is freed after it.
        leaves = [leaf for *_, leaf in (*self._codes.values(), *self._rows.values())]
        # 0 where a later hook of the same crosscoder overwrites all that a leaf moves.
        slopes = torch.autograd.grad(total, leaves, materialize_grads=True)
        self._slopes = {id(leaf): slope for leaf, slope in zip(leaves, slopes, strict=True)}

    @torch.no_grad()
    def found(self, hook: str, output: str, shape: tuple[int, int, int]) -> Attribution:
        """The effects of a hook's latents, and of what all SAEs miss of `output`."""
        values, indices, on_codes = self._codes[hook]
        lost, on_rows = self._rows[output]
        error = (lost * self._slopes[id(on_rows)].float()).sum(1)
        effects = (values * self._slopes[id(on_codes)]).view(shape)
        return Attribution(values.view(shape), indices.view(shape), effects, error.view(shape[:2]))


def without(
    subject: Subject,
    hook: str,
    sae: Sae,
    tokens: Tensor,
    places: Sequence[tuple[int, int]],
    metric: Callable[[Tensor], Tensor],
    *,
    batch: int = 8,
    positions: Any = None,
) -> Tensor:
    """Compute what a scalar really loses without each of some latents, by running the subject without it.

    Args:
        subject: The whole subject.
        hook: The hook of the latents.
        sae: The SAE that reads it.
        tokens: int64 [T], one window.
        places: (position, slot of the codes) of each latent, as in the results of `Attribution.top`.
        metric: Logits [1, T, V] -> a scalar.
        batch: Variants per pass; logits take batch x T x V numbers.
        positions: [1, T], as for `attribute`.

    Returns:
        float64 [len(places)]: the scalar of the clean pass minus that without the latent.
    """
    lost: list[float] = []
    for low in range(0, len(places), batch):
        part = places[low : low + batch]

        # `part` is a default argument, as a closure would see the loop variable of a later round.
        def drop(values: Tensor, _: Tensor, part: Sequence[tuple[int, int]] = part) -> Tensor:
            changed = values.clone().view(len(part) + 1, len(tokens), -1)
            # Variant 0 stays clean: in the same batch float noise is the same on both sides of the
            # difference.
            for variant, (position, slot) in enumerate(part, start=1):
                changed[variant, position, slot] = 0
            return changed.view_as(values)

        replace = spliced_hooks({hook: sae}, {hook: drop})
        count = len(part) + 1
        at = None if positions is None else torch.as_tensor(positions).expand(count, -1)
        logits = subject.logits(tokens.expand(count, -1), replace, positions=at)
        told = [float(metric(one[None])) for one in logits]
        lost += [told[0] - value for value in told[1:]]
    return torch.tensor(lost, dtype=torch.float64)


def logit_difference(answer: int, against: int | None = None) -> Callable[[Tensor], Tensor]:
    """Make a metric of logits [W, T, V]: a scalar at the last position, averaged over the windows.

    Args:
        answer: The token in question.
        against: The token whose logit is subtracted; None takes the log-probability of `answer` instead.
    """

    def metric(logits: Tensor) -> Tensor:
        last = logits[:, -1].float()
        if against is None:
            return torch.log_softmax(last, -1)[:, answer].mean()
        return (last[:, answer] - last[:, against]).mean()

    return metric
