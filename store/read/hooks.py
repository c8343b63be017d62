"""Which harvest would hold hooks that a dataset lacks, and its size. No I/O."""

from __future__ import annotations

from collections.abc import Sequence

from winnow.common.figures import human_bytes
from winnow.schemas.errors import ConfigError
from winnow.schemas.harvest import HarvestPlan, row_bytes
from winnow.schemas.subject import parse_hook


def require_hooks(plan: HarvestPlan, hooks: Sequence[str], *, what: str, d_model: int | None = None) -> None:
    """Check that a dataset has all of these hooks.

    Args:
        plan: The dataset's plan.
        hooks: Hooks that are to be read.
        what: What reads them, such as `train.set` or an address.
        d_model: Width D of the hooks that are missing, in a dataset that has none of the named sites.

    Raises:
        ConfigError: Some are missing; the error says what to put into `plan.hooks` of another harvest, and
            the bytes that it would take for this plan's rows.
    """
    missing = [hook for hook in dict.fromkeys(hooks) if hook not in plan.spec.hooks]
    if not missing:
        return
    rest = [hook for hook in dict.fromkeys(hooks) if hook in plan.spec.hooks]
    size = harvest_bytes(plan, [*rest, *missing], d_model)
    takes = (
        ""
        if size is None
        else f": {human_bytes(size)} in {plan.spec.dtype} for this plan's {plan.rows:,} rows"
    )
    raise ConfigError(
        f"{what} reads hooks that the dataset lacks: {listed(missing)}",
        expected=f"all of {listed(hooks)}",
        got=listed(plan.spec.hooks),
        fix=f"Harvest into another root with plan.hooks = {listed([*rest, *missing])}{takes}",
    )


def harvest_bytes(plan: HarvestPlan, hooks: Sequence[str], d_model: int | None = None) -> int | None:
    """Bytes of the rows of `hooks` for all of a plan's rows, uncompressed; None if a width is not known.

    Args:
        plan: A plan of the same subject.
        hooks: Its own hooks and others.
        d_model: Width D of the others, if no named site of the plan says it.
    """
    widths = {site.name: site.d_model for site in plan.sites}
    # All named sites have the residual stream's width.
    stream = next((width for hook, width in widths.items() if parse_hook(hook)), d_model)
    total = 0
    for hook in hooks:
        width = widths.get(hook, stream if parse_hook(hook) else d_model)
        if width is None:
            return None
        total += plan.rows * row_bytes(plan.spec.dtype, width)
    return total


def listed(hooks: Sequence[str]) -> str:
    """Hooks for a message, neighbouring layers of a site as one: `mlp_in.0 to mlp_in.5, lm_head`."""
    runs: list[list[str]] = []
    for hook in sorted(dict.fromkeys(hooks), key=lambda hook: parse_hook(hook) or (hook, -1)):
        named, before = parse_hook(hook), parse_hook(runs[-1][-1]) if runs else None
        if named and before and named == (before[0], before[1] + 1):
            runs[-1].append(hook)
        else:
            runs.append([hook])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
