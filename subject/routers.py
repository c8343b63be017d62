"""Proves by one short pass that the guessed routers of a subject give the logits that its experts follow.

The name tells little: Gemma 4's router returns probabilities, Llama 4's returns the logits second, and Zaya's
has a class for no expert.

Letters: T positions of the pass, k experts chosen for a token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from winnow.subject.causal import probe_ids
from winnow.subject.layout import Layout
from winnow.subject.shapes import Router

log = logging.getLogger("winnow.subject")

_INNER = ("proj",)
"""Linear layers inside a router that returns probabilities only (Gemma 4)."""
# A sum of a few rounded numbers divides them; what is chosen by equal logits has weights this close.
_ROUNDINGS = 16.0
"""Largest inversion of two weights that counts as rounding, in units of the dtype's epsilon."""


class _Choice(NamedTuple):
    """The experts that a block runs."""

    experts: Tensor
    """int64 [T, k]."""
    weights: Tensor
    """float [T, k]: the factors of their outputs."""


def prove_routers(
    model: nn.Module, layout: Layout, kept: int, run: Callable[[Tensor], object], vocabulary: int
) -> Layout:
    """The layout without the guessed routers that a pass does not confirm (logged).

    Logits are confirmed if every token's experts are those of its k largest logits. Where a bias or a limit
    to groups has a say in the choice (DeepSeek V3), they are if the weights of each token's experts rise with
    their logits.

    Args:
        model: The model, with its weights.
        layout: Its layout, with guessed routers.
        kept: Number of blocks that are there.
        run: Runs the model on ids int64 [1, T].
        vocabulary: V.
    """
    guessed = {layer: router for layer in range(kept) if (router := layout.router(layer)) is not None}
    if not guessed:
        return layout
    seen: dict[str, Any] = {}
    paths = [
        path
        for layer, router in guessed.items()
        for path in _modules(model, f"{layout.blocks}.{layer}", router)
    ]
    with ExitStack() as stack, torch.no_grad(), suppress(_Enough):
        for path in paths:
            stack.enter_context(_watched(model, path, seen, len(paths)))
        run(probe_ids(vocabulary)[None])
    routers, wrong = list(layout.routers), []
    for layer, router in guessed.items():
        routers[layer] = _confirmed(model, f"{layout.blocks}.{layer}", router, seen)
        if routers[layer] is None:
            wrong.append(layer)
    if wrong:
        log.warning(
            "architecture %r: the experts of %d blocks do not follow the logits of a module named %s (block "
            "%d is the first); router cannot be read there",
            layout.architecture, len(wrong), guessed[wrong[0]].module, wrong[0],
        )  # fmt: skip
    return replace(layout, routers=tuple(routers) if any(routers) else ())


def router_width(module: nn.Module) -> int | None:
    """The number of experts that a router chooses among, without running it; None if it cannot be told."""
    # Inkling's matrix has rows for shared experts too, among which nothing is chosen.
    told = getattr(module, "num_experts", None)
    if isinstance(told, int):
        return told
    matrices = [weight for weight in module.parameters() if weight.ndim == 2 and weight.is_floating_point()]
    return int(matrices[-1].shape[0]) if matrices else None


def _modules(model: nn.Module, block: str, router: Router) -> list[str]:
    """Paths of what is watched: the router, its inner layers, the experts."""
    whole = f"{block}.{router.module}"
    inside = {name for name, _ in model.get_submodule(whole).named_modules()}
    return [whole, *(f"{whole}.{name}" for name in _INNER if name in inside), f"{block}.{router.experts}"]


class _Enough(Exception):
    """Ends the pass: a truncated model may have no head to run."""


@contextmanager
def _watched(model: nn.Module, path: str, seen: dict[str, Any], wanted: int) -> Iterator[None]:
    """Note what a module is given and gives, as (arguments, outputs) under its path, until all is seen."""

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        # A copy, since a block may go on to write into its weights.
        made = [output] if isinstance(output, Tensor) else list(output) if _several(output) else []
        seen[path] = (
            [value.detach().clone().cpu() for value in given],
            [value.detach().clone().cpu() if isinstance(value, Tensor) else None for value in made],
        )
        if len(seen) == wanted:
            raise _Enough

    handle = model.get_submodule(path).register_forward_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _several(output: Any) -> bool:
    return isinstance(output, (tuple, list))


def _confirmed(model: nn.Module, block: str, router: Router, seen: dict[str, Any]) -> Router | None:
    """The router with where its logits are; None if nothing that it gives are logits."""
    module, *inner = _modules(model, block, router)[:-1]
    width = router_width(model.get_submodule(module))
    outputs = {path: seen.get(path, ((), ()))[1] for path in (module, *inner)}
    choice = _choice(seen.get(f"{block}.{router.experts}", ((), ()))[0], outputs[module])
    if width is None or choice is None:
        return None
    for path, made in outputs.items():
        for number, value in enumerate(made):
            if _is_logits(value, width, choice):
                return replace(router, module=path.removeprefix(f"{block}."), output=number)
    return None


def _choice(given: list[Tensor], made: list[Tensor | None]) -> _Choice | None:
    """The experts that are run, as they are told; else those whose weight is not 0 (Llama 4)."""
    indices = next((value for value in given if _is_rows(value) and not value.is_floating_point()), None)
    if indices is not None:
        weights = [value for value in given if value.is_floating_point() and value.shape == indices.shape]
        return _Choice(indices.long(), weights[0].float()) if len(weights) == 1 else None
    for value in made:
        if value is None or not _is_rows(value) or not value.is_floating_point():
            continue
        chosen = (value != 0).sum(1)
        k = int(chosen[0])
        if 0 < k < value.shape[1] and bool((chosen == k).all()):
            weights, indices = value.float().topk(k)
            return _Choice(indices, weights)
    return None


def _is_rows(value: Tensor) -> bool:
    return value.ndim == 2 and len(value) == probe_ids(1).numel()


def _is_logits(value: Tensor | None, width: int, choice: _Choice) -> bool:
    if value is None or not _is_rows(value) or not value.is_floating_point() or value.shape[1] != width:
        return False
    logits, k = value.float(), choice.experts.shape[1]
    # Probabilities are in the order of their logits too.
    if k >= width or int(choice.experts.max()) >= width or bool(((logits >= 0) & (logits <= 1)).all()):
        return False
    chosen = logits.gather(1, choice.experts)
    # Values, not indices: of equal logits (bfloat16) either expert may be chosen.
    if torch.equal(chosen.sort(1).values, logits.topk(k).values.sort(1).values):
        return True
    if k < 2:
        return False
    rising = choice.weights.gather(1, chosen.argsort(1)).diff(dim=1)
    slack = _ROUNDINGS * torch.finfo(value.dtype).eps * float(choice.weights.abs().max())
    return bool((rising >= -slack).all())
