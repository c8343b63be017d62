"""Attribution through an SAE of several hooks: a crosscoder, or a transcoder from one subject to another.

Letters: W windows, T positions, P = W T rows, S slots of the codes, H parts, V vocabulary.

The code depends on hooks that come late in a pass, or on another subject, so it is read in a pass of its own.
In the second pass every hook that is written is set to its clean row plus what the change of the code adds
there: ``x'^m = x^m + decode(z')^m - decode(z)^m``. Its error stays in place, and the pass is the subject's
own while z' = z. What a changed row does to a later hook of the same SAE is overwritten there, since the
latent's own direction at that hook states it already; `downstream` replaces the same hooks in this way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.evaluator.attribution import Attribution, Edit, Leaves, Wrote
from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError, SaeMismatch
from winnow.schemas.fit import require_own_rows
from winnow.schemas.joined import hooks_by_root, split_hook
from winnow.subject.load import Subject
from winnow.subject.splice import Replacement

Places = Mapping[str, Any]
"""Name of the dataset -> positions [W, T] of its subject's passes, as for `Subject.logits`."""


class JointCode:
    """The code of an SAE of several hooks on some windows, read from clean passes.

    Args:
        subjects: Name of the dataset -> its whole subject; the name is empty if there is one.
        sae: A published SAE, whose card names its hooks.
        token_ids: int64 [W, T].
        positions: Of each subject's passes; without an entry, a token sees its whole window.

    Raises:
        SaeMismatch: The SAE has no card, or was trained on means or differences of rows (`winnow derive`).
    """

    def __init__(
        self, subjects: Mapping[str, Subject], sae: Sae, token_ids: Tensor, positions: Places | None = None
    ) -> None:
        if sae.card is None:
            raise SaeMismatch("the SAE", expected="a published SAE (`Sae.load`)", got="one without a card")
        # Also of one of several datasets: a subject would give rows of another kind in the place of those.
        require_own_rows("the SAE", sae.card.identity)
        self.sae, self._writes = sae, sae.card.output_hooks
        hooks = tuple(dict.fromkeys((*sae.card.input_hooks, *self._writes)))
        rows: dict[str, Tensor] = {}
        for name, own in hooks_by_root(hooks).items():
            found = subjects[name].activations(token_ids, own, positions=(positions or {}).get(name))
            rows |= {f"{name}/{hook}" if name else hook: each.flatten(0, 1) for hook, each in found.items()}
        device = sae.W_dec.device
        self._read = torch.cat([rows[hook].to(device).float() for hook in sae.card.input_hooks], dim=1)
        self.rows = {hook: rows[hook] for hook in self._writes}
        """Hook that is written -> its clean rows [P, D]."""
        with torch.no_grad():
            self.values, self.indices = sae.encode(self._read)
            self.given = dict(zip(self._writes, self._split(self.values), strict=True))
            """Hook that is written -> what the SAE gives of its rows [P, D]."""

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        parts = self.sae.parts
        widths = parts.target_widths or parts.widths or (self.sae.d_out,)
        return self.sae.decode(values, self.indices, like=self._read).split(list(widths), dim=1)

    def replacements(self, name: str, edit: Edit, wrote: Wrote | None = None) -> dict[str, Replacement]:
        """Make the replacements of one pass of a subject, at its own hooks.

        Args:
            name: Name of the subject's dataset.
            edit: From codes [P, S] to the values in their place.
            wrote: As for `spliced_hooks`; called with the hook's own name.

        Raises:
            ConfigError: The SAE writes nothing in that subject.
        """
        changed = dict(zip(self._writes, self._split(edit(self.values, self.indices)), strict=True))
        mine = {split_hook(hook)[1]: hook for hook in self._writes if split_hook(hook)[0] == name}
        if not mine:
            raise ConfigError(f"subject {name!r}", expected="one that the SAE writes to", got="another")

        def at(own: str, hook: str) -> Replacement:
            def replace(rows: Tensor) -> Tensor:
                clean = self.rows[hook].to(rows)
                # The difference first: it is exactly 0 for an unchanged code.
                new = clean + (changed[hook] - self.given[hook]).to(rows)
                return new if wrote is None else new + wrote(own, clean, self.given[hook])

            return replace

        return {own: at(own, hook) for own, hook in mine.items()}


def attribute_joint(
    subjects: Mapping[str, Subject],
    sae: Sae,
    token_ids: Tensor,
    metric: Callable[[Tensor], Tensor],
    *,
    name: str = "",
    positions: Places | None = None,
) -> Attribution:
    """Compute first-order effects of the latents of an SAE of several hooks on a scalar of one subject.

    Args:
        subjects: As for `JointCode`.
        sae: A published crosscoder, or a transcoder of several subjects.
        token_ids: int64 [W, T].
        metric: Logits [W, T, V] of the subject -> a scalar.
        name: Name of that subject's dataset.
        positions: As for `JointCode`.

    Returns:
        The effects; `error` is that of all hooks that are written in the subject.

    Raises:
        SaeMismatch: As for `JointCode`.
        ConfigError: It writes nothing in that subject, or the metric is not a scalar.
    """
    code, leaves = JointCode(subjects, sae, token_ids, positions), Leaves()
    replace = code.replacements(name, leaves.edit(""), leaves.wrote)
    total = metric(
        subjects[name].logits(token_ids, replace, grad=True, positions=(positions or {}).get(name))
    )
    leaves.differentiate(total)
    shape = (token_ids.shape[0], token_ids.shape[1], -1)
    found = [leaves.found("", hook, shape) for hook in replace]
    error = torch.stack([each.error for each in found]).sum(0)
    return Attribution(found[0].values, found[0].indices, found[0].effects, error)


def without_joint(
    subjects: Mapping[str, Subject],
    sae: Sae,
    tokens: Tensor,
    places: Sequence[tuple[int, int]],
    metric: Callable[[Tensor], Tensor],
    *,
    name: str = "",
    positions: Places | None = None,
) -> Tensor:
    """Compute what a scalar of one subject loses without each of some latents; see `attribution.without`.

    Returns:
        float64 [len(places)]: the scalar of the clean pass minus that without the latent, at all its hooks.
    """
    code = JointCode(subjects, sae, tokens[None], positions)

    def told(edit: Edit) -> float:
        replace = code.replacements(name, edit)
        logits = subjects[name].logits(tokens[None], replace, positions=(positions or {}).get(name))
        return float(metric(logits))

    def drop(position: int, slot: int) -> Edit:
        def edit(values: Tensor, _: Tensor) -> Tensor:
            changed = values.clone()
            changed[position, slot] = 0
            return changed

        return edit

    # A pass each: at most --top of them, and the clean one in the same shape, so that float noise cancels.
    with torch.no_grad():
        clean = told(lambda values, _: values)
        lost = [clean - told(drop(position, slot)) for position, slot in places]
    return torch.tensor(lost, dtype=torch.float64)
