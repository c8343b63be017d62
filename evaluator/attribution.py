"""Which latents cause an output: gradients through SAEs whose error stays in place.

Letters: W windows, T positions, P = W T rows, S slots of the codes, D width at the hook, V vocabulary.

An SAE is spliced in as ``x' = decode(z') + (x - decode(z))``: its code z can be changed and differentiated,
and its error is passed on, so that the pass is the subject's own, bit for bit, while z' = z. The effect of an
active latent on a scalar m of the output is, to first order, ``z_i dm/dz_i``: about what m loses when the
latent is ablated (Marks et al. 2024, arXiv 2403.19647, section 2). One backward pass gives it for all latents
of all hooks at once, whereas ablating each takes a forward pass: `without` does that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError
from winnow.schemas.fit import check_autoencoder, mismatch
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
    """[W, T]: the same of the row's reconstruction error, which no latent explains."""

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
        sae: An autoencoder of that hook (no transcoder, no crosscoder).
        edit: From the codes of rows [P, D] to new values [P, S] of the same slots.

    Raises:
        SaeMismatch: The SAE does not reconstruct its own input.
    """
    check_autoencoder("the SAE", sae.parts)

    def replace(rows: Tensor) -> Tensor:
        # Code and error are held constant, so a lower hook's gradient passes here as in the subject itself,
        # and no graph of the encoder is kept.
        with torch.no_grad():
            values, indices = sae.encode(rows)
            scale = sae.normalise(rows)[1]
            before = sae.decode(values, indices, like=scale)
        after = sae.decode(edit(values, indices), indices, like=scale)
        # The difference first: it is exactly 0 for an unchanged code, so that rounding cannot move the rows.
        # The SAE may be on another device than these rows if the subject is spread over several.
        return rows + (after - before).to(rows.device, rows.dtype)

    return replace


def attribute(
    subject: Subject, saes: Mapping[str, Sae], token_ids: Tensor, metric: Callable[[Tensor], Tensor]
) -> dict[str, Attribution]:
    """Compute first-order effects of all active latents on a scalar: one forward, one backward pass.

    With several hooks these are total effects: what a lower latent does through a higher one counts for both,
    as it does when the subject runs.

    Args:
        subject: The whole subject.
        saes: hook -> the autoencoder trained there.
        token_ids: int64 [W, T]; the graph above the lowest hook is kept for all of them.
        metric: Logits [W, T, V] -> a scalar, such as `logit_difference`.

    Raises:
        SaeMismatch: An SAE is not an autoencoder, or its width is not that of its hook.
        ConfigError: There is no SAE, or the metric is not a scalar.
    """
    if not saes:
        raise ConfigError("saes", expected="one or more", got="none")
    # Before the pass: a wrong width would otherwise fail deep inside the subject, with a message about
    # shapes.
    for site in subject.sites(list(saes)):
        width, name = saes[site.name].d_model, f"the SAE at {site.name}"
        if width != site.d_model:
            raise mismatch("width D", name, expected=site.d_model, of="the subject", got=width)
    sources = {hook: _Source(sae) for hook, sae in saes.items()}
    replace = {hook: source.replace for hook, source in sources.items()}
    total = metric(subject.logits(token_ids, replace, grad=True))
    if total.numel() != 1:
        raise ConfigError("metric", expected="a scalar", got=f"a tensor of shape {list(total.shape)}")
    # All leaves in one call, since the graph is freed after it.
    leaves = [leaf for source in sources.values() for leaf in (source.on_codes, source.on_rows)]
    gradients = iter(torch.autograd.grad(total, leaves))
    shape = (token_ids.shape[0], token_ids.shape[1], -1)
    return {hook: source.found(next(gradients), next(gradients), shape) for hook, source in sources.items()}


class _Source:
    """The leaves of one hook: a zero is added to every code and to every row, and differentiated by.

    The derivative by an added zero is that by what it is added to. Codes and rows cannot be leaves: codes are
    computed, and rows belong to the subject's graph.
    """

    def __init__(self, sae: Sae) -> None:
        check_autoencoder("the SAE", sae.parts)
        self.sae = sae

    def replace(self, rows: Tensor) -> Tensor:
        self.rows, self.on_rows = rows.detach(), torch.zeros_like(rows, requires_grad=True)
        return spliced(self.sae, self._with_leaf)(rows) + self.on_rows

    def _with_leaf(self, values: Tensor, indices: Tensor) -> Tensor:
        self.values, self.indices = values, indices
        self.on_codes = torch.zeros_like(values, requires_grad=True)
        return values + self.on_codes

    @torch.no_grad()
    def found(self, on_codes: Tensor, on_rows: Tensor, shape: tuple[int, int, int]) -> Attribution:
        # The error again, from the codes: `spliced` does not keep it, and it is as large as the rows.
        lost = self.rows.float() - self.sae.decode(self.values, self.indices, like=self.rows).float()
        error = (lost * on_rows.float()).sum(1)
        effects = (self.values * on_codes).view(shape)
        return Attribution(self.values.view(shape), self.indices.view(shape), effects, error.view(shape[:2]))


def without(
    subject: Subject,
    hook: str,
    sae: Sae,
    tokens: Tensor,
    places: Sequence[tuple[int, int]],
    metric: Callable[[Tensor], Tensor],
    *,
    batch: int = 8,
) -> Tensor:
    """Compute what a scalar really loses without each of some latents, by running the subject without it.

    Args:
        subject: The whole subject.
        hook: The hook of the latents.
        sae: The autoencoder trained there.
        tokens: int64 [T], one window.
        places: (position, slot of the codes) of each latent, as in the results of `Attribution.top`.
        metric: Logits [1, T, V] -> a scalar.
        batch: Variants per pass; logits take batch x T x V numbers.

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

        logits = subject.logits(tokens.expand(len(part) + 1, -1), {hook: spliced(sae, drop)})
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
